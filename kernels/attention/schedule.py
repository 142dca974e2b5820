"""What the kernels for Hopper need beside the plan, in plain Triton: an order of its slots; the bias of each column in
blocks of whole tiles, and in pieces that a matrix product can add; for the backward kernels what the weights need of
each row.
"""

import triton
import triton.language as tl

from conan_kernels.attention.tiles import LOG2_E, load_slot, query_tiles

ROWS: tl.constexpr = tl.constexpr(128)  # slots that a program of order_slots places
CHUNK: tl.constexpr = tl.constexpr(256)  # slots that it compares them with at a time
PIECES: tl.constexpr = tl.constexpr(16)  # columns of the pieces: the fewest that a matrix product takes


@triton.jit
def tiles_of_slots(plan, slots, count, BLOCK: tl.constexpr, BY_ROW: tl.constexpr):
    """How many tiles each slot's rows visit; 0 for slots without work and those from `count` on."""
    inside = slots < count
    length = tl.load(plan + slots * 4 + 1, mask=inside, other=0)
    first_row = tl.load(plan + slots * 4 + 2, mask=inside, other=0)
    ones = tl.load(plan + slots * 4 + 3, mask=inside, other=0)
    _, _, future = query_tiles(first_row, length, ones, BLOCK, BLOCK, BY_ROW)
    return tl.where(length > 0, tl.cdiv(future, BLOCK), 0)


@triton.jit(do_not_specialize=["count"])
def order_slots(plan, order, count, BLOCK: tl.constexpr, BY_ROW: tl.constexpr):
    """order[0]: how many of the plan's `count` slots have work. order[1:]: the slots, those with most tiles first.

    A slot's place is the number of those that come before it: nothing is sorted, and nothing depends on which program
    is first.
    """
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tiles = tiles_of_slots(plan, own, count, BLOCK, BY_ROW)
    place, working = tl.zeros((ROWS,), tl.int32), 0
    for first in range(0, count, CHUNK):
        others = first + tl.arange(0, CHUNK)
        of_others = tiles_of_slots(plan, others, count, BLOCK, BY_ROW)
        longer = of_others[None, :] > tiles[:, None]
        before = longer | ((of_others[None, :] == tiles[:, None]) & (others[None, :] < own[:, None]))
        place += tl.sum((before & (others < count)[None, :]).to(tl.int32), 1)
        working += tl.sum((of_others > 0).to(tl.int32), 0)
    tl.store(order + 1 + place, own, mask=own < count)
    if tl.program_id(0) == 0:
        tl.store(order, working)


@triton.jit
def padded_row(slot, length, first, BLOCK: tl.constexpr):
    """Where a sequence's rows begin if each slot has BLOCK of them. Its first block has its last slot."""
    return (slot - (tl.cdiv(length, BLOCK) - 1 - first // BLOCK)) * BLOCK


@triton.jit
def split_bias(bias, plan, pieces, closed_bias, scale, BLOCK: tl.constexpr, BY_ROW: tl.constexpr):
    """closed_bias [slots * BLOCK]: the bias of a column (BY_ROW: 0), -inf past the end. pieces [slots * BLOCK, 16]:
    three numbers of the inputs' dtype whose sum is bias / scale, then zeros.

    A slot's rows hold the columns of its own block, so that those past the end of a sequence have a place too: -inf.
    Where the bias is one number a row (BY_ROW), the rest are zeros.

    Each piece is the nearest number to what is left. A bf16 has 8 significant bits, so what is left shrinks to 2^-9 of
    itself each time, after three to 2^-27: less than half the last of fp32's 24 bits.
    """
    slot = plan + tl.program_id(0) * 4
    start, length, first, _ = load_slot(slot)
    if length == 0:
        return
    columns = first + tl.arange(0, BLOCK)
    column_bias = tl.zeros((BLOCK,), tl.float32)
    if not BY_ROW:
        column_bias = tl.load(bias + start + columns, mask=columns < length, other=0.0)
    left = column_bias / scale
    dtype = pieces.dtype.element_ty
    first_piece = left.to(dtype)
    second_piece = (left - first_piece.to(tl.float32)).to(dtype)
    third_piece = (left - first_piece.to(tl.float32) - second_piece.to(tl.float32)).to(dtype)
    first_piece = tl.where(columns < length, first_piece.to(tl.float32), float("-inf")).to(dtype)
    piece = tl.arange(0, PIECES)[None, :]
    tile = tl.where(piece == 1, second_piece[:, None], tl.where(piece == 2, third_piece[:, None], 0.0))
    tile = tl.where(piece == 0, first_piece[:, None], tile)
    row = (padded_row(tl.program_id(0), length, first, BLOCK) + first).to(tl.int64) + tl.arange(0, BLOCK)
    tl.store(pieces + row[:, None] * PIECES + piece, tile.to(dtype))
    tl.store(closed_bias + row, tl.where(columns < length, column_bias, float("-inf")))


@triton.jit(do_not_specialize=["T", "padded_rows"])
def row_sums(
    out, dout, lse, bias, plan, log_sums, future_log_sums, deltas, T, padded_rows,
    H: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """What the backward kernels need of the rows of a slot, in blocks of whole tiles [H, slots * BLOCK].

    log_sums: lse in log2, inf past the end; future_log_sums: less the bias of the future of a row (BY_ROW); deltas:
    sum_d out * dout.
    """
    slot, head = plan + tl.program_id(0) * 4, tl.program_id(1)
    start, length, first, _ = load_slot(slot)
    if length == 0:
        return
    rows = first + tl.arange(0, BLOCK)
    inside = rows < length
    padded = padded_row(tl.program_id(0), length, first, BLOCK) + first + tl.arange(0, BLOCK)
    log_sum = tl.load(lse + head.to(tl.int64) * T + start + rows, mask=inside, other=float("inf")) * LOG2_E
    columns = tl.arange(0, W)[None, :]
    at = (start + rows)[:, None] * (H * D) + head * D + columns
    of_block = inside[:, None] & (columns < D)
    results = tl.load(out + at, mask=of_block, other=0.0).to(tl.float32)
    delta = tl.sum(results * tl.load(dout + at, mask=of_block, other=0.0).to(tl.float32), 1)
    own = head.to(tl.int64) * padded_rows + padded
    tl.store(log_sums + own, log_sum)
    tl.store(deltas + own, delta)
    if BY_ROW:
        row_bias = tl.load(bias + start + rows, mask=inside, other=0.0)
        tl.store(future_log_sums + own, log_sum - row_bias)
