"""What lies between matrix products, one Triton kernel each: norms, RoPE, SwiGLU, the LM head's softmax, mixed
additions, pooling; and the optimizer's step.
"""

from conan_kernels.pointwise.api import (
    adamw_,
    add_,
    add_rms_norm,
    rotate,
    softmax_minus_target_,
    softmax_sums,
    sum_sequences,
    swiglu,
)

__all__ = [
    "adamw_",
    "add_",
    "add_rms_norm",
    "rotate",
    "softmax_minus_target_",
    "softmax_sums",
    "sum_sequences",
    "swiglu",
]
