"""SwiGLU's product (arXiv 2002.05202): one Triton kernel on CUDA; on a CPU a form with its derivative written out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from conan_engine.model.cached_rows import blocks
from conan_kernels import pointwise

if TYPE_CHECKING:
    from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [..., 2 F], the gates first -> [..., F]."""
    if gate_up.is_cuda:
        return pointwise.swiglu(gate_up)
    if torch.compiler.is_compiling():  # an exported graph has torch's own operations
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        for given, result in blocks(gate_up, out):
            gate, up = given.chunk(2, dim=-1)
            torch.ops.aten.silu.out(gate, out=result).mul_(up)
        return out

    @staticmethod
    def backward(ctx, gradient):
        (gate_up,) = ctx.saved_tensors
        of_both = torch.empty_like(gate_up)
        for given, wanted, result in blocks(gate_up, gradient, of_both):
            (gate, up), (of_gate, of_up) = given.chunk(2, dim=-1), result.chunk(2, dim=-1)
            torch.ops.aten.silu.out(gate, out=of_up).mul_(wanted)
            torch.ops.aten.silu_backward.grad_input(wanted * up, gate, grad_input=of_gate)
        return of_both
