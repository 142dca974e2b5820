"""InfoNCE on CUDA: similarities of all Matryoshka dims in one pass, without the N x M matrix.

The math is that of chunked.py, with the same dot, z and u. What differs is where it is kept:

    forward   A program owns a tile of queries x documents. It walks the columns once. Where a dim ends, the running
              dot product is that dim's, and the tile's log-sum-exp of z goes to memory: a number per row, tile and dim.
    backward  A panel of 4,096 queries x 4,096 documents is walked again in the same way. Where a dim k ends,
              G_k = u_k rq_k rd_k / T goes to memory, then the sums W_b = sum_{k>=b} G_k over it. With W of the panel,
              dq[block b] += W_b @ d[block b] and dd[block b] += W_b.T @ q[block b], accumulated in fp32.

What goes over rows alone, before, between and after the tiles, is in rows.py: a launch each, so that a batch of a few
thousand takes no longer to launch than to compute.

So there are four matrix products of N x M x E for any number of dims: the similarities twice, and two gradients. A
panel of documents at E = 3,584 in bf16 is 29 MB and stays in the L2 cache (50 MB on an H100 or H200) while its tiles
are computed. With `symmetric`, the forward tiles also give the log-sum-exp of their columns, and the backward tiles add
to u what these contribute (chunked.py), without another product. Nothing is atomic, so the same inputs give the same
bits.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
import triton

from conan_kernels import products
from conan_kernels.architecture import FUSION, architecture, product_options, similarity_tiles
from conan_kernels.info_nce.chunked import LOWEST
from conan_kernels.info_nce.operands import INPUTS, SETTINGS, blocks_of, empty_results, schema
from conan_kernels.info_nce.own import margin_limits
from conan_kernels.info_nce.rows import (
    finish_gradient,
    finish_rows,
    gather_tiles,
    own_candidates,
    own_gradients,
    prefix_norms,
    sum_tiles,
)
from conan_kernels.info_nce.tiles import add_product, forward_tile, weight_tile

if TYPE_CHECKING:
    from torch import Tensor


PANEL = 4096  # W of a panel at 7 dims: 235 MB in bf16
WHOLE = 256  # what lies along the documents is padded to a multiple of the widest tile
# launch options of the kernels in rows.py, where they do not depend on the shape
VECTORS = {"BM": 16, "BE": 128}
GATHER = {"BM": 64, "TILES": 16}
FINISH = {"BM": 32, "BN": 128}


class _Blocks:
    """The Matryoshka blocks as the kernels read them.

    unit: the largest power of two up to 64 that divides every dim, which tells Triton the alignment of addresses.
    """

    def __init__(self, dims, weights, device):
        self.slices, self.unit = blocks_of(dims), math.gcd(64, *dims)
        self.starts = torch.tensor([0, *dims], dtype=torch.int32, device=device) // self.unit
        self.weights = torch.tensor(weights, dtype=torch.float32, device=device)
        self.tiles_by_width = {}

    def tiles(self, width):
        """int32 [tiles, 3]: block, first column / unit, end of block / unit, of tiles of at most `width` columns."""
        if width not in self.tiles_by_width:
            rows = [
                (b, c // self.unit, s.stop // self.unit)
                for b, s in enumerate(self.slices)
                for c in range(s.start, s.stop, width)
            ]
            self.tiles_by_width[width] = torch.tensor(rows, dtype=torch.int32, device=self.starts.device)
        return self.tiles_by_width[width]


@functools.lru_cache(maxsize=64)
def _blocks(dims, weights, device):
    """A batch's blocks are those of the batch before: what is copied to the device each time waits for all its work."""
    return _Blocks(dims, weights, device)


def group_numbers(query_group: Any, document_group: Any, first: Any, last: Any, ids: Any) -> tuple[Tensor | None, ...]:
    """The groups as the kernels take them: int32 numbers that are equal where the ids are, in half the registers of
    int64.

    Ids below 0 become -2 for queries and -1 for documents. Those of the documents are padded to whole tiles.
    """
    if query_group is None:
        return (None,) * 5
    order = document_group.sort().values

    def numbers(x):  # -2 also for an id that no document has, whose position belongs to another id
        place = torch.searchsorted(order, x, out_int32=True)
        return place.masked_fill((x < 0) | (order[place.clamp(max=len(order) - 1)] != x), -2)

    document = torch.searchsorted(order, document_group, out_int32=True).masked_fill(document_group < 0, -1)
    known = (None,) * 3 if ids is None else (first.int(), last.int(), numbers(ids))
    return numbers(query_group), torch.nn.functional.pad(document, (0, -len(document) % WHOLE)), *known


