"""InfoNCE on CUDA: similarities of all Matryoshka dims in one pass, without the N x M matrix.

The math is that of chunked.py, with the same dot, z and u. What differs is where it is kept:

    forward   A program owns a tile of queries x documents. It walks the columns once. Where a dim ends, the running
              dot product is that dim's, and the tile's log-sum-exp of z goes to memory: a number per row, tile and dim.
    backward  A panel of 4,096 queries x 4,096 documents is walked again in the same way. Where a dim k ends,
              G_k = u_k rq_k rd_k / T goes to memory, then the sums W_b = sum_{k>=b} G_k over it. With W of the panel,
              dq[block b] += W_b @ d[block b] and dd[block b] += W_b.T @ q[block b], accumulated in fp32.

So there are four matrix products of N x M x E for any number of dims: the similarities twice, and two gradients. A
panel of documents at E = 3,584 in bf16 is 29 MB and stays in the L2 cache (50 MB on an H100 or H200) while its tiles
are computed. With `symmetric`, the forward tiles also give the log-sum-exp of their columns, and the backward tiles add
to u what these contribute (chunked.py), without another product. Nothing is atomic, so the same inputs give the same
bits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton

from conan_kernels.architecture import FUSION, architecture, product_options, similarity_tiles
from conan_kernels.info_nce.chunked import LOWEST
from conan_kernels.info_nce.own import (
    INPUTS,
    SETTINGS,
    add_hard_gradients,
    blocks_of,
    empty_results,
    inverse_norms,
    own_logits,
    own_similarities,
    schema,
    softmax_of_rows,
    suffix_sum,
)
from conan_kernels.info_nce.tiles import add_product, forward_tile, weight_tile

if TYPE_CHECKING:
    from torch import Tensor


PANEL = 4096  # W of a panel at 7 dims: 235 MB in bf16


class _Blocks:
    """The Matryoshka blocks as the kernels read them.

    unit: the largest power of two up to 64 that divides every dim, which tells Triton the alignment of addresses.
    """

    def __init__(self, dims, device):
        self.slices = blocks_of(dims)
        self.dims, self.device = dims, device
        self.unit = math.gcd(64, *dims)
        self.starts = torch.tensor([0, *dims], dtype=torch.int32, device=device) // self.unit

    def column_tiles(self, width):
        rows = [
            (b, c // self.unit, s.stop // self.unit)
            for b, s in enumerate(self.slices)
            for c in range(s.start, s.stop, width)
        ]
        return torch.tensor(rows, dtype=torch.int32, device=self.device)  # [tiles, 3]


def _group_numbers(query_group, document_group, first, last, ids, padding):
    """The groups as the kernels take them: int32 numbers that are equal where the ids are, in half the registers of
    int64.

    Ids below 0 become -2 for queries and -1 for documents.
    """
    if query_group is None:
        return (None,) * 5
    order = document_group.sort().values

    def numbers(x):  # -2 also for an id that no document has, whose position belongs to another id
        place = torch.searchsorted(order, x, out_int32=True)
        return place.masked_fill((x < 0) | (order[place.clamp(max=len(order) - 1)] != x), -2)

    document = torch.searchsorted(order, document_group, out_int32=True).masked_fill(document_group < 0, -1)
    known = (None,) * 3 if ids is None else (first.int(), last.int(), numbers(ids))
    return numbers(query_group), torch.nn.functional.pad(document, (0, padding)), *known


def _panels(count):
    return [(first, min(PANEL, count - first)) for first in range(0, count, PANEL)]


@torch.library.custom_op(
    "conan::info_nce", mutates_args=(), schema=schema(f"{INPUTS}, {SETTINGS}, bool both_ways", results=12)
)
def _forward(
    queries, documents, target, temperature, hard, query_group, document_group, known_first, known_last, known_ids,
    dims, weights, absolute, fraction, both_ways,
):  # fmt: skip
    """-> loss, loss_per_dim, positive, hard, accuracy; with both_ways z of the positives [K, N] and log-sum-exps of
    the columns [K, M], else empty; for the backward pass similarity_own, r_own, rq, rd, lse.
    """
    N, M, K = len(queries), len(documents), len(dims)
    torch._assert_async(((target >= 0) & (target < M)).all(), "info_nce: target outside documents")
    if known_ids is not None:
        inside = (known_first >= 0) & (known_first <= known_last) & (known_last <= len(known_ids))
        torch._assert_async(inside.all(), "info_nce: a range of known outside its ids")
    blocks, arch = _Blocks(dims, queries.device), architecture(queries.device)
    options, _ = similarity_tiles(queries.dtype, arch, known_ids is not None or both_ways)
    rq, rd = inverse_norms(queries, blocks.slices), inverse_norms(documents, blocks.slices)  # [K, N], [K, M]
    similarity_own, r_own = own_similarities(queries, documents, target, hard, blocks.slices, rq, rd)
    z_own, limits = own_logits(similarity_own, temperature, absolute, fraction)
    padding = -M % options["BN"]
    whole_rd = torch.nn.functional.pad(rd, (0, padding))
    groups = _group_numbers(query_group, document_group, known_first, known_last, known_ids, padding)
    others = torch.full_like(rq, -torch.inf)
    best = torch.full_like(rq[0], -torch.inf)
    row_tiles = triton.cdiv(N, options["BM"])
    columns = rd.new_empty(rd.shape if both_ways else 0)
    for first, count in _panels(M):
        column_tiles = triton.cdiv(count, options["BN"])
        tile_lse, tile_best = rq.new_empty(column_tiles, K, N), rq.new_empty(column_tiles, N)
        tile_columns = rq.new_empty(row_tiles, K, column_tiles * options["BN"]) if both_ways else None
        with torch.cuda.device_of(queries):  # not needed in the backward pass: autograd sets the device
            forward_tile[(row_tiles * column_tiles,)](
                queries, documents, target, rq, whole_rd, temperature, limits if absolute != torch.inf else None,
                *groups, blocks.starts, tile_lse, tile_best, tile_columns,
                first, N, M, M + padding, queries.shape[1], K, column_tiles,
                UNIT=blocks.unit, EVEN=blocks.unit % options["BE"] == 0, **options, **FUSION,
            )  # fmt: skip
        others = torch.logaddexp(others, tile_lse.logsumexp(0))
        best = torch.maximum(best, tile_best.amax(0))
        if both_ways:
            columns[:, first : first + count] = tile_columns.logsumexp(0).clamp(min=LOWEST)[:, :count]
    loss, lse, _ = softmax_of_rows(others, z_own)
    best = torch.cat((best[:, None], z_own[-1, :, 1:]), dim=1).amax(1)
    loss_per_dim = loss.mean(1)
    total = (loss_per_dim * torch.tensor(weights, device=loss.device)).sum()
    positive, similarity_hard = similarity_own[-1, :, 0].clone(), similarity_own[-1, :, 1:].clone()
    accuracy = (z_own[-1, :, 0] > best).float().mean()
    of_columns = (z_own[..., 0].clone() if both_ways else rq.new_empty(0)), columns
    return total, loss_per_dim, positive, similarity_hard, accuracy, *of_columns, similarity_own, r_own, rq, rd, lse


@_forward.register_fake
def _(queries, documents, target, temperature, hard, *rest):
    dims, both_ways = rest[5], rest[9]
    results = empty_results(queries, documents, hard, len(dims), both_ways)
    (N, K, _), M, k = hard.shape, len(documents), len(dims)
    kept = (k, N, 1 + K), (k, N, 1 + K), (k, N), (k, M), (k, N)
    return *results, *(queries.new_empty(shape, dtype=torch.float32) for shape in kept)


@torch.library.custom_op(
    "conan::info_nce_backward",
    mutates_args=(),
    schema=schema(
        f"Tensor gradient, Tensor? dpositive, Tensor? dcolumns, {INPUTS}, Tensor? columns, "
        f"Tensor similarity_own, Tensor r_own, Tensor rq, Tensor rd, Tensor lse, {SETTINGS}",
        results=4,
    ),
)
def _backward(
    gradient, dpositive, dcolumns,
    queries, documents, target, temperature, hard, query_group, document_group, known_first, known_last, known_ids,
    columns, similarity_own, r_own, rq, rd, lse, dims, weights, absolute, fraction,
):  # fmt: skip
    """-> dqueries, ddocuments, dtemperature, dhard."""
    (N, E), M, K = queries.shape, len(documents), len(dims)
    blocks, arch = _Blocks(dims, queries.device), architecture(queries.device)
    _, options = similarity_tiles(queries.dtype, arch, known_ids is not None or dcolumns is not None)
    W_dtype, product = product_options(queries.dtype, arch)
    tiles = blocks.column_tiles(product["BN"])
    BM, BN = options["BM"], options["BN"]
    share = gradient * torch.tensor(weights, device=gradient.device) / N  # [K]
    z_own, limits = own_logits(similarity_own, temperature, absolute, fraction)
    u_own = torch.exp(z_own - lse[..., None])
    u_own[..., 0] = torch.expm1(z_own[..., 0] - lse)
    u_own *= share[:, None, None]
    if dpositive is not None:
        u_own[..., 0] += dpositive
    weighted_hard = suffix_sum(u_own * rq[..., None] * r_own / temperature)[..., 1:]
    radial_hard = suffix_sum(u_own * z_own * r_own.square())[..., 1:]
    u_positive = u_own[..., 0].contiguous()
    padding = -M % BN
    whole_rd = torch.nn.functional.pad(rd, (0, padding))
    groups = _group_numbers(query_group, document_group, known_first, known_last, known_ids, padding)
    of_columns = [None if dcolumns is None else torch.nn.functional.pad(x, (0, padding)) for x in (columns, dcolumns)]

    dqueries, dhard = torch.zeros_like(queries), torch.zeros_like(hard)
    # fp32 sums by panel; in the end each is converted and freed before the next one
    sums = [torch.zeros(count, E, dtype=torch.float32, device=queries.device) for _, count in _panels(M)]
    uz_columns, uz_total = torch.zeros_like(rd), torch.zeros_like(gradient)
    W = torch.empty(K * _whole(min(N, PANEL), BM) * _whole(min(M, PANEL), BN), dtype=W_dtype, device=queries.device)
    for first_row, rows in _panels(N):
        sum_rows = torch.zeros(rows, E, dtype=torch.float32, device=queries.device)
        # [K, rows]
        uz_rows = (u_own[:, first_row : first_row + rows, 1:] * z_own[:, first_row : first_row + rows, 1:]).sum(2)
        R = _whole(rows, BM)
        for panel, (first_column, columns) in enumerate(_panels(M)):
            C = _whole(columns, BN)
            tile_uz_rows, tile_uz_columns = rq.new_empty(C // BN, K, R), rq.new_empty(R // BM, K, C)
            weight_tile[(R // BM * (C // BN),)](
                queries, documents, target, rq, whole_rd, temperature, limits if absolute != torch.inf else None,
                *groups, blocks.starts, lse, share, u_positive, *of_columns, W, tile_uz_rows, tile_uz_columns,
                first_row, first_column, N, M, M + padding, E, K, R, C, C // BN,
                UNIT=blocks.unit, EVEN=blocks.unit % options["BE"] == 0, **options, **FUSION,
            )  # fmt: skip
            uz_rows += tile_uz_rows.sum(0)[:, :rows]
            uz_columns[:, first_column : first_column + columns] += tile_uz_columns.sum(0)[:, :columns]
            sides = (
                (sum_rows, documents, first_column, rows, columns, C, 1),
                (sums[panel], queries, first_row, columns, rows, 1, C),
            )
            for total, vectors, first, count, inner, stride_row, stride_inner in sides:
                add_product[(triton.cdiv(count, product["BM"]) * len(tiles),)](
                    total, W, vectors, tiles, first, count, inner, len(vectors) - 1, E, R * C, stride_row, stride_inner,
                    len(tiles), UNIT=blocks.unit, **product, **FUSION,
                )  # fmt: skip
        here = slice(first_row, first_row + rows)
        radial = suffix_sum(uz_rows * rq[:, here].square())  # [K, rows]
        for b, block in enumerate(blocks.slices):
            sum_rows[:, block] -= radial[b, :, None] * queries[here, block]
        add_hard_gradients(
            queries[here],
            hard[here],
            weighted_hard[:, here],
            radial_hard[:, here],
            blocks.slices,
            sum_rows,
            dhard[here],
        )
        dqueries[here] = sum_rows
        uz_total += uz_rows.sum()
    del W, sum_rows
    radial = suffix_sum(uz_columns * rd.square())  # [K, M]
    ddocuments = []
    for first, count in _panels(M):
        here, total = slice(first, first + count), sums.pop(0)
        for b, block in enumerate(blocks.slices):
            total[:, block] -= radial[b, here, None] * documents[here, block]
        ddocuments.append(total.to(documents.dtype))
    return dqueries, torch.cat(ddocuments), -uz_total / temperature, dhard


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
    """`conan_kernels.info_nce` by the Triton kernels. operands: as own.operands gives them.

    Returns its five tensors, and with symmetric the columns' two.
    """
    found = _forward(*operands, symmetric)
    return found[0], *(x.detach() for x in found[1:5]), *(found[5:7] if symmetric else ())
