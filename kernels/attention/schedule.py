"""What the persistent kernel for Hopper (hopper.py) needs beside the plan: an order of its slots, and the bias in
pieces that a matrix product can add.
"""

import triton
import triton.language as tl

from conan_kernels.attention.tiles import load_slot, query_tiles

BLOCK = 128  # rows of a block, columns of a tile
STAGES = 2  # tiles of keys in shared memory, and tiles of values
LIMIT = 1 << 30  # where every sequence ends for TMA
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
def split_bias(bias, plan, pieces, scale, BLOCK: tl.constexpr, BY_ROW: tl.constexpr):
    """pieces [slots * BLOCK, 16]: three numbers of the inputs' dtype whose sum is bias / scale, then zeros.

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
    left = tl.zeros((BLOCK,), tl.float32)
    if not BY_ROW:
        left = tl.load(bias + start + columns, mask=columns < length, other=0.0) / scale
    dtype = pieces.dtype.element_ty
    first_piece = left.to(dtype)
    second_piece = (left - first_piece.to(tl.float32)).to(dtype)
    third_piece = (left - first_piece.to(tl.float32) - second_piece.to(tl.float32)).to(dtype)
    first_piece = tl.where(columns < length, first_piece.to(tl.float32), float("-inf")).to(dtype)
    piece = tl.arange(0, PIECES)[None, :]
    tile = tl.where(piece == 1, second_piece[:, None], tl.where(piece == 2, third_piece[:, None], 0.0))
    tile = tl.where(piece == 0, first_piece[:, None], tile)
    # a sequence's first block has its last slot: tile n of a sequence begins at BLOCK * (its first slot + n)
    row = (tl.program_id(0) - (tl.cdiv(length, BLOCK) - 1 - first // BLOCK) + first // BLOCK).to(tl.int64) * BLOCK
    tl.store(pieces + (row + tl.arange(0, BLOCK))[:, None] * PIECES + piece, tile.to(dtype))