def _panels(count):
    return [(first, min(PANEL, count - first)) for first in range(0, count, PANEL)]


def _candidates(J):
    """Launch options of the kernels that hold all of a row's hard negatives."""
    C = triton.next_power_of_2(max(1, J))
    return {"BM": max(1, 512 // C), "C": C}


@torch.library.custom_op(
    "conan::info_nce", mutates_args=(), schema=schema(f"{INPUTS}, {SETTINGS}, bool both_ways", results=13)
)
def _forward(
    queries, documents, target, temperature, hard, query_group, document_group, known_first, known_last, known_ids,
    dims, weights, absolute, fraction, both_ways,
):  # fmt: skip
    """-> loss, loss_per_dim, positive, hard, accuracy; with both_ways z of the positives [K, N] and log-sum-exps of
    the columns [K, M], else empty; for the backward pass similarity_own, r_hard, rq, rd, lse, gap.

    The groups are those of group_numbers.
    """
    (N, E), M, J, K = queries.shape, len(documents), hard.shape[1], len(dims)
    if known_ids is not None:
        inside = (known_first >= 0) & (known_first <= known_last) & (known_last <= len(known_ids))
        torch._assert_async(inside.all(), "info_nce: a range of known outside its ids")
    groups = query_group, document_group, known_first, known_last, known_ids
    blocks, arch = _blocks(tuple(dims), tuple(weights), queries.device), architecture(queries.device)
    options, _ = similarity_tiles(queries.dtype, arch, known_ids is not None or both_ways)
    whole, row_tiles = M + -M % WHOLE, triton.cdiv(N, options["BM"])
    number = lambda *shape: queries.new_empty(shape, dtype=torch.float32)
    rq, rd, similarity_own, r_hard = number(K, N), number(K, whole), number(K, N, 1 + J), number(K, N, J)
    positive, similarity_hard, valid = number(N), number(N, J), target.new_empty(N, dtype=torch.bool)
    others, best, lse, gap, losses = number(K, N), number(N), number(K, N), number(K, N), number(K + 1, N)
    columns = number(K, M) if both_ways else number(0)
    with torch.cuda.device_of(queries):  # not needed in the backward pass: autograd sets the device
        prefix_norms[(whole // VECTORS["BM"],)](
            documents, rd, blocks.starts, M, whole, E, K, UNIT=blocks.unit, **VECTORS, **FUSION
        )
        own_candidates[(triton.cdiv(N * (1 + J), VECTORS["BM"]),)](
            queries, documents, target, hard, blocks.starts, rq, r_hard, similarity_own, positive, similarity_hard,
            valid, N, M, E, K, J, UNIT=blocks.unit, **VECTORS, **FUSION,
        )  # fmt: skip
        torch._assert_async(valid.all(), "info_nce: target outside documents")
        limits = (
            None if absolute == math.inf else margin_limits(similarity_own[..., 0], temperature, absolute, fraction)
        )
        for first, count in _panels(M):
            column_tiles = triton.cdiv(count, options["BN"])
            tile_lse, tile_best = number(column_tiles, K, N), number(column_tiles, N)
            tile_columns = number(row_tiles, K, column_tiles * options["BN"]) if both_ways else None
            forward_tile[(row_tiles * column_tiles,)](
                queries, documents, target, rq, rd, temperature, limits, *groups, blocks.starts, tile_lse, tile_best,
                tile_columns, first, N, M, whole, E, K, column_tiles,
                UNIT=blocks.unit, EVEN=blocks.unit % options["BE"] == 0, **options, **FUSION,
            )  # fmt: skip
            gather_tiles[(triton.cdiv(N, GATHER["BM"]), K)](
                tile_lse, tile_best, others, best, column_tiles, N, K, FIRST=first == 0, **GATHER, **FUSION
            )
            if both_ways:
                columns[:, first : first + count] = tile_columns.logsumexp(0).clamp(min=LOWEST)[:, :count]
        finish = _candidates(J)
        finish_rows[(triton.cdiv(N, finish["BM"]),)](
            others, best, similarity_own, temperature, losses, lse, gap, absolute, fraction, N, K, J, **finish, **FUSION
        )
    means = losses.mean(1)
    loss, loss_per_dim, accuracy = means[:K].dot(blocks.weights), means[:K].clone(), means[K].clone()
    of_columns = (similarity_own[..., 0] / temperature if both_ways else number(0)), columns
    kept = similarity_own, r_hard, rq, rd, lse, gap
    return loss, loss_per_dim, positive, similarity_hard, accuracy, *of_columns, *kept


@_forward.register_fake
def _(queries, documents, target, temperature, hard, *rest):
    dims, both_ways = rest[5], rest[9]
    results = empty_results(queries, documents, hard, len(dims), both_ways)
    (N, J, _), M, k = hard.shape, len(documents), len(dims)
    kept = (k, N, 1 + J), (k, N, J), (k, N), (k, M + -M % WHOLE), (k, N), (k, N)
    return *results, *(queries.new_empty(shape, dtype=torch.float32) for shape in kept)


@torch.library.custom_op(
    "conan::info_nce_backward",
    mutates_args=(),
    schema=schema(
        f"Tensor gradient, Tensor? dpositive, Tensor? dcolumns, {INPUTS}, Tensor? columns, "
        f"Tensor similarity_own, Tensor r_hard, Tensor rq, Tensor rd, Tensor lse, Tensor gap, {SETTINGS}",
        results=4,
    ),
)
def _backward(
    gradient, dpositive, dcolumns,
    queries, documents, target, temperature, hard, query_group, document_group, known_first, known_last, known_ids,
    columns, similarity_own, r_hard, rq, rd, lse, gap, dims, weights, absolute, fraction,
):  # fmt: skip
    """-> dqueries, ddocuments, dtemperature, dhard."""
    (N, E), M, J, K = queries.shape, len(documents), hard.shape[1], len(dims)
    groups = query_group, document_group, known_first, known_last, known_ids
    blocks, arch = _blocks(tuple(dims), tuple(weights), queries.device), architecture(queries.device)
    _, options = similarity_tiles(queries.dtype, arch, known_ids is not None or dcolumns is not None)
    W_dtype, product = product_options(queries.dtype, arch)
    tiles = blocks.tiles(product["BN"])
    BM, BN = options["BM"], options["BN"]
    number = lambda *shape: queries.new_empty(shape, dtype=torch.float32)
    share = gradient * blocks.weights / N  # [K]
    u_positive, uz, weighted_hard, radial_hard = number(K, N), number(K, N), number(K, N, J), number(K, N, J)
    dpositive = None if dpositive is None else dpositive.contiguous()
    own = _candidates(J)
    own_gradients[(triton.cdiv(N, own["BM"]),)](
        similarity_own, r_hard, rq, lse, gap, share, temperature, dpositive, u_positive, uz, weighted_hard, radial_hard,
        absolute, fraction, N, K, J, **own, **FUSION,
    )  # fmt: skip
    limits = None if absolute == math.inf else margin_limits(similarity_own[..., 0], temperature, absolute, fraction)
    whole = rd.shape[1]
    of_columns = [None if dcolumns is None else torch.nn.functional.pad(x, (0, whole - M)) for x in (columns, dcolumns)]

    # the columns after the last dim have no gradient
    empty = torch.empty_like if dims[-1] == E else torch.zeros_like
    dqueries, dhard = empty(queries), empty(hard)
    # fp32 sums by panel; in the end each is converted and freed before the next one
    sums = [number(count, E) for _, count in _panels(M)]
    uz_columns = queries.new_zeros(K, M, dtype=torch.float32)
    W = torch.empty(K * _whole(min(N, PANEL), BM) * _whole(min(M, PANEL), BN), dtype=W_dtype, device=queries.device)
    # one dim has one W, and a product with it a matrix large enough for the library's
    by_library = K == 1 and W_dtype == torch.bfloat16 and products.adds_in_float32(queries.device)
    for first_row, rows in _panels(N):
        sum_rows, R = number(rows, E), _whole(rows, BM)
        for panel, (first_column, count) in enumerate(_panels(M)):
            C = _whole(count, BN)
            tile_uz_rows, tile_uz_columns = number(C // BN, K, R), number(R // BM, K, C)
            weight_tile[(R // BM * (C // BN),)](
                queries, documents, target, rq, rd, temperature, limits, *groups, blocks.starts, lse, share, u_positive,
                *of_columns, W, tile_uz_rows, tile_uz_columns,
                first_row, first_column, N, M, whole, E, K, R, C, C // BN,
                UNIT=blocks.unit, EVEN=blocks.unit % options["BE"] == 0, **options, **FUSION,
            )  # fmt: skip
            sides = (
                (uz[:, first_row:], tile_uz_rows, rows, sum_rows, documents, first_column, count, C, 1, panel == 0),
                (uz_columns[:, first_column:], tile_uz_columns, count, sums[panel], queries, first_row, rows, 1, C,
                 first_row == 0),
            )  # fmt: skip
            for of_uz, parts, there, total, vectors, first, inner, stride_row, stride_inner, none_yet in sides:
                sum_tiles[(triton.cdiv(there, GATHER["BM"]), K)](
                    of_uz, parts, len(parts), there, parts.shape[2], of_uz.stride(0), K, **GATHER, **FUSION
                )
                if by_library:
                    w = W[: R * C].view(R, C) if stride_inner == 1 else W[: R * C].view(R, C).T
                    of_dim = vectors[first : first + inner, : dims[0]]
                    products.add_product_(total[:, : dims[0]], w[:there, :inner], of_dim, none_yet)
                else:
                    add_product[(triton.cdiv(there, product["BM"]) * len(tiles),)](
                        total, W, vectors, tiles, first, there, inner, len(vectors) - 1, E, R * C, stride_row,
                        stride_inner, len(tiles), UNIT=blocks.unit, FIRST=none_yet, **product, **FUSION,
                    )  # fmt: skip
        of_hard = hard, dhard, weighted_hard, radial_hard, J
        _finish(dqueries[first_row : first_row + rows], sum_rows, queries, rq, uz, first_row, blocks, of_hard)
    del W, sum_rows
    ddocuments = []
    for first, count in _panels(M):
        ddocuments.append(empty(documents[first : first + count]))
        _finish(ddocuments[-1], sums.pop(0), documents, rd, uz_columns, first, blocks, (None,) * 4 + (0,))
    ddocuments = torch.cat(ddocuments) if len(ddocuments) > 1 else ddocuments[0]
    return dqueries, ddocuments, uz.sum() / -temperature, dhard


def _finish(out, total, vectors, inverse, uz, first, blocks, of_hard):
    """Fill out, the gradients of the vectors from `first` on. of_hard: the arguments of finish_gradient, then J."""
    (count, E), tiles, whole = out.shape, blocks.tiles(FINISH["BN"]), inverse.shape[1]
    *of_hard, J = of_hard
    finish_gradient[(triton.cdiv(count, FINISH["BM"]) * len(tiles),)](
        out, total, vectors, inverse, uz, tiles, *of_hard, first, count, E, len(inverse), J, len(vectors), whole,
        len(tiles), UNIT=blocks.unit, **FINISH, **FUSION,
    )  # fmt: skip


def _whole(count, tile):
    return triton.cdiv(count, tile) * tile


@_backward.register_fake
def _(gradient, dpositive, dcolumns, queries, documents, target, temperature, hard, *_):
    return torch.empty_like(queries), torch.empty_like(documents), torch.empty_like(temperature), torch.empty_like(hard)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:10], output[6] if inputs[14] else None, *output[7:])
    ctx.options = inputs[10:14]
    ctx.set_materialize_grads(False)  # the other outputs are detached: make no zeros of their size


def _differentiate(ctx, gradient, *others):
    dpositive, dcolumns = others[4:6] if ctx.saved_tensors[10] is not None else (None, None)
    if gradient is None and dpositive is None and dcolumns is None:
        return (None,) * 15
    gradient = ctx.saved_tensors[3].new_zeros(()) if gradient is None else gradient
    dqueries, ddocuments, dtemperature, dhard = _backward(
        gradient, dpositive, dcolumns, *ctx.saved_tensors, *ctx.options
    )
    return dqueries, ddocuments, None, dtemperature, dhard, *(None,) * 10


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def fused_info_nce(operands: tuple, symmetric: bool) -> tuple[Tensor, ...]:
    """`conan_kernels.info_nce` by the Triton kernels. operands: as operands.operands gives them.

    Returns its five tensors, and with symmetric the columns' two.
    """
    found = _forward(*operands[:5], *group_numbers(*operands[5:10]), *operands[10:], symmetric)
    return found[0], *(x.detach() for x in found[1:5]), *(found[5:7] if symmetric else ())
