"""What lies between matrix products, one Triton kernel each: norms, RoPE, SwiGLU, the LM head's softmax, mixed
additions, pooling.
"""

from conan_kernels.pointwise.api import (
    add_,
    add_rms_norm,
    rotate,
    softmax_minus_target_,
    softmax_sums,
    sum_sequences,
    swiglu,
)

__all__ = ["add_", "add_rms_norm", "rotate", "softmax_minus_target_", "softmax_sums", "sum_sequences", "swiglu"]
