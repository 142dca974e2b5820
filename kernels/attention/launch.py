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


def slots_of(cu_seqlens: Tensor, alpha: Tensor, bias: Tensor, slots: Tensor, mask: str, block: int) -> Tensor:
    """Fill bias fp32 [T] and slots int32 [S, 4] as plan_blocks says -> bool [B], which sequences are right."""
    B = len(cu_seqlens) - 1
    valid = torch.empty(B, dtype=torch.bool, device=cu_seqlens.device)
    plan_blocks[(B, 8)](
        cu_seqlens, alpha, slots, bias, valid, B, len(bias), len(slots), MASK=mask, BLOCK=block, **FUSION
    )
    return valid


def _blocks(device, D, dtype):
    """Rows of a block of the plain kernels' plans: forward, and backward where that is another number."""
    forward, rows, _ = attention_tiles(dtype, D, architecture(device))
    return dict.fromkeys((forward["BM"], rows["BM"]))


def empty_plan(cu_seqlens: Tensor, T: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    """The tensors that `plan` fills: bias fp32 [T], then of the plain kernels the slots [S, 4] of each size of block;
    of Hopper's slots [S, 4], order [S + 1], closed_bias fp32 [S * BLOCK] and pieces [S * BLOCK, 16].
    """
    B = len(cu_seqlens) - 1
    bias = torch.empty(T, dtype=torch.float32, device=cu_seqlens.device)
    empty = lambda *shape: bias.new_empty(shape, dtype=torch.int32)
    if not hopper.runs(cu_seqlens.device, D, dtype):
        return [bias, *(empty(T // block + B, 4) for block in _blocks(cu_seqlens.device, D, dtype))]
    slots = T // BLOCK + B
    closed_bias, pieces = bias.new_empty(slots * BLOCK), bias.new_empty(slots * BLOCK, PIECES.value, dtype=dtype)
    return [bias, empty(slots, 4), empty(slots + 1), closed_bias, pieces]


def plan(
    cu_seqlens: Tensor, alpha: Tensor, T: int, D: int, dtype: torch.dtype, mask: str, scale: float
) -> list[Tensor]:
    """What forward and backward of a batch need besides its vectors (empty_plan)."""
    made = empty_plan(cu_seqlens, T, D, dtype)
    bias, *of_kernels = made
    with torch.cuda.device_of(cu_seqlens):
        if hopper.runs(cu_seqlens.device, D, dtype):
            slots, order, closed_bias, pieces = of_kernels
            hopper.check(slots)
            valid = slots_of(cu_seqlens, alpha, bias, slots, mask, BLOCK)
            fill_order(slots, order, mask)
            split(bias, slots, closed_bias, pieces, mask, scale)
        else:
            for slots, block in zip(of_kernels, _blocks(cu_seqlens.device, D, dtype)):
                valid = slots_of(cu_seqlens, alpha, bias, slots, mask, block)
        rule = "cu_seqlens must rise from 0 to T, and alpha lie in [0, 1]"
        torch._assert_async(valid.all(), f"soft_mask_attention: {rule}")
    return made


def fill_order(slots: Tensor, order: Tensor, mask: str) -> None:
    grid = triton.cdiv(len(slots), ROWS.value)
    order_slots[(grid,)](slots, order, len(slots), BLOCK=BLOCK, BY_ROW=mask != "column", **FUSION)


def split(bias: Tensor, slots: Tensor, closed_bias: Tensor, pieces: Tensor, mask: str, scale: float) -> None:
    """Fill closed_bias and pieces, the bias of each column in blocks, and as a matrix product can add it."""
    arguments = bias, slots, pieces, closed_bias, scale * LOG2_E.value
    split_bias[(len(slots),)](*arguments, BLOCK=BLOCK, BY_ROW=mask != "column", **FUSION)


def sums_of_rows(out: Tensor, dout: Tensor, lse: Tensor, plan: Tensor, bias: Tensor, mask: str) -> dict[str, Tensor]:
    """By name, what schedule.row_sums fills."""
    (T, H, D), by_row = out.shape, mask != "column"
    padded_rows = len(plan) * BLOCK
    log_sums, deltas, future = (lse.new_empty(H, padded_rows) for _ in range(3))
    sums = {"log_sums": log_sums, "future_log_sums": future if by_row else log_sums, "deltas": deltas}
    shape = {"H": H, "D": D, "W": triton.next_power_of_2(D), "BLOCK": BLOCK, "BY_ROW": by_row}
    row_sums[(len(plan), H)](out, dout, lse, bias, plan, **sums, T=T, padded_rows=padded_rows, **shape, **FUSION)
    return sums


def _rows(x):
    """x in a layout that the kernels take: any stride from token to token, the heads of a token side by side."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def forward(q: Tensor, k: Tensor, v: Tensor, plan: list[Tensor], mask: str, scale: float) -> tuple[Tensor, Tensor]:
    (T, H, D), G = q.shape, k.shape[1]
    q, k, v = _rows(q), _rows(k), _rows(v)
    out = q.new_empty(T, H, D)
    lse = q.new_empty(H, T, dtype=torch.float32)
    bias, slots, *of_hopper = plan
    with torch.cuda.device_of(q):
        if hopper.runs(q.device, D, q.dtype):
            hopper.forward(q, k, v, out, lse, slots, *of_hopper, bias, mask, scale)
            return out, lse
        options, _, _ = attention_tiles(q.dtype, D, architecture(q.device))
        forward_block[(len(slots), H)](
            q, k, v, out, lse, slots, bias, T, q.stride(0), k.stride(0), v.stride(0), scale * LOG2_E.value,
            H=H, G=G, D=D, BY_ROW=mask != "column", **options, **FUSION,
        )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: list[Tensor], out: Tensor, lse: Tensor, mask: str, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    (T, H, D), G = q.shape, k.shape[1]
    q, k, v, dout = _rows(q), _rows(k), _rows(v), dout.contiguous()
    dq, dk, dv = q.new_empty(T, H, D), k.new_empty(T, G, D), v.new_empty(T, G, D)
    with torch.cuda.device_of(q):
        if hopper.runs(q.device, D, q.dtype):
            bias, slots, order, closed_bias, _ = plan
            gradients = {"dq": dq, "dk": dk, "dv": dv}
            sums = sums_of_rows(out, dout, lse, slots, bias, mask) | {"closed_bias": closed_bias}
            hopper.backward(q, k, v, dout, gradients, sums, slots, order, bias, mask, scale)
            return dq, dk, dv
        bias, slots = plan[0], plan[-1]
        _, rows, columns = attention_tiles(q.dtype, D, architecture(q.device))
        delta = torch.empty_like(lse)
        strides = T, q.stride(0), k.stride(0), v.stride(0), scale * LOG2_E.value
        shape = {"H": H, "G": G, "D": D, "BY_ROW": mask != "column"}
        dq_block[(len(slots), H)](q, k, v, out, dout, lse, delta, dq, slots, bias, *strides, **shape, **rows, **FUSION)
        dk_dv_block[(len(slots), G)](
            q, k, v, dout, lse, delta, dk, dv, slots, bias, *strides, **shape, **columns, **FUSION
        )
    return dq, dk, dv
