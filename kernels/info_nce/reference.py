"""InfoNCE as a textbook writes it: a loop over dims, the full N x M matrix. The other forms are tested against it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from conan_kernels.info_nce.api import InfoNCE, Known, Margin

if TYPE_CHECKING:
    from torch import Tensor


def info_nce_reference(
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
) -> InfoNCE:
    """The same as `conan_kernels.info_nce`, in the dtype of the inputs (fp64 for a reference). Memory is O(N * (M +
    K)).
    """
    dims = dims or (queries.shape[1],)
    weights = weights or (1.0 / len(dims),) * len(dims)
    losses = []
    for dim in dims:
        similarity, logits, is_positive = similarities_and_logits(
            queries, documents, target, temperature, dim, hard, query_group, document_group, margin, known
        )
        positive = similarity[is_positive]  # [N]
        losses.append((logits.logsumexp(1) - positive / temperature).mean())
        if symmetric:  # the negatives of a document are the queries that count it as theirs
            others = logits.masked_fill(is_positive, -torch.inf)[:, : len(documents)].clamp(
                min=torch.finfo(logits.dtype).min
            )
            losses[-1] = (
                losses[-1] + torch.nn.functional.softplus(others.logsumexp(0)[target] - positive / temperature).mean()
            ) / 2
    others = logits.masked_fill(is_positive, -torch.inf).amax(1)
    accuracy = (logits[is_positive] > others).to(queries.dtype).mean()
    loss_per_dim = torch.stack(losses)
    loss = (loss_per_dim * loss_per_dim.new_tensor(weights)).sum()
    return InfoNCE(loss, loss_per_dim.detach(), positive.detach(), similarity[:, len(documents) :].detach(), accuracy)


def similarities_and_logits(
    queries: Tensor,
    documents: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    dim: int,
    hard: Tensor | None = None,
    query_group: Any = None,
    document_group: Any = None,
    margin: float | Margin | None = None,
    known: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """For one dim, over the documents and then each query's hard negatives, each [N, M + K]: similarities; logits,
    -inf for what is no candidate; and which is the positive.
    """
    margin = margin if isinstance(margin, Margin) or margin is None else Margin(margin)
    hard = queries.new_empty(len(queries), 0, queries.shape[1]) if hard is None else hard
    is_positive = torch.arange(len(documents), device=target.device) == target[:, None]  # [N, M]
    left_out = torch.zeros_like(is_positive)
    if query_group is not None:
        left_out = query_group[:, None] == document_group
        for query, (first, last) in enumerate(zip(known.first, known.last) if known else ()):
            left_out[query] |= torch.isin(document_group, known.ids[first:last])
        left_out = left_out & (document_group >= 0) & ~is_positive
    is_positive, left_out = (torch.nn.functional.pad(x, (0, hard.shape[1])) for x in (is_positive, left_out))
    q, d, h = unit(queries[:, :dim]), unit(documents[:, :dim]), unit(hard[..., :dim])
    similarity = torch.cat((q @ d.T, (h @ q[..., None])[..., 0]), dim=1)
    if margin is not None:
        positive = similarity[is_positive]
        limit = positive + margin.absolute + margin.fraction * positive.abs()
        left_out = left_out | ((similarity > limit[:, None]) & ~is_positive)
    return similarity, (similarity / temperature).masked_fill(left_out, -torch.inf), is_positive


def unit(x: Tensor) -> Tensor:
    """x over its norm; a zero vector stays zero and gets no gradient."""
    square = x.square().sum(-1, keepdim=True)
    return x * torch.where(square > 0, square, torch.inf).rsqrt()
