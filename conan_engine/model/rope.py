"""RoPE (arXiv 2104.09864): one Triton kernel on CUDA; on a CPU a form with its derivative written out.

Shapes: T packed tokens, H heads, D head size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from conan_engine.model.cached_rows import blocks
from conan_kernels import pointwise

if TYPE_CHECKING:
    from torch import Tensor

    from conan_engine.config import Model as ModelSettings


def turns(positions: Tensor, config: ModelSettings, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles at positions [T], each [T, 1, D/2]."""
    angles = positions[:, None, None] * frequencies(config, positions.device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def frequencies(config: ModelSettings, device: torch.device | None = None) -> Tensor:
    """The angle by which each pair of a head rotates from one token to the next: float32 [D/2].

    With scaling (Llama 3.1), pairs with few turns in the original context are divided by the factor, pairs with many
    keep their speed, and between them the change is gradual.
    """
    plain = config.rope_theta ** (-torch.arange(0, config.head, 2, device=device, dtype=torch.float32) / config.head)
    scaling = config.rope_scaling
    if scaling.factor == 1:
        return plain
    rounds = scaling.original_context * plain / (2 * math.pi)
    kept = ((rounds - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return kept * plain + (1 - kept) * plain / scaling.factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotate the pairs (x[d], x[d + D/2]) of the first `heads` heads of x [..., H, D], and copy the others.

    cos and sin: [..., 1, D/2]. On CUDA the result has the dtype of x; on a CPU the wider of those of x and cos.
    """
    if x.is_cuda:
        return pointwise.rotate(x, cos, sin, heads)
    if torch.compiler.is_compiling():  # an exported graph has torch's own operations
        a, b = x[..., :heads, :].chunk(2, dim=-1)
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return torch.cat((rotated, x[..., heads:, :].to(rotated.dtype)), dim=-2)
    return _Rotate.apply(x, cos, sin, heads)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, heads):
        ctx.save_for_backward(cos, sin)
        ctx.heads, ctx.dtype = heads, x.dtype
        return _rotated(x, cos, sin, heads, torch.promote_types(x.dtype, cos.dtype))

    @staticmethod
    def backward(ctx, gradient):
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, -sin, ctx.heads, ctx.dtype), None, None, None


def _rotated(x, cos, sin, heads, dtype):
    out = torch.empty(x.shape, dtype=dtype)
    for given, c, s, result in blocks(x, cos, sin, out):
        given = given.to(c.dtype)
        done = result if dtype == c.dtype else torch.empty_like(given)
        (a, b), (upper, lower) = (one[..., :heads, :].chunk(2, dim=-1) for one in (given, done))
        torch.mul(a, c, out=upper).addcmul_(b, s, value=-1)
        torch.mul(b, c, out=lower).addcmul_(a, s)
        done[..., heads:, :] = given[..., heads:, :]
        if done is not result:
            result.copy_(done)
    return out
