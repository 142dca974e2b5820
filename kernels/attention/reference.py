"""Soft-masked attention as the paper writes it (arXiv 2509.12892, section 3.2), one sequence after another.

The kernel is tested against it, and it runs on a CPU. Its memory is O(H * L^2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


def soft_mask_bias(
    length: int,
    alpha: float | Tensor,
    mask: str = "column",
    dtype: torch.dtype = torch.float64,
    device: str | torch.device | None = None,
) -> Tensor:
    """log M [length, length] of one sequence; alpha is a number or a 0-d tensor.

    With i and j counted from 1: 0 where j <= i; elsewhere log min(alpha * l / j, 1) for "column", log min(alpha * l /
    i, 1) for "row", log alpha for "uniform".
    """
    position = torch.arange(1, length + 1, dtype=dtype, device=device)
    i, j = position[:, None], position[None, :]
    axis = {"column": j, "row": i, "uniform": torch.full_like(j, length)}[mask]
    alpha = torch.as_tensor(alpha, dtype=dtype, device=device)
    return torch.where(j <= i, 0.0, (alpha * length / axis).clamp(max=1).log())


def soft_mask_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    alpha: float | Tensor,
    mask: str = "column",
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """The same as `conan_kernels.soft_mask_attention`, in the dtype of the inputs (fp64 for a reference). lse is
    fp64 for fp64, else fp32.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))  # [T, H, D]
    outs, lses = [q[:0]], [q[:0, :, 0].T]
    bounds = cu_seqlens.tolist()
    for start, end in zip(bounds, bounds[1:]):
        queries, keys, values = (x[start:end].transpose(0, 1) for x in (q, k, v))  # [H, l, D]
        bias = soft_mask_bias(end - start, alpha, mask, torch.promote_types(q.dtype, torch.float32), q.device)
        scores = queries @ keys.mT * scale + bias  # [H, l, l]; at least fp32, since the bias is
        outs.append((scores.softmax(-1).to(q.dtype) @ values).transpose(0, 1))
        lses.append(scores.logsumexp(-1))
    out = torch.cat(outs)
    return (out, torch.cat(lses, dim=1).detach()) if return_lse else out
