"""What the operators of both forms of InfoNCE take and return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


# What they take first, and the settings that follow, as a schema of torch.library.
INPUTS = (
    "Tensor queries, Tensor documents, Tensor target, Tensor temperature, Tensor hard, Tensor? query_group, "
    "Tensor? document_group, Tensor? known_first, Tensor? known_last, Tensor? known_ids"
)
SETTINGS = "SymInt[] dims, float[] weights, float absolute, float fraction"


def operands(
    queries: Tensor,
    documents: Tensor,
    target: Tensor,
    temperature: Tensor,
    dims: Sequence[int],
    weights: Sequence[float],
    hard: Tensor | None,
    query_group: Tensor | None,
    document_group: Tensor | None,
    known: Any,
    margin: Any,
) -> tuple:
    """The arguments of `conan_kernels.info_nce` as INPUTS and SETTINGS list them, each tensor contiguous."""
    hard = queries.new_empty(len(queries), 0, queries.shape[1]) if hard is None else hard
    groups = query_group, document_group, *(known or (None, None, None))
    tensors = (x if x is None else x.contiguous() for x in (queries, documents, target, temperature, hard, *groups))
    return *tensors, list(dims), list(weights), margin.absolute, margin.fraction


def schema(arguments: str, results: int) -> str:
    """The schema of an operator that returns `results` tensors."""
    return f"({arguments}) -> ({', '.join(['Tensor'] * results)})"


def empty_results(queries: Tensor, documents: Tensor, hard: Tensor, k: int, both_ways: bool) -> tuple[Tensor, ...]:
    """Empty fp32 tensors for what both forms return first, for k dims.

    loss [], loss_per_dim [k], positive [N], hard [N, K], accuracy []; z of the positives [k, N] and log-sum-exps of the
    columns [k, M], both [0] without both_ways.
    """
    (N, K, _), M = hard.shape, len(documents)
    of_columns = ((k, N), (k, M)) if both_ways else ((0,), (0,))
    return tuple(queries.new_empty(shape, dtype=torch.float32) for shape in ((), (k,), (N,), (N, K), (), *of_columns))


def blocks_of(dims: Sequence[int]) -> list[slice]:
    """The column slices between one prefix width and the next."""
    return [slice(a, b) for a, b in zip((0, *dims), dims)]
