"""What the stages of pairs minimise. InfoNCE comes fused from the kernels; here is how the engine calls it, across
ranks, and CoSENT. Ranks may bring different numbers of queries, documents and pairs, or none: each takes part in the
others' collectives, forward and backward, and a query counts the same wherever it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

import conan_kernels

if TYPE_CHECKING:
    from torch import Tensor

    from conan_engine.config import Supervised, Weak
    from conan_engine.parallel.mesh import Group
    from conan_kernels import Known, Margin


def margin_of(settings: Weak | Supervised) -> Margin | None:
    """What a stage's margin and margin_strategy are to the kernels: a Margin, or None."""
    if settings.margin_strategy == "relative":
        return conan_kernels.Margin(0.0, settings.margin)
    return conan_kernels.Margin(settings.margin) if settings.margin < 2 else None


def info_nce(
    queries: Tensor,
    documents: Tensor,
    query_group: Tensor,
    document_group: Tensor,
    temperature: float,
    group: Group,
    dims: Sequence[int] | None = None,
    known: Known | None = None,
    margin: Margin | None = None,
    symmetric: bool = False,
    same_side: bool = False,
) -> tuple[Tensor, Tensor]:
    """InfoNCE over the whole global batch, with the documents of every rank as in-batch negatives.

    queries [n, E] and documents [m, E] are this rank's; the positive of queries[i] is documents[i]. query_group [n] and
    document_group [m], int64: a document of a query's own group never counts as its negative, nor one of a group that
    `known` (a conan_kernels.Known of this rank's queries) names, nor, with a margin (a conan_kernels.Margin), one that
    is nearer than the positive by more than that. symmetric: each positive also finds its query, the mean of both ways;
    negatives of a document are the queries whose it is. same_side: the other queries are negatives of a query, too,
    and, with symmetric, the other documents of a document; a query counts as its positive, and what is right for a
    query is no negative of its positive (arXiv 2308.03281 has all four in one sum; here they are two to two). Returns
    this rank's summands (loss, accuracy) of the means over all queries; the sum of every rank's gradients is the
    gradient of the mean.
    """
    counts, dims = group.counts(len(documents)), dims or [queries.shape[1]]
    everyones, groups = group.gather_with_gradient(documents, counts), group.gather(document_group, counts)
    candidates, of_candidates, beside = everyones, groups, None
    target = torch.arange(len(documents), device=queries.device) + sum(counts[: group.rank])
    if same_side:
        of_queries = group.counts(len(queries))
        candidates = torch.cat((candidates, group.gather_with_gradient(queries, of_queries)))
        of_candidates = torch.cat((groups, group.gather(query_group, of_queries)))
        if symmetric:
            rest = (0, len(documents) - len(queries))
            of_positives = known and conan_kernels.Known(
                torch.nn.functional.pad(known.first, rest), torch.nn.functional.pad(known.last, rest), known.ids
            )
            beside = NOTHING + 0.0 * everyones.sum().expand(len(dims), len(everyones))
            if len(documents):
                beside = conan_kernels.log_sum_exp_of_documents(
                    documents, everyones, target, temperature, dims, document_group, groups, of_positives
                )
            beside = _over_ranks(beside, group)

    def combine(columns):
        columns = _over_ranks(columns[:, : len(everyones)], group)
        return columns if beside is None else torch.logaddexp(columns, beside)

    def of_mine():
        return conan_kernels.info_nce(
            queries, candidates, target[: len(queries)], temperature, dims=dims, query_group=query_group,
            document_group=of_candidates, known=known,
            margin=margin, symmetric=symmetric, combine=combine,
        )  # fmt: skip

    def of_nothing():
        return (
            combine(NOTHING + 0.0 * candidates.sum().expand(len(dims), len(candidates))).sum()
            if symmetric
            else candidates.sum()
        )

    return _summands(of_mine, queries, group, of_nothing)


NOTHING = -1e20  # log of it


def _over_ranks(columns, group):
    """Log-sum-exps [k, M] over this rank's queries -> over all ranks'."""
    return group.gather_with_gradient(columns[None], [1] * group.world).logsumexp(0)


