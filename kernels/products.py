"""Matrix products that add up in fp32, by the vendor's library where it can."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def add_product_(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> Tensor:
    """total [N, M] += a [N, K] @ b [K, M], total fp32, a and b of one dtype; first: total = a @ b, whatever it held."""
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        return torch.addmm(total, a, b, beta=beta, out=total)
    if adds_in_float32(total.device):
        return torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, beta=beta, out=total)
    return (total.copy_ if first else total.add_)(a @ b)


@functools.cache
def adds_in_float32(device: torch.device) -> bool:
    """Whether a product of bfloat16 can add to fp32 here. On CUDA it can, without the product in memory; tried once,
    since PyTorch has this for its CUDA builds alone.
    """
    total, one = torch.ones(16, 16, device=device), torch.eye(16, dtype=torch.bfloat16, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, one, one, torch.float32, out=total)
    except RuntimeError:  # NotImplementedError is one
        return False
    return torch.equal(total, 1 + one.float())
