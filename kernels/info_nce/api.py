"""Matryoshka InfoNCE without the N x M matrix: the public function, its checks, and the choice of the form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from conan_kernels.architecture import architecture
from conan_kernels.info_nce.chunked import chunked_info_nce
from conan_kernels.info_nce.operands import operands


class Margin(NamedTuple):
    """A candidate whose similarity exceeds positive + absolute + fraction * |positive| counts as a false negative.

    This is the positive-aware mining of arXiv 2407.15831, within the loss.
    """

    absolute: float = 0.0
    fraction: float = 0.0


class Known(NamedTuple):
    """More groups that are right for each query, as ranges of one list, which queries may share.

    Those of query i are ids[first[i] : last[i]]. All int64.
    """

    first: Tensor  # [N]
    last: Tensor  # [N]
    ids: Tensor  # [I]


class InfoNCE(NamedTuple):
    """What `info_nce` returns, all fp32. Only `loss` has a gradient. Similarities are cosines over the widest dim."""

    loss: Tensor  # []: weighted sum of loss_per_dim
    loss_per_dim: Tensor  # [len(dims)]: means over queries
    positive: Tensor  # [N]: similarity of each query and its positive
    hard: Tensor  # [N, K]: similarities of each query and its own hard negatives; K = 0 without any
    accuracy: Tensor  # []: share of queries whose positive scores above every other candidate


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
    """InfoNCE (arXiv 1807.03748) over cosines, at every Matryoshka prefix (arXiv 2205.13147), in one pass.

        loss_d = mean_i( logsumexp_j(s_ij / T) - s_i,target(i) / T ),   s = cosine of the first d columns
        loss   = sum_d weights_d * loss_d

    With `symmetric`, a document also looks for its query among the queries, by the same similarities:

        loss_d = mean_i( that above + logsumexp_j(s_j,target(i) / T) - s_i,target(i) / T ) / 2

    over query i itself and every query for which its document is a negative.

    Args:
        queries: [N, E]; fp32, bf16 or fp16.
        documents: [M, E], of the same dtype.
        target: int64 [N], the row in documents that is the query's positive.
        temperature: T > 0; a float, or a scalar tensor, which may get a gradient.
        dims: ascending prefix widths; (E,) by default.
        weights: one per dim; 1 / len(dims) by default.
        hard: [N, K, E], negatives that only their own query sees.
        query_group: int64 [N]. A document with the query's id is no negative for it; ids below 0 are no group.
        document_group: int64 [M].
        margin: a float (absolute) or a `Margin`. At each dim, documents and hard negatives above it are left out, by
            that dim's similarities; the positive never is.
        known: a `Known`, for queries with several positives: documents of these groups are no negatives either.
        symmetric: see above.
        combine: if other ranks have other queries, a differentiable function from this rank's log-sum-exps of the
            documents, fp32 [len(dims), M], to those over all ranks.

    Returns:
        An `InfoNCE`. Gradients go to queries, documents, hard and temperature; there is no double backward. The same
            inputs give the same bits.

    Raises:
        ValueError: for shapes, dtypes or dims that do not fit, a target outside documents, and a range outside ids. On
            CUDA the latter two are a device-side assertion, to save a synchronisation.
        RuntimeError: on a GPU or with a Triton that is too old.

    Memory is O((N + M) * E + I). Sums are fp32, with an online log-sum-exp. A vector whose prefix is zero, or shorter
    than 1e-22, has similarity 0 and no gradient there.
    """
    dims = (queries.shape[-1],) if dims is None else tuple(dims)
    weights = (1.0 / max(1, len(dims)),) * len(dims) if weights is None else tuple(weights)
    if not isinstance(margin, Margin):
        margin = Margin(float("inf") if margin is None else margin)
    _check(queries, documents, target, temperature, dims, weights, hard, query_group, document_group, known)
    vectors = queries, documents, target, _scalar(temperature, queries.device), dims, weights, hard
    found = _form(queries)(operands(*vectors, query_group, document_group, known, margin), symmetric)
    if not symmetric:
        return InfoNCE(*found)
    # positive [k, N]: z of the positives; columns [k, M]: log-sum-exps over the queries without the positives'
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
    """log-sum-exp over the queries of each document's s / T: fp32 [len(dims), M], -1e20 where nothing is left.

    Left out are target[i], a query's own group, and groups that it knows. Arguments and errors are those of `info_nce`;
    gradients go to the vectors and the temperature.
    """
    dims, weights = tuple(dims), (0.0,) * len(dims)
    _check(queries, documents, target, temperature, dims, weights, None, query_group, document_group, known)
    vectors = queries, documents, target, _scalar(temperature, queries.device), dims, weights, None
    return _form(queries)(operands(*vectors, query_group, document_group, known, Margin(float("inf"))), True)[-1]


def _scalar(temperature, device):
    if isinstance(temperature, Tensor):
        return temperature
    return torch.full((), temperature, dtype=torch.float32, device=device)


def _form(queries):
    """The function that computes it on the device of the queries."""
    if not queries.is_cuda:
        return chunked_info_nce
    architecture(queries.device)  # raises an error in one line before anything is imported or launched
    from conan_kernels.info_nce.launch import fused_info_nce  # imported here, since a CPU machine lacks Triton

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
