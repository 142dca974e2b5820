"""Launch the Triton kernels of soft-masked attention: tile sizes, the plan, one kernel forward, two backward.

For Hopper there are other kernels too: hopper/launch.py.

Nothing here waits for the device: the host knows only T, B and the shapes of a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from conan_kernels.architecture import FUSION, architecture, attention_tiles
from conan_kernels.attention.gradients import dk_dv_block, dq_block
from conan_kernels.attention.hopper import BLOCK
from conan_kernels.attention.hopper import launch as hopper
from conan_kernels.attention.schedule import PIECES, ROWS, order_slots, row_sums, split_bias
from conan_kernels.attention.tiles import LOG2_E, forward_block, plan_blocks

if TYPE_CHECKING:
    from torch import Tensor


def _options(q):
    return attention_tiles(q.dtype, q.shape[2], architecture(q.device))


def _plan(cu_seqlens, alpha, T, mask, block):
    """(plan int32 [slots, 4], bias fp32 [T]) as plan_blocks fills them."""
    B = len(cu_seqlens) - 1
    slots = T // block + B
    plan = torch.empty(slots, 4, dtype=torch.int32, device=cu_seqlens.device)
    bias = torch.empty(T, dtype=torch.float32, device=cu_seqlens.device)
    valid = torch.empty(B, dtype=torch.bool, device=cu_seqlens.device)
    plan_blocks[(B, 8)](cu_seqlens, alpha, plan, bias, valid, B, T, slots, MASK=mask, BLOCK=block, **FUSION)
    rule = "cu_seqlens must rise from 0 to T, and alpha lie in [0, 1]"
    torch._assert_async(valid.all(), f"soft_mask_attention: {rule}")
    return plan, bias


def order_of(plan: Tensor, mask: str) -> Tensor:
    """The order of a plan's slots, int32 [slots + 1]."""
    slots = len(plan)
    order = plan.new_empty(slots + 1)
    grid = triton.cdiv(slots, ROWS.value)
    order_slots[(grid,)](plan, order, slots, BLOCK=BLOCK, BY_ROW=mask != "column", **FUSION)
    return order


def pieces_of(q: Tensor, plan: Tensor, bias: Tensor, mask: str, scale: float) -> Tensor:
    """A plan's bias in pieces, [slots * BLOCK, 16] of the dtype of q."""
    slots = len(plan)
    pieces = q.new_empty(slots * BLOCK, PIECES.value)
    split_bias[(slots,)](bias, plan, pieces, scale * LOG2_E.value, BLOCK=BLOCK, BY_ROW=mask != "column", **FUSION)
    return pieces


def sums_of_rows(out: Tensor, dout: Tensor, lse: Tensor, plan: Tensor, bias: Tensor, mask: str) -> dict[str, Tensor]:
    """By name, what schedule.row_sums fills."""
    (T, H, D), by_row = out.shape, mask != "column"
    padded_rows = len(plan) * BLOCK
    log_sums, deltas, future = (lse.new_empty(H, padded_rows) for _ in range(3))
    sums = {"log_sums": log_sums, "future_log_sums": future if by_row else log_sums, "deltas": deltas}
    sums["closed_bias"] = lse.new_empty(padded_rows)
    shape = {"H": H, "D": D, "W": triton.next_power_of_2(D), "BLOCK": BLOCK, "BY_ROW": by_row}
    row_sums[(len(plan), H)](out, dout, lse, bias, plan, **sums, T=T, padded_rows=padded_rows, **shape, **FUSION)
    return sums


def _rows(x):
    """x in a layout that the kernels take: any stride from token to token, the heads of a token side by side."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, alpha: Tensor, mask: str, scale: float
) -> tuple[Tensor, Tensor]:
    (T, H, D), G = q.shape, k.shape[1]
    q, k, v = _rows(q), _rows(k), _rows(v)
    out = q.new_empty(T, H, D)
    lse = q.new_empty(H, T, dtype=torch.float32)
    options, _, _ = _options(q)
    with torch.cuda.device_of(q):
        if hopper.wanted(q, k, v, len(cu_seqlens) - 1):
            plan, bias = _plan(cu_seqlens, alpha, T, mask, BLOCK)
            order, pieces = order_of(plan, mask), pieces_of(q, plan, bias, mask, scale)
            hopper.forward(q, k, v, out, lse, plan, order, pieces, bias, mask, scale)
            return out, lse
        plan, bias = _plan(cu_seqlens, alpha, T, mask, options["BM"])
        forward_block[(len(plan), H)](
            q, k, v, out, lse, plan, bias, T, q.stride(0), k.stride(0), v.stride(0), scale * LOG2_E.value,
            H=H, G=G, D=D, BY_ROW=mask != "column", **options, **FUSION,
        )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    alpha: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (T, H, D), G = q.shape, k.shape[1]
    q, k, v, dout = _rows(q), _rows(k), _rows(v), dout.contiguous()
    dq, dk, dv = q.new_empty(T, H, D), k.new_empty(T, G, D), v.new_empty(T, G, D)
    _, rows, columns = _options(q)
    with torch.cuda.device_of(q):
        if hopper.wanted(q, k, v, len(cu_seqlens) - 1):
            plan, bias = _plan(cu_seqlens, alpha, T, mask, BLOCK)
            gradients = {"dq": dq, "dk": dk, "dv": dv}
            sums, order = sums_of_rows(out, dout, lse, plan, bias, mask), order_of(plan, mask)
            hopper.backward(q, k, v, dout, gradients, sums, plan, order, bias, mask, scale)
            return dq, dk, dv
        plan, bias = _plan(cu_seqlens, alpha, T, mask, rows["BM"])
        delta = torch.empty_like(lse)
        strides = T, q.stride(0), k.stride(0), v.stride(0), scale * LOG2_E.value
        shape = {"H": H, "G": G, "D": D, "BY_ROW": mask != "column"}
        dq_block[(len(plan), H)](q, k, v, out, dout, lse, delta, dq, plan, bias, *strides, **shape, **rows, **FUSION)
        dk_dv_block[(len(plan), G)](
            q, k, v, dout, lse, delta, dk, dv, plan, bias, *strides, **shape, **columns, **FUSION
        )
    return dq, dk, dv
