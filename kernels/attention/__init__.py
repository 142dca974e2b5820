"""Soft-masked flash attention: the math in api.py, Triton kernels in tiles.py and gradients.py, the plain form in
reference.py.
"""

from conan_kernels.attention.api import soft_mask_attention, soft_mask_plan

__all__ = ["soft_mask_attention", "soft_mask_plan"]
