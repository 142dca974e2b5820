"""Hand-written Triton kernels, importable as `conan_kernels`."""

from conan_kernels.attention import soft_mask_attention, soft_mask_plan
from conan_kernels.info_nce import InfoNCE, Known, Margin, gather_documents, info_nce, log_sum_exp_of_documents

__all__ = [
    "InfoNCE",
    "Known",
    "Margin",
    "gather_documents",
    "info_nce",
    "log_sum_exp_of_documents",
    "soft_mask_attention",
    "soft_mask_plan",
]
