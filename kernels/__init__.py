"""Hand-written Triton kernels, importable as `conan_kernels`."""

from conan_kernels.gather import gather_documents  # noqa: F401
from conan_kernels.info_nce import InfoNCE, Known, Margin, info_nce, log_sum_exp_of_documents  # noqa: F401
from conan_kernels.soft_mask_attention import soft_mask_attention  # noqa: F401
