"""What a transformer computes between its matrix products, each in one pass over memory, forward and backward, on
CUDA.

PyTorch's own forms make several passes, in fp32 if one of the inputs is. The engine has other forms for a CPU.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from conan_kernels.architecture import FUSION

if TYPE_CHECKING:
    from torch import Tensor


# programs that share the rows in the backward pass of add_rms_norm; fixed, so that the order of its sums is fixed
PROGRAMS = 512


@functools.cache
def _tiles():
    """The kernels; imported here, since a CPU machine may lack Triton."""
    from conan_kernels.pointwise import tiles

    return tiles


def _over(count, size):
    """How many blocks of `size` hold `count`."""
    return -(-count // size)


def _power(n):
    """The smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


def add_rms_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(x + y, RMSNorm(x + y)) of x and y [T, C] (arXiv 1910.07467); y None means x alone.

    RMSNorm(z) = z / sqrt(mean(z^2) + eps) * weight, weight [C]. The first has the dtype of x, the second `dtype`, by
    default that of x.
    """
    return _AddRMSNorm.apply(x, y, weight, eps, dtype or x.dtype)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, weight, eps, dtype):
        x, y = x.contiguous(), None if y is None else y.contiguous()
        (T, C), out, inverse = x.shape, x.new_empty(x.shape, dtype=dtype), x.new_empty(len(x), dtype=torch.float32)
        total = x if y is None else torch.empty_like(x)
        if T:
            with torch.cuda.device_of(x):
                _tiles().rms_norm_row[(T,)](x, y, total, weight, out, inverse, C, eps, **_row(C), **FUSION)
        ctx.save_for_backward(total, weight, inverse)
        ctx.other = None if y is None else y.dtype
        ctx.set_materialize_grads(False)
        return x.view_as(x) if y is None else total, out

    @staticmethod
    def backward(ctx, dtotal, dout):
        total, weight, inverse = ctx.saved_tensors
        if dout is None:
            return dtotal, dtotal if ctx.other is None or dtotal is None else dtotal.to(ctx.other), None, None, None
        (T, C), dout, dx = total.shape, dout.contiguous(), torch.empty_like(total)
        dtotal = None if dtotal is None else dtotal.contiguous()
        dy = dx if ctx.other in (None, dx.dtype) else torch.empty_like(dx, dtype=ctx.other)
        each = _over(T, PROGRAMS)
        dweight = total.new_zeros(_over(T, each) if T else 0, C, dtype=torch.float32)
        if T:
            with torch.cuda.device_of(total):
                _tiles().rms_norm_gradients[(len(dweight),)](
                    total, weight, inverse, dout, dtotal, dx, None if dy is dx else dy, dweight, T, each, C,
                    **_row(C), **FUSION,
                )  # fmt: skip
        return dx, None if ctx.other is None else dy, dweight.sum(0).to(weight.dtype), None, None


def _row(C):
    """Launch options of programs that hold a whole row."""
    block = _power(C)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """RoPE (arXiv 2104.09864): rotate the pairs (x[d], x[d + D/2]) of the first `heads` heads of x [T, N, D].

    cos and sin [T, 1, D/2] are of the angles; the other heads are copied. Returns [T, N, D]. Tokens may have any
    stride.
    """
    return _Rotate.apply(x, cos, sin, heads)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, heads):
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        return _turned(x, cos, sin, heads, 1.0)

    @staticmethod
    def backward(ctx, gradient):
        return _turned(gradient, *ctx.saved_tensors, ctx.heads, -1.0), None, None, None


def _turned(x, cos, sin, heads, sign):
    T, N, D = x.shape
    x = x if x.stride()[1:] == (D, 1) else x.contiguous()
    out = x.new_empty(T, N, D)
    if T:
        with torch.cuda.device_of(x):
            _tiles().rotate_token[(T,)](
                x, cos, sin, out, x.stride(0), sign, N, heads, D // 2, _power(D // 2), HEADS=16, **FUSION
            )
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202) of gate_up [T, 2F], gate first -> [T, F]."""
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        gate_up = gate_up.contiguous()
        T, F = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty(T, F)
        if T:
            with torch.cuda.device_of(out):
                _tiles().swiglu_row[(T, _over(F, 1024))](gate_up, out, F, BLOCK=1024, **FUSION)
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    def backward(ctx, dout):
        (gate_up,) = ctx.saved_tensors
        (T, F), dgate_up = dout.shape, torch.empty_like(gate_up)
        if T:
            with torch.cuda.device_of(dout):
                _tiles().swiglu_gradients[(T, _over(F, 1024))](
                    gate_up, dout.contiguous(), dgate_up, F, BLOCK=1024, **FUSION
                )
        return dgate_up