def info_nce_of_own(
    queries: Tensor,
    documents: Tensor,
    hard: Tensor,
    temperature: float,
    group: Group,
    dims: Sequence[int] | None = None,
    margin: Margin | None = None,
) -> tuple[Tensor, Tensor]:
    """InfoNCE of each query over its positive, documents[i] [n, E], and its own negatives, hard[i] [n, K, E], alone.
    Returns as `info_nce`."""
    # of one group, no document is a negative
    nobody = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    target = torch.arange(len(queries), device=queries.device)

    def of_mine():
        return conan_kernels.info_nce(
            queries,
            documents,
            target,
            temperature,
            dims=dims,
            hard=hard,
            query_group=nobody,
            document_group=nobody,
            margin=margin,
        )

    return _summands(of_mine, queries, group, documents.sum)


def _summands(of_mine, queries, group, of_nothing):
    """Of the mean loss and accuracy over all ranks' queries, what this rank's give. of_mine(): their own mean;
    of_nothing(): a number that takes part in the same collectives, forward and backward."""
    everyone = sum(group.counts(len(queries)))
    if not len(queries):  # a mean of nothing; yet the others wait for this rank
        return 0.0 * (queries.sum() + of_nothing()), torch.zeros((), device=queries.device)
    result, share = of_mine(), len(queries) / everyone
    return result.loss * share, result.accuracy * share


def distil(
    queries: Tensor,
    documents: Tensor,
    targets: Tensor,
    kind: str,
    temperature: float,
    scale: float,
    group: Group,
    dims: Sequence[int] | None = None,
) -> Tensor:
    """How far the model's cosines of each query with its documents are from a teacher's scores, averaged over all
    ranks' queries and the dims.

    queries [n, E]; documents [n, 1+K, E]: the positive, then its own negatives; targets float32 [n, 1+K], on the CPU:
    what the teacher says of them, NaN for nothing. A score over `scale` stands for what a cosine over `temperature` is
    to be. kind: "kl", from the teacher's softmax to the model's, of what it has scored; or "margin_mse" (arXiv
    2010.02666), the squared difference of the positive's lead over a negative, as cosines, averaged over the query's
    negatives. A query without a score of its positive and a negative adds nothing. Returns this rank's summand.
    """
    everyone = max(1, sum(group.counts(len(queries))))
    said = ~targets.isnan()
    rows = (said[:, 0] & said[:, 1:].any(1)).nonzero()[:, 0]
    teacher, said = ((x[rows]).to(queries.device) for x in (targets.nan_to_num() / scale, said))
    rows = rows.to(queries.device)
    queries, documents = queries[rows, None].float(), documents[rows].float()
    losses = []
    for dim in dims or [queries.shape[-1]]:
        model = torch.nn.functional.cosine_similarity(queries[..., :dim], documents[..., :dim], dim=-1) / temperature
        if kind == "kl":
            wanted, found = (x.masked_fill(~said, -1e30).log_softmax(1) for x in (teacher, model))
            of_query = (wanted.exp() * (wanted - found)).sum(1)
        else:
            lead, wanted = (x[:, :1] - x[:, 1:] for x in (model, teacher))
            of_query = ((lead - wanted) * temperature).square().mul(said[:, 1:]).sum(1) / said[:, 1:].sum(1)
        losses.append(of_query.sum())
    return torch.stack(losses).mean() / everyone


def toward(vectors: Tensor, targets: Tensor, group: Group) -> Tensor:
    """1 - cosine of the first numbers of each vector [n, E] with a teacher's [n, D], averaged over all ranks' texts;
    this rank's summand."""
    cosine = torch.nn.functional.cosine_similarity(vectors[:, : targets.shape[1]].float(), targets, dim=-1)
    return (1 - cosine).sum() / max(1, sum(group.counts(len(vectors))))


def cosent(
    first: Tensor, second: Tensor, score: Tensor, temperature: float, group: Group, dims: Sequence[int] | None = None
) -> Tensor:
    """CoSENT: log(1 + sum over pairs scored higher of exp((cos(lower) - cos(higher)) / T)), averaged over the dims.

    first, second [m, E] and score [m] are this rank's pairs; all ranks' pairs are compared with one another. Returns
    the loss divided by the number of ranks, so that the ranks' gradients add up to the gradient of the whole.
    """
    counts = group.counts(len(score))
    score = group.gather(score, counts)
    higher = score[:, None] > score[None, :]  # [M, M]: row scored above column
    losses = []
    for dim in dims or [first.shape[1]]:
        cosine = torch.nn.functional.cosine_similarity(first[:, :dim], second[:, :dim])
        cosine = group.gather_with_gradient(cosine, counts) / temperature  # [M]
        difference = (cosine[None, :] - cosine[:, None])[higher]
        losses.append(torch.logsumexp(torch.cat((difference.new_zeros(1), difference)), dim=0))
    return torch.stack(losses).mean() / group.world
