"""Soft-masked flash attention. The math is in api.py, the Triton kernels in tiles.py and gradients.py, what they are
tested against in reference.py."""

from conan_kernels.attention.api import soft_mask_attention

__all__ = ["soft_mask_attention"]