def sum_sequences(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sum of each sequence's rows: x [T, C], cu_seqlens int32 [B+1] -> fp32 [B, C].

    It gives the same bits on every run, unlike index_add, whose atomics add in any order.
    """
    return _SumSequences.apply(x, cu_seqlens)


class _SumSequences(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cu_seqlens):
        x, B, C = x.contiguous(), len(cu_seqlens) - 1, x.shape[1]
        out = x.new_empty(B, C, dtype=torch.float32)
        if B:
            with torch.cuda.device_of(x):
                _tiles().sum_sequence[(B, _over(C, 128))](x, cu_seqlens, out, C, BLOCK=128, num_warps=1, **FUSION)
        ctx.save_for_backward(cu_seqlens)
        ctx.like = len(x), x.dtype
        return out

    @staticmethod
    def backward(ctx, dout):
        T, dtype = ctx.like
        return torch.repeat_interleave(dout.to(dtype), ctx.saved_tensors[0].diff(), dim=0, output_size=T), None


def softmax_sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits [n, V] -> (largest of each row, sum of exp(logit - largest)), both fp32 [n]."""
    peak, total = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(logits):
        _tiles().softmax_row[(len(logits),)](logits, peak, total, logits.shape[1], BLOCK=4096, num_warps=8, **FUSION)
    return peak, total


def softmax_minus_target_(logits: Tensor, lse: Tensor, target: Tensor) -> Tensor:
    """Replace logits [n, V] by exp(logits - lse [n]), minus 1 at target [n] (int64; -1: no column of these)."""
    n, V = logits.shape
    with torch.cuda.device_of(logits):
        _tiles().softmax_gradient[(n, _over(V, 4096))](logits, lse, target, V, BLOCK=4096, num_warps=8, **FUSION)
    return logits


def add_(total: Tensor, part: Tensor, first: bool = False, factor: Tensor | None = None) -> Tensor:
    """total += part * factor, with the same number of elements, total contiguous; first: total = part * factor.

    factor: fp32, a 0-d tensor; None is 1. PyTorch's own additions and copies on CUDA take more than twice as long if
    the dtypes differ.
    """
    if not total.is_cuda or (part.dtype == total.dtype and factor is None):
        part = (part if factor is None else part.float() * factor).view_as(total)
        return total.copy_(part) if first else total.add_(part)
    return _add_part(total, part, first, factor)


def _add_part(total, part, first, factor):
    part, n = part.contiguous(), total.numel()
    if n:
        with torch.cuda.device_of(total):
            _tiles().add_part[(_over(n, 2048),)](total, part, factor, n, FIRST=first, BLOCK=2048, **FUSION)
    return total


def adamw_(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    rounded: Tensor | None,
    step: int,
    lr: float,
    scale: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    decay: float = 0.01,
) -> None:
    """Update number `step` (from 1) of AdamW (arXiv 1711.05101), in place, as torch.optim.AdamW: one pass over memory.

    Args:
        weight: fp32 [n], contiguous, as are gradient (times `scale`: clipping), and the moments mean and square.
        rounded: [n], gets the new weights in its dtype, or None.
        step, lr, betas, eps, decay: as torch.optim.AdamW has them.
    """
    n, (beta1, beta2) = weight.numel(), betas
    if n:
        with torch.cuda.device_of(weight):
            _tiles().adamw_part[(_over(n, 1024),)](
                weight, gradient, mean, square, rounded, n, float(scale), 1 - lr * decay, beta1, 1 - beta1, beta2,
                1 - beta2, lr / (1 - beta1**step), (1 - beta2**step) ** 0.5, eps, BLOCK=1024, WHOLE=n % 1024 == 0,
                **FUSION,
            )  # fmt: skip
