"""The Triton kernels of InfoNCE that go over rows: before, between and after the tiles of similarities in tiles.py.

Each does in one launch what PyTorch does in ten or more, which at batches of a few thousand took as long as the
products. Memory bounds their time. Shapes: N queries, M documents, E width, K dims, J hard negatives of a query; a
query's own candidates are its positive (number 0) and its hard negatives. z, u: as in chunked.py.
"""

import triton
import triton.language as tl

from conan_kernels.info_nce.tiles import LOWEST


@triton.jit
def inverse_root(square):
    """1 / sqrt(square), 0 for 0."""
    return tl.where(square > 0, tl.rsqrt(tl.where(square > 0, square, 1.0)), 0.0)


@triton.jit
def log_plus_one(x):
    """log(1 + x) for x from 0 to 1, to the last digits where x is small (Kahan's form)."""
    above = 1.0 + x
    return tl.where(above == 1.0, x, tl.log(above) * x / tl.where(above == 1.0, 1.0, above - 1.0))


@triton.jit
def logits_of_hard(at, positive, candidates, inside, temperature, absolute, fraction, J):
    """z of hard negatives [rows, candidates], and which of them are candidates: those not above the margin.

    at: pointers to the rows' own similarities; positive: their first.
    """
    there = inside[:, None] & (candidates < J)[None, :]
    similarity = tl.load(at[:, None] + 1 + candidates[None, :], mask=there, other=0.0)
    limit = (positive + absolute + fraction * tl.abs(positive)) / temperature
    z = similarity / temperature
    return z, there & (z <= limit[:, None])


@triton.jit
def prefix_norms(
    vectors, inverse, starts, count, whole, E, K,
    UNIT: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """inverse [K, whole]: 1 / norm of each prefix of a row; 0 for a zero prefix, and for rows from `count` on."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    at = vectors + rows.to(tl.int64)[:, None] * E
    squares = tl.zeros((BM, BE), tl.float32)
    for k in range(K):
        start, end = tl.load(starts + k) * UNIT, tl.load(starts + k + 1) * UNIT
        for first in range(start, end, BE):
            columns = first + tl.arange(0, BE)
            inside = (rows < count)[:, None] & (columns < end)[None, :]
            x = tl.load(at + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            squares += x * x
        tl.store(inverse + k * whole + rows, inverse_root(tl.sum(squares, 1)), mask=rows < whole)


@triton.jit
def own_candidates(
    queries, documents, target, hard, starts, rq, r_hard, similarity_own, positive, of_hard, valid, N, M, E, K, J,
    UNIT: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Cosines of BM pairs of a query and one of its own candidates, similarity_own [K, N, 1+J], and 1 / norms of their
    prefixes: rq [K, N] and r_hard [K, N, J]; the cosines of the last dim also as positive [N] and of_hard [N, J].

    valid [N]: whether target is a row of the documents.
    """
    pair = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    row, candidate = pair // (1 + J), pair % (1 + J)
    inside = row < N
    document = tl.load(target + row, mask=inside, other=0)
    is_positive, is_hard = inside & (candidate == 0), inside & (candidate > 0)
    tl.store(valid + row, (document >= 0) & (document < M), mask=is_positive)
    document = tl.minimum(tl.maximum(document, 0), M - 1)
    of_row = row * J + candidate - 1
    q_rows, d_rows, h_rows = queries + row * E, documents + document * E, hard + of_row * E
    dots, squares, own = tl.zeros((BM, BE), tl.float32), tl.zeros((BM, BE), tl.float32), tl.zeros((BM, BE), tl.float32)
    for k in range(K):
        start, end = tl.load(starts + k) * UNIT, tl.load(starts + k + 1) * UNIT
        for first in range(start, end, BE):
            columns = first + tl.arange(0, BE)[None, :]
            here = columns < end
            q = tl.load(q_rows[:, None] + columns, mask=inside[:, None] & here, other=0.0).to(tl.float32)
            x = tl.load(d_rows[:, None] + columns, mask=is_positive[:, None] & here, other=0.0)
            x += tl.load(h_rows[:, None] + columns, mask=is_hard[:, None] & here, other=0.0)
            x = x.to(tl.float32)
            dots += x * q
            squares += x * x
            own += q * q
        r_query, r = inverse_root(tl.sum(own, 1)), inverse_root(tl.sum(squares, 1))
        similarity = tl.sum(dots, 1) * r * r_query
        tl.store(similarity_own + (k * N) * (1 + J) + pair, similarity, mask=inside)
        tl.store(r_hard + k * N * J + of_row, r, mask=is_hard)
        tl.store(rq + k * N + row, r_query, mask=is_positive)
        if k == K - 1:
            tl.store(positive + row, similarity, mask=is_positive)
            tl.store(of_hard + of_row, similarity, mask=is_hard)


@triton.jit
def gather_tiles(
    tile_lse, tile_best, others, best, tiles, N, K, FIRST: tl.constexpr, BM: tl.constexpr, TILES: tl.constexpr
):
    """Add the log-sum-exps of a panel's tiles, tile_lse [tiles, K, N], to others [K, N], and their largest z of the
    last dim, tile_best [tiles, N], to best [N]. FIRST: nothing is there yet.
    """
    rows, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    inside = rows < N
    top, total = tl.full((BM,), LOWEST, tl.float32), tl.zeros((BM,), tl.float32)
    if not FIRST:
        before = tl.load(others + k * N + rows, mask=inside, other=float("-inf"))
        top = tl.maximum(before, LOWEST)
        total = tl.exp(before - top)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        there = (tile < tiles)[:, None] & inside[None, :]
        x = tl.load(tile_lse + (tile * K + k)[:, None] * N + rows[None, :], mask=there, other=float("-inf"))
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher[None, :]), 0)
        top = higher
    tl.store(others + k * N + rows, top + tl.log(total), mask=inside)
    if k == K - 1:
        highest = tl.full((BM,), float("-inf"), tl.float32)
        if not FIRST:
            highest = tl.load(best + rows, mask=inside)
        for first in range(0, tiles, TILES):
            tile = first + tl.arange(0, TILES)
            there = (tile < tiles)[:, None] & inside[None, :]
            x = tl.load(tile_best + tile[:, None] * N + rows[None, :], mask=there, other=float("-inf"))
            highest = tl.maximum(highest, tl.max(x, 0))
        tl.store(best + rows, highest, mask=inside)


