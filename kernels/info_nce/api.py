"""Matryoshka InfoNCE without the N x M matrix: the public function, its checks, and the choice of the device's form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from conan_kernels.architecture import architecture
from conan_kernels.info_nce.chunked import chunked_info_nce


class Margin(NamedTuple):
    """A candidate whose similarity exceeds positive + absolute + fraction * |positive| is taken for a false negative
    (the positive-aware mining of arXiv 2407.15831, inside the loss)."""

    absolute: float = 0.0
    fraction: float = 0.0


class Known(NamedTuple):
    """Further groups that are right for each query, as ranges of one list, which queries may share: those of query i
    are ids[first[i] : last[i]]. All int64."""

    first: Tensor  # [N]
    last: Tensor  # [N]
    ids: Tensor  # [I]


class InfoNCE(NamedTuple):
    """What `info_nce` returns, all fp32. Only `loss` carries gradient. Similarities are cosines over the widest dim."""

    loss: Tensor  # [] weighted sum of loss_per_dim
    loss_per_dim: Tensor  # [len(dims)] mean over queries
    positive: Tensor  # [N] of each query and its positive
    hard: Tensor  # [N, K] of each query and its own hard negatives; K = 0 where none are given
    accuracy: Tensor  # [] share of queries whose positive scores above every other candidate, over the widest dim


def info_nce(
    queries: Tensor,
    documents: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    dims: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    hard: Tensor | None = None,
    query_group: Tensor | None = None,
    document_group: Tensor | None = None,
    margin: float | Margin | None = None,
    known: Known | None = None,
    symmetric: bool = False,
    combine: Callable[[Tensor], Tensor] | None = None,
) -> InfoNCE:
    """InfoNCE (arXiv 1807.03748) over cosines, at every Matryoshka prefix (arXiv 2205.13147) in one pass.

        loss_d = mean_i( logsumexp_j(s_ij / T) - s_i,target(i) / T ),   s = cosine of the first d columns
        loss   = sum_d weights_d * loss_d

    queries [N, E] and documents [M, E]: fp32, bf16 or fp16, the same for both. target [N], int64: the row in documents
    that is query i's positive. temperature T > 0: a float, or a scalar tensor, which receives a gradient if it asks.
    dims: ascending prefix widths, default (E,). weights: a float each, default 1 / len(dims). hard [N, K, E]: negatives
    that only their own query sees. query_group [N] and document_group [M], int64: a document whose id equals the
    query's is no negative for it; ids below 0 belong to no group. margin: a float (absolute) or a `Margin`; at each
    dim, by that dim's similarities, documents and hard negatives above it are left out. The positive itself never is.
    known: a `Known`, for queries with several positives: documents of these groups are no negatives for the query
    either.

    symmetric: a document also finds its query among the queries, by the same similarities:

        loss_d = mean_i( that above + logsumexp_j(s_j,target(i) / T) - s_i,target(i) / T ) / 2

    over query i itself and every query for which its document is a negative. combine: where other ranks have other
    queries, what makes of this rank's log-sum-exps of those, fp32 [len(dims), M], that of all ranks', differentiably.

    Memory is O((N + M) * E + I). Accumulates in fp32 with an online log-sum-exp. A vector whose prefix is zero (or so
    short, below 1e-22, that its square is zero in fp32) has similarity 0 with everything there, and no gradient.
    Gradients go to queries, documents, hard and temperature; there is no double backward. The same inputs give the same
    bits.

    Raises ValueError for shapes, dtypes or dims that do not fit, and for a target outside documents or a range outside
    ids (on CUDA the latter two are a device-side assertion, to save a synchronisation); RuntimeError on a GPU or with a
    Triton that is too old.
    """
    dims = (queries.shape[-1],) if dims is None else tuple(dims)
    weights = (1.0 / max(1, len(dims)),) * len(dims) if weights is None else tuple(weights)
    if not isinstance(margin, Margin):
        margin = Margin(float("inf") if margin is None else margin)
    _check(queries, documents, target, temperature, dims, weights, hard, query_group, document_group, known)
    vectors = queries, documents, target, _scalar(temperature, queries.device), dims, weights, hard
    found = _form(queries)(*vectors, query_group, document_group, known, margin, symmetric)
    if not symmetric:
        return InfoNCE(*found)
    # positive [k, N], of z; columns [k, M]: log-sum-exps over the queries but the positives'
    loss, loss_per_dim, *rest, positive, columns = found
    others = combine(columns) if combine else columns
    of_documents = torch.nn.functional.softplus(others[:, target] - positive).mean(1)
    loss = (loss + (of_documents * of_documents.new_tensor(weights)).sum()) / 2
    return InfoNCE(loss, (loss_per_dim + of_documents.detach()) / 2, *rest)


def log_sum_exp_of_documents(
    queries: Tensor,
    documents: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    dims: Sequence[int],
    query_group: Tensor,
    document_group: Tensor,
    known: Known | None = None,
) -> Tensor:
    """Over the queries, log-sum-exp of each document's s / T, as `info_nce` knows these, a query's own group, groups
    that it knows, and target[i] left out: fp32 [len(dims), M], -1e20 where nothing is left. Arguments and errors as
    there; a gradient flows to vectors and temperature."""
    dims, weights = tuple(dims), (0.0,) * len(dims)
    _check(queries, documents, target, temperature, dims, weights, None, query_group, document_group, known)
    vectors = queries, documents, target, _scalar(temperature, queries.device), dims, weights, None
    return _form(queries)(*vectors, query_group, document_group, known, Margin(float("inf")), True)[-1]


def _scalar(temperature, device):
    if isinstance(temperature, Tensor):
        return temperature
    return torch.full((), temperature, dtype=torch.float32, device=device)


def _form(queries):
    """What does it on the device."""
    if not queries.is_cuda:
        return chunked_info_nce
    architecture(queries.device)  # says in one line what is missing, before anything is imported or launched
    from conan_kernels.info_nce.launch import fused_info_nce  # here, because a CPU machine has no Triton

    return fused_info_nce


def _check(queries, documents, target, temperature, dims, weights, hard, query_group, document_group, known):
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise ValueError(
            f"queries [N, E] and documents [M, E] expected, got {list(queries.shape)} and {list(documents.shape)}"
        )
    if 0 in queries.shape or 0 in documents.shape:
        raise ValueError(
            f"at least one query, document and column expected, got {list(queries.shape)} and {list(documents.shape)}"
        )
    for name, vectors in (("queries", queries), ("documents", documents), ("hard", hard)):
        if vectors is None:
            continue
        if vectors.dtype not in (torch.float32, torch.bfloat16, torch.float16) or vectors.dtype != queries.dtype:
            raise ValueError(
                f"fp32, bf16 or fp16 expected, the same for all; queries are {queries.dtype}, {name} {vectors.dtype}"
            )
        if vectors.device != queries.device:
            raise ValueError(f"one device expected; queries are on {queries.device}, {name} on {vectors.device}")
    N, E = queries.shape
    if hard is not None and (hard.ndim != 3 or hard.shape[0] != N or hard.shape[2] != E):
        raise ValueError(f"hard [N, K, E] = [{N}, K, {E}] expected, got {list(hard.shape)}")
    if (query_group is None) != (document_group is None):
        raise ValueError("query_group and document_group expected together, got only one")
    if known is not None and query_group is None:
        raise ValueError("known: query_group and document_group expected with it, got none")
    first, last, ids = known or (None, None, None)
    sizes = [("target", target, N), ("query_group", query_group, N), ("document_group", document_group, len(documents))]
    sizes += [
        ("known.first", first, N),
        ("known.last", last, N),
        ("known.ids", ids, None if ids is None else ids.numel()),
    ]
    for name, ids, rows in sizes:
        if ids is not None and (ids.dtype != torch.int64 or list(ids.shape) != [rows] or ids.device != queries.device):
            raise ValueError(
                f"{name}: int64 [{rows}] on {queries.device} expected, got {ids.dtype} {list(ids.shape)} on "
                f"{ids.device}"
            )
    if not dims or any(a >= b for a, b in zip((0, *dims), dims)) or dims[-1] > E:
        raise ValueError(f"dims ascending in 1..{E} expected, got {list(dims)}")
    if len(weights) != len(dims):
        raise ValueError(f"a weight for each of {len(dims)} dims expected, got {len(weights)}")
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1 or temperature.dtype != torch.float32:
            raise ValueError(
                f"temperature: a float or an fp32 scalar expected, got {temperature.dtype} {list(temperature.shape)}"
            )
    elif not temperature > 0:
        raise ValueError(f"temperature above 0 expected, got {temperature}")
