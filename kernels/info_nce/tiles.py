"""The Triton kernels of InfoNCE: tiles of similarities for all Matryoshka dims at once. launch.py has the math.

Shapes: N queries, M documents, E width, K dims; z, u, W as there.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e20)  # the initial maximum of a row, so that -inf - LOWEST is -inf and not NaN
LOG2E = tl.constexpr(1.4426950408889634)  # the hardware's exponential has base 2


@triton.jit
def _add_block(dot, q_rows, d_rows, start, end, EVEN: tl.constexpr, PRECISION: tl.constexpr, BE: tl.constexpr):
    """dot [BM, BN] += q[:, start:end] @ d[:, start:end].T; q_rows [BM, 1] and d_rows [1, BN] point at column 0."""
    for first in range(start, end, BE):
        columns = first + tl.arange(0, BE)
        if EVEN:  # every block is a multiple of BE wide
            q = tl.load(q_rows + columns[None, :])
            d = tl.load(d_rows + columns[:, None])
        else:
            q = tl.load(q_rows + columns[None, :], mask=columns[None, :] < end, other=0.0)
            d = tl.load(d_rows + columns[:, None], mask=columns[:, None] < end, other=0.0)
        dot = tl.dot(q, d, dot, input_precision=PRECISION)
    return dot


@triton.jit
def _opaque_zero(starts):
    """0, which the compiler cannot know.

    What is added to it is computed where it is used, not once before the loop over dims, where it would occupy
    registers during the matrix products (measured: 7 to 17 of them spilled on sm_90).
    """
    return tl.load(starts, volatile=True)


@triton.jit
def _split(x, PIECES: tl.constexpr):
    """[BM, BN] -> a tuple of PIECES [BM, BN / PIECES], left to right."""
    if PIECES == 1:
        return (x,)
    else:
        left, right = x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()
        return _split(left, PIECES // 2) + _split(right, PIECES // 2)


@triton.jit
def _similarities(dot, k, row, columns, positive, rq, rd, per_T, limits, query_group, document_group, N, M, whole_M):
    """For some columns of a tile: z = dot * per_row * per_column and its factors, which columns are candidates, and
    where the positive is.

    A candidate is not beyond M, not of the query's own group, and not above the margin. rd [K, whole_M] and
    document_group [whole_M] are padded to whole tiles: addresses without a bound are one register and constants, where
    each bounded one would occupy a register during the matrix product.
    """
    per_row = tl.load(rq + k * N + row) * per_T
    per_column = tl.load(rd + k * whole_M + columns)
    z = dot * per_row[:, None] * per_column[None, :]
    counts = (columns < M)[None, :]
    if query_group is not None:
        counts = counts & (tl.load(query_group + row)[:, None] != tl.load(document_group + columns)[None, :])
    if limits is not None:
        counts = counts & (z <= tl.load(limits + k * N + row)[:, None])
    return z, per_row, per_column, counts, positive[:, None] == columns[None, :]


@triton.jit
def _without_known(x, nothing, row, columns, document_group, known_first, known_last, known_ids):
    """x [BM, columns], with `nothing` where a document is known to be right for the row's query.

    One pass over the tile for each id, as many as the row with the most ids has, so that only x stays in registers:
    most batches have hardly any.
    """
    if known_ids is not None:
        first, last = tl.load(known_first + row), tl.load(known_last + row)
        document = tl.load(document_group + columns)
        for step in range(tl.max(last - first)):
            known = tl.load(known_ids + first + step, mask=first + step < last, other=-2)
            x = tl.where(known[:, None] == document[None, :], nothing, x)
    return x


@triton.jit
def forward_tile(
    queries, documents, target, rq, rd, temperature, limits, query_group, document_group, known_first, known_last,
    known_ids, starts, lse, best, columns_lse,
    first_column, N, M, whole_M, E, K, column_tiles,
    UNIT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """lse [column tile, K dims, N]: log-sum-exp over the tile's documents without the positive.

    best [column tile, N]: the largest z of the last dim. limits [K, N] in units of z, or None. columns_lse [row tile,
    K, column tiles * BN]: the same over the tile's queries, or None.

    Column tiles of one row tile run at about the same time: together, the programs in flight read a panel of documents
    from the L2 cache, and few queries. Rows and columns beyond the end repeat the last one and are left out afterwards.
    """
    row_tile, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    rows = row_tile * BM + tl.arange(0, BM)
    row = tl.minimum(rows, N - 1)
    columns = tl.minimum(first_column + column_tile * BN + tl.arange(0, BN), M - 1)
    q_rows = queries + row.to(tl.int64)[:, None] * E
    d_rows = documents + columns.to(tl.int64)[None, :] * E
    positive = tl.load(target + row).to(tl.int32)
    per_T = 1.0 / tl.load(temperature)
    dot = tl.zeros((BM, BN), tl.float32)
    for k in range(K):
        # the product tells Triton the alignment
        start, end = tl.load(starts + k) * UNIT, tl.load(starts + k + 1) * UNIT
        dot = _add_block(dot, q_rows, d_rows, start, end, EVEN, PRECISION, BE)
        pieces = _split(dot, PIECES)
        top = tl.full((BM,), LOWEST, tl.float32)
        total = tl.zeros((BM,), tl.float32)
        for p in tl.static_range(PIECES):
            place = _opaque_zero(starts) + column_tile * BN + p * (BN // PIECES) + tl.arange(0, BN // PIECES)
            z, _, _, counts, is_positive = _similarities(
                pieces[p],
                k,
                row,
                first_column + place,
                positive,
                rq,
                rd,
                per_T,
                limits,
                query_group,
                document_group,
                N,
                M,
                whole_M,
            )
            z = tl.where(counts & (is_positive == 0), z, float("-inf"))
            z = _without_known(
                z, float("-inf"), row, first_column + place, document_group, known_first, known_last, known_ids
            )
            if columns_lse is not None:
                in_columns = tl.where((rows < N)[:, None], z, float("-inf"))
                highest = tl.maximum(tl.max(in_columns, axis=0), LOWEST)
                sum_of_column = tl.sum(tl.exp2((in_columns - highest[None, :]) * LOG2E), axis=0)
                tl.store(
                    columns_lse + (row_tile * K + k) * column_tiles * BN + place,
                    highest + tl.log2(sum_of_column) / LOG2E,
                )
            higher = tl.maximum(top, tl.max(z, axis=1))
            total = total * tl.exp2((top - higher) * LOG2E) + tl.sum(tl.exp2((z - higher[:, None]) * LOG2E), axis=1)
            top = higher
        tl.store(lse + (column_tile * K + k) * N + rows, top + tl.log2(total) / LOG2E, mask=rows < N)
        if k == K - 1:
            tl.store(best + column_tile * N + rows, top, mask=rows < N)


@triton.jit
def weight_tile(
    queries, documents, target, rq, rd, temperature, limits, query_group, document_group, known_first, known_last,
    known_ids, starts,
    lse, share, u_positive, columns_lse, dcolumns, weighted, uz_rows, uz_columns,
    first_row, first_column, N, M, whole_M, E, K, R, C, column_tiles,
    UNIT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """weighted [K, R, C]: W_b for every block b of a panel of R rows x C columns (whole tiles), zero beyond N and M.

    uz_rows [column tile, K, R] and uz_columns [row tile, K, C]: sums of u * z over the tile. lse, u_positive [K, N]:
    the rows' log-sum-exp, and u of the positive. share [K]: dloss / dloss_k / N. columns_lse, dcolumns [K, whole_M]:
    the columns' log-sum-exp and the gradient with respect to it, or None.
    """
    row_tile, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    rows = row_tile * BM + tl.arange(0, BM)  # positions within the panel, as `place` is
    row = tl.minimum(first_row + rows, N - 1)
    columns = tl.minimum(first_column + column_tile * BN + tl.arange(0, BN), M - 1)
    q_rows = queries + row.to(tl.int64)[:, None] * E
    d_rows = documents + columns.to(tl.int64)[None, :] * E
    positive = tl.load(target + row).to(tl.int32)
    per_T = 1.0 / tl.load(temperature)
    dot = tl.zeros((BM, BN), tl.float32)
    for k in range(K):
        start, end = tl.load(starts + k) * UNIT, tl.load(starts + k + 1) * UNIT
        dot = _add_block(dot, q_rows, d_rows, start, end, EVEN, PRECISION, BE)
        zero = _opaque_zero(starts)
        pieces = _split(dot, PIECES)
        uz_row = tl.zeros((BM,), tl.float32)
        inside = first_row + rows < N
        scale = tl.where(inside, tl.load(share + k), 0.0)
        u_of_positive = tl.where(inside, tl.load(u_positive + k * N + row), 0.0)
        lse_row = tl.load(lse + k * N + row)
        for p in tl.static_range(PIECES):
            place = zero + column_tile * BN + p * (BN // PIECES) + tl.arange(0, BN // PIECES)
            z, per_row, per_column, counts, is_positive = _similarities(
                pieces[p],
                k,
                row,
                first_column + place,
                positive,
                rq,
                rd,
                per_T,
                limits,
                query_group,
                document_group,
                N,
                M,
                whole_M,
            )
            u = tl.exp2(tl.where(counts, z - lse_row[:, None], float("-inf")) * LOG2E) * scale[:, None]
            if columns_lse is not None:
                lse_column = tl.load(columns_lse + k * whole_M + first_column + place)
                of_column = tl.load(dcolumns + k * whole_M + first_column + place)
                u += (
                    tl.exp2(tl.where(counts & inside[:, None], z - lse_column[None, :], float("-inf")) * LOG2E)
                    * of_column[None, :]
                )
            u = _without_known(u, 0.0, row, first_column + place, document_group, known_first, known_last, known_ids)
            u = tl.where(is_positive, u_of_positive[:, None], u)
            uz = u * z
            uz_row += tl.sum(uz, axis=1)
            tl.store(uz_columns + (row_tile * K + k) * C + place, tl.sum(uz, axis=0))
            # at most 7 dims x 4,096 x 4,096: 32 bits hold the offsets
            here = weighted + ((k * R + rows) * C)[:, None] + place[None, :]
            tl.store(here, (u * per_row[:, None] * per_column[None, :]).to(weighted.dtype.element_ty))
        tl.store(uz_rows + (column_tile * K + k) * R + rows, uz_row)
    if K > 1:  # G of all dims is still in the cache: a tile of 128 x 128 with 7 dims is 229 KB in bf16
        tl.debug_barrier()
        for p in tl.static_range(PIECES):
            place = column_tile * BN + p * (BN // PIECES) + tl.arange(0, BN // PIECES)
            total = tl.zeros((BM, BN // PIECES), tl.float32)
            for step in range(K):
                here = weighted + (((K - 1 - step) * R + rows) * C)[:, None] + place[None, :]
                total += tl.load(here).to(tl.float32)
                tl.store(here, total.to(weighted.dtype.element_ty))


@triton.jit
def add_product(
    total, weighted, vectors, tiles, first, rows_count, inner_count, last, E, stride_k, stride_row, stride_inner,
    column_tiles,
    UNIT: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """total [rows_count, E], fp32, += W_b @ vectors[first : first + inner_count], with its own W for each block b of
    columns. FIRST: total = that, whatever it held.

    tiles [column_tiles, 3]: block, first column / UNIT, end of block / UNIT. W is zero for inner rows beyond
    inner_count.
    """
    row_tile, tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    block = tl.load(tiles + tile * 3).to(tl.int64)
    start, end = tl.load(tiles + tile * 3 + 1) * UNIT, tl.load(tiles + tile * 3 + 2) * UNIT
    rows = row_tile * BM + tl.arange(0, BM)
    columns = start + tl.arange(0, BN)
    in_block = (columns < end)[None, :]
    w_rows = weighted + block * stride_k + rows.to(tl.int64)[:, None] * stride_row
    product = tl.zeros((BM, BN), tl.float32)
    for inner in range(0, inner_count, BK):
        offsets = inner + tl.arange(0, BK)
        w = tl.load(w_rows + offsets.to(tl.int64)[None, :] * stride_inner)
        x_rows = vectors + tl.minimum(first + offsets, last).to(tl.int64)[:, None] * E
        x = tl.load(x_rows + columns[None, :], mask=in_block, other=0.0)
        product = tl.dot(w, x.to(w.dtype), product, input_precision=PRECISION)
    pieces = _split(product, PIECES)
    for p in tl.static_range(PIECES):
        columns = start + p * (BN // PIECES) + tl.arange(0, BN // PIECES)
        place = total + rows.to(tl.int64)[:, None] * E + columns[None, :]
        inside = (rows < rows_count)[:, None] & (columns < end)[None, :]
        part = pieces[p]
        if not FIRST:
            part += tl.load(place, mask=inside)
        tl.store(place, part, mask=inside)
