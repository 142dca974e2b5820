"""Matrix products of float32 on a CPU, by oneDNN where torch has it.

torch multiplies float32 by MKL, which knows no AVX-512 on AMD's processors: oneDNN computes the same product there at
2.3 times the rate (512 to 3,072 numbers, 2 cores of a Zen 5), and its bits are the same for any number of threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


ROWS = 2048  # tokens of a weight's gradient at a time: oneDNN is slower where it adds up more


def available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """nn.Linear without a bias: [..., inputs] -> [..., outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        plain = (
            x.device.type != "cpu"
            or x.dtype != torch.float32
            or self.weight.dtype != torch.float32
            or torch.is_autocast_enabled("cpu")
            or not x.numel()
            or torch.compiler.is_compiling()  # an exported graph has torch's own operations
            or not available()
        )
        return F.linear(x, self.weight) if plain else _Product.apply(x, self.weight)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        of_x = _product(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_x, None
        parts = zip(gradient.flatten(0, -2).split(ROWS), x.flatten(0, -2).split(ROWS))
        of_weight = torch.zeros_like(weight)
        for upper, lower in parts:
            of_weight += _product(upper.t(), lower.t())
        return of_x, of_weight


def product(x: Tensor, weight: Tensor) -> Tensor:
    """[..., inputs] and [outputs, inputs], float32 on a CPU -> [..., outputs], without a gradient."""
    return _product(x, weight) if available() and x.numel() else F.linear(x, weight)


def _product(x, weight):
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
