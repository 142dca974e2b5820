"""InfoNCE on a CPU, in plain PyTorch: chunks of queries against all documents, with the gradient in the same pass.

The math, for query i, candidate j, Matryoshka dim k with prefix width d_k and inverse prefix norms rq_ik, rd_jk:

    dot_k = dot_{k-1} + q[d_{k-1}:d_k] . d[d_{k-1}:d_k]         a running sum: all dims for one matrix product
    z_k   = dot_k * rq_k * rd_k / T                             the cosine over T
    u_k   = dLoss/dz_k = weight_k / N * (softmax_j(z_k) - [j is the positive])
    dLoss/dq[block b] = sum_j (sum_{k>=b} u_k rq_k rd_k / T) d[block b]  -  (sum_{k>=b} rq_k^2 sum_j u_k z_k) q[block b]

The first term comes from the dot products, again one matrix product for all dims, the second from the norm. For
documents the same with sums over i. dLoss/dT = -sum(u z) / T.

A chunk has whole rows, so the gradient needs the similarities only once: three matrix products in all, where an online
softmax takes four. The workspace is len(dims) x chunk x M.

With `symmetric` it takes four: a column is complete after all chunks, so the backward pass computes the similarities
again, and adds to u

    u_k  += c_jk exp(z_k - l_jk),     l_jk the column's log-sum-exp over i, c_jk = dLoss/dl_jk,
                                      and dLoss/dz_k of the positive beside it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from conan_kernels.info_nce.operands import INPUTS, SETTINGS, blocks_of, empty_results, schema
from conan_kernels.info_nce.own import (
    LEFT_OUT,
    add_hard_gradients,
    inverse_norms,
    own_logits,
    own_similarities,
    softmax_of_rows,
    suffix_sum,
)

if TYPE_CHECKING:
    from torch import Tensor


# Similarities of a chunk and dim that fit the cache together: 2 MiB in fp32.
TILE = 1 << 19
LOWEST = -1e20  # the least maximum of a row, so that LEFT_OUT vanishes in a row that has nothing else


def chunked_info_nce(operands: tuple, symmetric: bool) -> tuple[Tensor, ...]:
    """`conan_kernels.info_nce` by chunks. operands: as operands.operands gives them.

    Returns its five tensors, and with symmetric the columns' two.
    """
    queries, documents, _, temperature, hard, *_ = operands
    differentiable = any(x.requires_grad for x in (queries, documents, hard, temperature))
    gradients = differentiable and torch.is_grad_enabled() and not symmetric
    found = _op(*operands, gradients, symmetric, None, None, None, None)
    return found[0], *(x.detach() for x in found[1:5]), *(found[5:7] if symmetric else ())


def chunk_rows(N: int, M: int, E: int, k: int) -> int:
    """Queries per chunk: enough for an efficient matrix product, with a workspace k x chunk x M of at most 4 x M x
    E.

    Measured on one core at N = M = 2,048 and 7 dims: E = 512 takes 470 ms with 64 rows and 337 ms with 256; E = 3,584
    takes 1.36 s with 64, 1.19 s with 256, 1.22 s with 512.
    """
    return max(1, min(N, 4 * E // k, max(256, TILE // M)))


def mark_known(left_out: Tensor, first: Tensor, last: Tensor, ids: Tensor, ascending: Any) -> None:
    """Set left_out [n, M] to True for documents whose group is among ids[first[i] : last[i]], except groups below 0.

    ascending: document_group sorted, as torch.sort gives it.
    """
    row, place = _ranges(first, last)
    row, ids = row[ids[place] >= 0], ids[place][ids[place] >= 0]
    bounds = [torch.searchsorted(ascending.values, ids, right=right) for right in (False, True)]
    which, place = _ranges(*bounds)
    left_out[row[which], ascending.indices[place]] = True


def _ranges(first, last):
    """The numbers of all ranges [first[i], last[i]), one after another: i and number, each [sum of lengths]."""
    lengths = last - first
    i = torch.repeat_interleave(lengths)
    return i, torch.arange(len(i)) + (last - lengths.cumsum(0))[i]


@torch.library.custom_op(
    "conan::info_nce_chunked",
    mutates_args=(),
    device_types="cpu",
    schema=schema(
        f"{INPUTS}, {SETTINGS}, bool gradients, bool both_ways, "
        "Tensor? dloss, Tensor? dpositive, Tensor? columns, Tensor? dcolumns",
        results=11,
    ),
)
def _op(
    queries, documents, target, temperature, hard, query_group, document_group, known_first, known_last, known_ids,
    dims, weights, absolute, fraction, gradients, both_ways, dloss, dpositive, columns, dcolumns,
):  # fmt: skip
    """-> loss, loss_per_dim, positive, hard, accuracy; with both_ways z of the positives [k, N] and log-sum-exps of
    the columns [k, M]; then fp32 gradients, empty unless asked for.

    They are the gradients of the loss, or, given the columns, of a scalar that has the given gradients for the loss,
    the positives' z and the columns.
    """
    if not 0 <= target.min() <= target.max() < len(documents):
        raise ValueError(f"target in 0..{len(documents) - 1} expected, got {target.min()}..{target.max()}")
    if known_ids is not None and not (
        0 <= known_first.min() and (known_first <= known_last).all() and known_last.max() <= len(known_ids)
    ):
        raise ValueError(
            f"known: ranges within 0..{len(known_ids)} expected, got {known_first.min()}..{known_last.max()}, "
            "or one that ends before it begins"
        )
    T = temperature.item()
    if not T > 0:
        raise ValueError(f"temperature above 0 expected, got {T}")
    with torch.autocast("cpu", enabled=False):
        q, d = queries.float(), documents.float()
        (N, E), M, K = q.shape, len(d), hard.shape[1]
        blocks = blocks_of(dims)
        rq, rd = inverse_norms(q, blocks), inverse_norms(d, blocks)  # [k, N], [k, M]
        similarity_own, r_own = own_similarities(q, d, target, hard, blocks, rq, rd)  # [k, N, 1+K]
        z_own, limits = own_logits(similarity_own, T, absolute, fraction)
        ascending = document_group.sort() if known_ids is not None else None
        loss_per_dim, correct = torch.zeros(len(dims)), torch.zeros(())
        scale = 1.0 if dloss is None else dloss.item()
        sums = torch.full((len(dims), M) if both_ways else (0,), LOWEST)
        if gradients:
            dq, dd, dhard = torch.zeros_like(q), torch.zeros_like(d), torch.zeros_like(hard, dtype=torch.float32)
            uz_columns, uz_total = torch.zeros_like(rd), torch.zeros(())

        chunk = chunk_rows(N, M, E, len(dims))
        weighted = torch.empty(len(dims) if gradients else 1, chunk, M)
        for first in range(0, N, chunk):
            rows = slice(first, min(N, first + chunk))
            n = rows.stop - first
            positive = torch.arange(n), target[rows]
            # softmax_of_rows adds the positive, so it is left out of the matrix.
            left_out = torch.zeros(n, M, dtype=torch.bool)
            if query_group is not None:
                left_out = (query_group[rows, None] == document_group) & (document_group >= 0)
            if known_ids is not None:
                mark_known(left_out, known_first[rows], known_last[rows], known_ids, ascending)
            left_out[positive] = True
            dot, z = torch.zeros(n, M), torch.empty(n, M)
            u_own, uz_rows = torch.empty(len(dims), n, 1 + K), torch.empty(len(dims), n)
            for k, block in enumerate(blocks):
                dot.addmm_(q[rows, block], d[:, block].T)
                torch.mul(dot, rd[k], out=z).mul_((rq[k, rows] / T)[:, None])
                if absolute != torch.inf:
                    z.masked_fill_(z > limits[k, rows, None], LEFT_OUT)
                z.masked_fill_(left_out, LEFT_OUT)
                if both_ways:
                    torch.logaddexp(sums[k], z.logsumexp(0), out=sums[k])
                top = z.amax(1).clamp_(min=LOWEST)  # [n]
                # [n, M], to be multiplied by a factor per row
                p = torch.sub(z, top[:, None], out=weighted[k if gradients else 0, :n]).exp_()
                total = p.sum(1)
                loss, lse, u = softmax_of_rows(top + total.log(), z_own[k, rows])
                loss_per_dim[k] += loss.sum() / N
                if gradients:
                    share = scale * weights[k] / N
                    u_own[k] = u * share
                    uz_own = u_own[k] * z_own[k, rows]
                    factor = torch.exp(top - lse) * share  # [n]: u = p * factor
                    of_column = None if columns is None else torch.sub(z, columns[k]).exp_().mul_(dcolumns[k])
                    uz_columns_here = None if columns is None else z * of_column
                    z.mul_(p)
                    uz_rows[k] = factor * z.sum(1) + uz_own.sum(1)
                    # sum(u) is 0 except for rounding, which the large z of a low temperature must not multiply
                    excess = factor * total + u_own[k].sum(1)
                    uz_total += (uz_rows[k] - excess * z_own[k, rows, 0]).sum()
                    uz_columns[k].addmv_(z.T, factor).index_add_(0, target[rows], uz_own[:, 0])
                    if of_column is not None:
                        du, duz = dpositive[k, rows], dpositive[k, rows] * z_own[k, rows, 0]
                        u_own[k, :, 0] += du
                        uz_rows[k] += uz_columns_here.sum(1) + duz
                        uz_columns[k].add_(uz_columns_here.sum(0)).index_add_(0, target[rows], duz)
                        uz_total += uz_columns_here.sum() + duz.sum()
                        p.mul_(factor[:, None]).add_(of_column)
                        factor = 1.0
                    p.mul_(rd[k]).mul_((factor * rq[k, rows] / T)[:, None])
                    p[positive] = u_own[k, :, 0] * rq[k, rows] * r_own[k, rows, 0] / T
            best_other = torch.cat((top[:, None], z_own[-1, rows, 1:]), dim=1).amax(1)
            correct += (z_own[-1, rows, 0] > best_other).sum()

            if gradients:
                radial = suffix_sum(uz_rows * rq[:, rows].square())  # [k, n]
                for b in reversed(range(len(blocks))):
                    block = blocks[b]
                    w = weighted[b, :n] if b + 1 == len(blocks) else weighted[b, :n].add_(weighted[b + 1, :n])
                    torch.mm(w, d[:, block], out=dq[rows, block]).addcmul_(radial[b, :, None], q[rows, block], value=-1)
                    dd[:, block].addmm_(w.T, q[rows, block])
                u_own, z_hard, r_hard = u_own[..., 1:], z_own[:, rows, 1:], r_own[:, rows, 1:]
                weighted_hard = suffix_sum(u_own * rq[:, rows, None] * r_hard / T)  # [k, n, K]
                radial_hard = suffix_sum(u_own * z_hard * r_hard.square())
                add_hard_gradients(q[rows], hard[rows], weighted_hard, radial_hard, blocks, dq[rows], dhard[rows])

        loss = (loss_per_dim * torch.tensor(weights)).sum()
        results = loss, loss_per_dim, similarity_own[-1, :, 0].clone(), similarity_own[-1, :, 1:].clone(), correct / N
        results += (z_own[..., 0].clone() if both_ways else q.new_empty(0), sums)
        if not gradients:
            return *results, *(q.new_empty(0) for _ in range(4))
        radial = suffix_sum(uz_columns * rd.square())  # [k, M]
        for b, block in enumerate(blocks):
            dd[:, block].addcmul_(radial[b, :, None], d[:, block], value=-1)
        return *results, dq, dd, dhard, -uz_total / T


@_op.register_fake
def _(queries, documents, target, temperature, hard, *rest):
    dims, gradients, both_ways = rest[5], rest[9], rest[10]
    shapes = (queries.shape, documents.shape, hard.shape, ()) if gradients else ((0,),) * 4
    results = empty_results(queries, documents, hard, len(dims), both_ways)
    return *results, *(queries.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _setup_context(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.temperature_shape = inputs[3].shape
    ctx.both_ways = inputs[15]
    if ctx.both_ways:
        ctx.save_for_backward(*inputs[:10], output[6])
        ctx.options = inputs[10:14]
    else:
        ctx.save_for_backward(*output[7:])
    ctx.set_materialize_grads(False)  # the other outputs are detached: make no zeros of their size


def _backward(ctx, gradient, *others):
    if ctx.both_ways:
        return _backward_both_ways(ctx, gradient, *others[4:6])
    if gradient is None:
        return (None,) * 20
    dq, dd, dhard, dtemperature = ctx.saved_tensors
    # scaled before rounding to the input's dtype: for fp16, the factor of a loss scaler must not come too late
    vectors = [(x * gradient).to(ctx.dtype) for x in (dq, dd, dhard)]
    dtemperature = (dtemperature * gradient).reshape(ctx.temperature_shape)
    return vectors[0], vectors[1], None, dtemperature, vectors[2], *(None,) * 15


def _backward_both_ways(ctx, dloss, dpositive, dcolumns):
    *inputs, columns = ctx.saved_tensors
    if dloss is None and dpositive is None and dcolumns is None:
        return (None,) * 20
    k, N = len(columns), len(inputs[0])
    dloss = columns.new_zeros(()) if dloss is None else dloss
    dpositive = columns.new_zeros(k, N) if dpositive is None else dpositive
    dcolumns = torch.zeros_like(columns) if dcolumns is None else dcolumns
    dq, dd, dhard, dtemperature = _op(*inputs, *ctx.options, True, False, dloss, dpositive, columns, dcolumns)[7:]
    return (
        dq.to(ctx.dtype),
        dd.to(ctx.dtype),
        None,
        dtemperature.reshape(ctx.temperature_shape),
        dhard.to(ctx.dtype),
        *(None,) * 15,
    )


_op.register_autograd(_backward, setup_context=_setup_context)