@triton.jit
def finish_rows(
    others, best, similarity_own, temperature, losses, lse, gap, absolute, fraction, N, K, J,
    BM: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The softmax over all that a query sees: the documents of `others` and its own candidates.

    gap [K, N]: log-sum-exp of the negatives less the positive; losses [K+1, N]: softplus(gap), never below 0 and with
    its digits where the negatives hardly count, then 1 where the positive wins; lse [K, N]: of all.
    """
    rows, candidates = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, C)
    inside, T = rows < N, tl.load(temperature)
    for k in range(K):
        at = similarity_own + (k * N + rows).to(tl.int64) * (1 + J)
        similarity = tl.load(at, mask=inside, other=0.0)
        z, counts = logits_of_hard(at, similarity, candidates, inside, T, absolute, fraction, J)
        z = tl.where(counts, z, float("-inf"))
        positive = similarity / T
        documents = tl.load(others + k * N + rows, mask=inside, other=float("-inf"))
        highest = tl.max(z, 1)
        top = tl.maximum(tl.maximum(documents, highest), LOWEST)
        total = tl.exp(documents - top) + tl.sum(tl.exp(z - top[:, None]), 1)
        beyond = top + tl.log(total) - positive
        loss = tl.maximum(beyond, 0.0) + log_plus_one(tl.exp(-tl.abs(beyond)))
        tl.store(gap + k * N + rows, beyond, mask=inside)
        tl.store(losses + k * N + rows, loss, mask=inside)
        tl.store(lse + k * N + rows, positive + loss, mask=inside)
        if k == K - 1:
            wins = positive > tl.maximum(tl.load(best + rows, mask=inside, other=0.0), highest)
            tl.store(losses + K * N + rows, wins.to(tl.float32), mask=inside)


@triton.jit
def own_gradients(
    similarity_own, r_hard, rq, lse, gap, share, temperature, dpositive, u_positive, uz, weighted_hard, radial_hard,
    absolute, fraction, N, K, J,
    BM: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """What the gradients need of a query's own candidates: u_positive [K, N], and of the hard negatives uz [K, N], the
    sum of u z, and [K, N, J] sums over the dims k >= b: of u rq r / T (weighted_hard) and of u z r^2 (radial_hard).

    share [K]: dloss / dloss_k / N. dpositive [K, N] is added to u of the positive, or None.
    """
    rows, candidates = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, C)
    inside, T = rows < N, tl.load(temperature)
    weighted, radial = tl.zeros((BM, C), tl.float32), tl.zeros((BM, C), tl.float32)
    for step in range(K):
        k = K - 1 - step
        here = k * N + rows
        scale = tl.load(share + k)
        at = similarity_own + here.to(tl.int64) * (1 + J)
        similarity = tl.load(at, mask=inside, other=0.0)
        z, counts = logits_of_hard(at, similarity, candidates, inside, T, absolute, fraction, J)
        of_positive = -scale / (1.0 + tl.exp(-tl.load(gap + here, mask=inside, other=0.0)))
        if dpositive is not None:
            of_positive += tl.load(dpositive + here, mask=inside, other=0.0)
        tl.store(u_positive + here, of_positive, mask=inside)
        log_sum = tl.load(lse + here, mask=inside, other=0.0)
        u = tl.where(counts, tl.exp(z - log_sum[:, None]) * scale, 0.0)
        tl.store(uz + here, tl.sum(u * z, 1), mask=inside)
        there = inside[:, None] & (candidates < J)[None, :]
        own = here.to(tl.int64)[:, None] * J + candidates[None, :]
        r = tl.load(r_hard + own, mask=there, other=0.0)
        weighted += u * tl.load(rq + here, mask=inside, other=0.0)[:, None] * r / T
        radial += u * z * r * r
        tl.store(weighted_hard + own, weighted, mask=there)
        tl.store(radial_hard + own, radial, mask=there)


@triton.jit
def sum_tiles(total, parts, tiles, count, whole, stride, K, BM: tl.constexpr, TILES: tl.constexpr):
    """total [K, count], rows `stride` apart, += the sum of parts [tiles, K, whole] over the tiles."""
    rows, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    sums = tl.zeros((BM,), tl.float32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        there = (tile < tiles)[:, None] & (rows < count)[None, :]
        sums += tl.sum(tl.load(parts + (tile * K + k)[:, None] * whole + rows[None, :], mask=there, other=0.0), 0)
    place = total + k * stride + rows
    tl.store(place, tl.load(place, mask=rows < count) + sums, mask=rows < count)


@triton.jit
def finish_gradient(
    out, total, vectors, inverse, uz, tiles, hard, dhard, weighted_hard, radial_hard, first, count, E, K, J, N, whole,
    column_tiles,
    UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out [count, E]: total, less what is along the vectors, plus what comes by their hard negatives; also dhard.

    total [count, E], fp32: what add_product added up. vectors [N, E], with inverse norms [K, whole] and uz [K, N]: row
    0 of out is row `first` of them. hard, dhard [N, J, E], or None; weighted_hard, radial_hard as own_gradients gives
    them. tiles: as add_product takes them.
    """
    row_tile, tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    block = tl.load(tiles + tile * 3)
    start, end = tl.load(tiles + tile * 3 + 1) * UNIT, tl.load(tiles + tile * 3 + 2) * UNIT
    rows = row_tile * BM + tl.arange(0, BM)
    inside = rows < count
    columns = start + tl.arange(0, BN)
    there = inside[:, None] & (columns < end)[None, :]
    radial = tl.zeros((BM,), tl.float32)
    for k in range(block, K):
        r = tl.load(inverse + k * whole + first + rows, mask=inside, other=0.0)
        radial += tl.load(uz + k * N + first + rows, mask=inside, other=0.0) * r * r
    own = (first + rows).to(tl.int64)
    x = tl.load(vectors + own[:, None] * E + columns[None, :], mask=there, other=0.0).to(tl.float32)
    here = rows.to(tl.int64)[:, None] * E + columns[None, :]
    gradient = tl.load(total + here, mask=there, other=0.0) - radial[:, None] * x
    if hard is not None:
        for j in range(J):
            candidate = own * J + j
            at = candidate[:, None] * E + columns[None, :]
            factors = block.to(tl.int64) * N * J + candidate
            h = tl.load(hard + at, mask=there, other=0.0).to(tl.float32)
            w = tl.load(weighted_hard + factors, mask=inside, other=0.0)[:, None]
            along = tl.load(radial_hard + factors, mask=inside, other=0.0)[:, None]
            gradient += w * h
            tl.store(dhard + at, (w * x - along * h).to(dhard.dtype.element_ty), mask=there)
    tl.store(out + here, gradient.to(out.dtype.element_ty), mask=there)
