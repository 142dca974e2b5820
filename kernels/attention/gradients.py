"""The backward Triton kernels of soft-masked attention; tiles.py has the kinds of tiles and what both share.

Two kernels, one for dq and one for dk and dv, so that every sum has one owner: no atomics, the same bits on every run.
The weights of a tile are computed again from its logits and the saved log-sum-exp.
"""

import triton
import triton.language as tl

from conan_kernels.attention.tiles import (
    FUTURE,
    LOG2_E,
    MIXED,
    PLAIN,
    add_product,
    inner_products,
    load,
    load_slot,
    query_bias,
    query_tiles,
    store,
    times,
    zeros,
)


@triton.jit
def first_row_again(slot):
    """A slot's first row, loaded again for the stores at the end of a program.

    Otherwise the compiler reuses the addresses from the beginning and keeps their parts in registers through all loops
    (sm_120, D = 112: dq_block spilled 14 registers, dk_dv_block 16).
    """
    return tl.load(slot + 2, volatile=True)


@triton.jit
def add_dq(
    dq, q, dout, k, v, bias, rows, lse, delta, begin, end, length, stride_k, stride_v, scale,
    KIND: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    if begin < end:  # as in tiles.attend
        for first in tl.range(begin, end, BN):
            keys = load(k, first, length, stride_k, BN, D, W, KIND != PLAIN)
            s = inner_products(q, keys)  # [BM, BN]
            if KIND == PLAIN:
                p = tl.exp2(tl.fma(s, scale, -lse[:, None]))
            else:
                p = tl.exp2(tl.fma(s, scale, query_bias(bias, rows, first, length, KIND, BN, BY_ROW)) - lse[:, None])
            dp = inner_products(dout, load(v, first, length, stride_v, BN, D, W, KIND != PLAIN))
            dq = add_product(dq, p * (dp - delta[:, None]), keys)
    return dq


@triton.jit(do_not_specialize=["T"])
def dq_block(
    q, k, v, out, dout, lse, delta, dq, plan, bias, T, stride_q, stride_k, stride_v, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BY_ROW: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """dq of BM rows of one sequence and head, and for the other kernel delta = sum_d out * dout of these rows."""
    slot, head = plan + tl.program_id(0) * 4, tl.program_id(1)
    start, length, first_row, ones = load_slot(slot)
    if length == 0:
        return
    group = head // (H // G)
    k += start * stride_k + group * D
    v += start * stride_v + group * D
    bias += start
    own = start * (H * D) + head * D
    rows = first_row + tl.arange(0, BM)
    inside = rows < length
    queries = load(q + start * stride_q + head * D, first_row, length, stride_q, BM, D, W, True)  # [BM, D]
    outs = load(out + own, first_row, length, H * D, BM, D, W, True)
    douts = load(dout + own, first_row, length, H * D, BM, D, W, True)
    sums = tl.zeros((BM,), tl.float32)
    for part in tl.static_range(len(outs)):
        sums += tl.sum(outs[part].to(tl.float32) * douts[part].to(tl.float32), 1)
    of_head = head.to(tl.int64) * T + start
    tl.store(delta + of_head + rows, sums, mask=inside)
    log_sum = tl.load(lse + of_head + rows, mask=inside, other=float("inf")) * LOG2_E
    plain, mixed, future = query_tiles(first_row, length, ones, BM, BN, BY_ROW)

    tile = queries, douts, k, v, bias, rows, log_sum, sums
    fixed = length, stride_k, stride_v, scale
    total = add_dq(zeros(BM, W), *tile, 0, plain, *fixed, PLAIN, BN, D, W, BY_ROW)
    total = add_dq(total, *tile, plain, mixed, *fixed, MIXED, BN, D, W, BY_ROW)
    total = add_dq(total, *tile, mixed, future, *fixed, FUTURE, BN, D, W, BY_ROW)
    store(dq + own, times(total, scale / LOG2_E), first_row_again(slot), length, H * D, BM, D)


@triton.jit
def add_dk_dv(
    dk, dv, k, v, q, dout, lse, delta, bias, column_bias, columns, begin, end, length, T, stride_q, stride_dout, scale,
    KIND: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv over the rows from `begin` to `end` of each of HEADS heads.

    Rows past the end have lse = inf, hence weight 0. Everything is transposed, [BN, BM], so that the products read the
    weights from registers. Heads and rows are one loop: a loop within a loop would fill and drain its pipeline once per
    head.
    """
    if begin < end:  # as in tiles.attend
        tiles = tl.cdiv(end - begin, BM)
        for step in tl.range(0, tiles * HEADS):
            head = step // tiles
            first = begin + (step - head * tiles) * BM
            of_head = tl.cast(head, tl.int64) * T
            rows = first + tl.arange(0, BM)
            inside = rows < length
            queries = load(q + head * D, first, length, stride_q, BM, D, W, True)
            douts = load(dout + head * D, first, length, stride_dout, BM, D, W, True)
            log_sum = tl.load(lse + of_head + rows, mask=inside, other=float("inf"))[None, :] * LOG2_E
            s = inner_products(k, queries)  # [BN, BM]
            if KIND == PLAIN:
                p = tl.exp2(tl.fma(s, scale, -log_sum))
            else:
                tile = tl.load(bias + rows, mask=inside, other=0.0)[None, :] if BY_ROW else column_bias
                if KIND == MIXED:
                    tile = tl.where(columns[:, None] <= rows[None, :], 0.0, tile)
                p = tl.exp2(tl.fma(s, scale, tile) - log_sum)
            dv = add_product(dv, p, douts)
            dp = inner_products(v, douts)  # [BN, BM]
            dk = add_product(dk, p * (dp - tl.load(delta + of_head + rows, mask=inside, other=0.0)[None, :]), queries)
    return dk, dv


@triton.jit(do_not_specialize=["T"])
def dk_dv_block(
    q, k, v, dout, lse, delta, dk, dv, plan, bias, T, stride_q, stride_k, stride_v, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BY_ROW: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN columns of one sequence and KV head, over all query heads that share it."""
    slot, group = plan + tl.program_id(0) * 4, tl.program_id(1)
    start, length, from_end, ones = load_slot(slot)
    if length == 0:
        return
    # the first columns have the most rows: they start first
    first_column = (tl.cdiv(length, BN) - 1) * BN - from_end
    last_column = tl.minimum(first_column + BN, length)
    columns = first_column + tl.arange(0, BN)
    bias += start
    column_bias = 0.0
    if not BY_ROW:
        column_bias = tl.load(bias + columns, mask=columns < length, other=0.0)[:, None]
    keys = load(k + start * stride_k + group * D, first_column, length, stride_k, BN, D, W, True)  # [BN, D]
    values = load(v + start * stride_v + group * D, first_column, length, stride_v, BN, D, W, True)

    # Tiles of rows: FUTURE from `skip` to `future`, MIXED to `mixed`, PLAIN to the end.
    future = first_column // BM * BM
    mixed = tl.cdiv(last_column - 1, BM) * BM
    all_ones = ones >= (length if BY_ROW else last_column)
    future, mixed = tl.where(all_ones, 0, future), tl.where(all_ones, 0, mixed)
    skip = tl.where(ones >= 0, 0, future)

    heads: tl.constexpr = H // G
    of_head = tl.cast(group * heads, tl.int64) * T + start
    q += start * stride_q + group * (heads * D)
    dout += start * (H * D) + group * (heads * D)
    tile = keys, values, q, dout, lse + of_head, delta + of_head, bias, column_bias, columns
    fixed = length, T, stride_q, H * D, scale
    sums, value_sums = zeros(BN, W), zeros(BN, W)
    sums, value_sums = add_dk_dv(sums, value_sums, *tile, mixed, length, *fixed, PLAIN, BM, D, W, heads, BY_ROW)
    sums, value_sums = add_dk_dv(sums, value_sums, *tile, future, mixed, *fixed, MIXED, BM, D, W, heads, BY_ROW)
    sums, value_sums = add_dk_dv(sums, value_sums, *tile, skip, future, *fixed, FUTURE, BM, D, W, heads, BY_ROW)
    own = start * (G * D) + group * D
    first_column = (tl.cdiv(length, BN) - 1) * BN - first_row_again(slot)
    store(dk + own, times(sums, scale / LOG2_E), first_column, length, G * D, BN, D)
    store(dv + own, value_sums, first_column, length, G * D, BN, D)
