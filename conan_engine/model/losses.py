"""The losses of the contrastive stages: InfoNCE over all ranks, CoSENT, and distillation.

InfoNCE itself is a fused kernel (conan_kernels). Ranks may bring different numbers of queries, documents and pairs, or
none: each takes part in the collectives of the others, forward and backward, and every query counts the same.
"""

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
    """The margin of a stage as the kernels take it: a Margin, or None."""
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

    Args:
        queries: [n, E], this rank's.
        documents: [m, E], this rank's; the positive of queries[i] is documents[i].
        query_group: int64 [n]. A document of a query's own group is never its negative.
        document_group: int64 [m].
        temperature: cosines are divided by it.
        group: the ranks.
        dims: Matryoshka dims, over which the loss is averaged; None is the whole vector.
        known: the groups that are right for this rank's queries, whose documents are never their negatives.
        margin: documents that are nearer than the positive by more than this are no negatives.
        symmetric: each positive also looks for its query among all queries that it is not right for; the loss is the
            mean of both directions.
        same_side: the other queries are negatives of a query too; with symmetric, the other documents of a document.
            GTE (arXiv 2308.03281) has all four in one sum; here they are two sums of two.

    Returns:
        This rank's summands (loss, accuracy) of the means over all queries. The sum of all ranks' gradients is the
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


NOTHING = -1e20  # the logarithm of no weight at all


def _over_ranks(columns, group):
    """Combine log-sum-exps [k, M] over this rank's queries into those over all ranks' queries."""
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
    """InfoNCE of each query over its positive and its own hard negatives alone.

    queries [n, E]; documents [n, E], the positives; hard [n, K, E]. Returns what `info_nce` returns.
    """
    # with a single group, no other document is a negative
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
    """This rank's summands of the mean loss and accuracy over all ranks' queries.

    of_mine() gives the means over its own queries; of_nothing() gives a number that takes part in the same collectives,
    forward and backward, for a rank without queries.
    """
    everyone = sum(group.counts(len(queries)))
    if not len(queries):  # no queries here, but the other ranks wait for this one
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
    """The distance of the model's cosines of each query with its documents from a teacher's scores.

    Args:
        queries: [n, E].
        documents: [n, 1+K, E]: the positive, then the query's own hard negatives.
        targets: float32 [n, 1+K] on the CPU, the teacher's scores; NaN where it gave none.
        kind: "kl", the divergence of the model's softmax from the teacher's over the documents that it scored; or
            "margin_mse" (arXiv 2010.02666), the squared difference between the positive's lead over a negative, as
            cosines, and the teacher's, averaged over the query's negatives.
        temperature: of the model's cosines.
        scale: of the teacher's scores: score / scale is the target of cosine / temperature.
        group: the ranks.
        dims: Matryoshka dims.

    Returns:
        This rank's summand of the mean over all ranks' queries and the dims. A query without a score of its positive
            and of a negative adds nothing.
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
    """1 - cosine of the first D numbers of each vector [n, E] with a teacher's vector [n, D].

    Returns this rank's summand of the mean over all ranks' texts.
    """
    cosine = torch.nn.functional.cosine_similarity(vectors[:, : targets.shape[1]].float(), targets, dim=-1)
    return (1 - cosine).sum() / max(1, sum(group.counts(len(vectors))))


def cosent(
    first: Tensor, second: Tensor, score: Tensor, temperature: float, group: Group, dims: Sequence[int] | None = None
) -> Tensor:
    """CoSENT: log(1 + sum over pairs scored higher of exp((cos(lower) - cos(higher)) / T)), averaged over the dims.

    first, second [m, E] and score [m] are this rank's pairs; the pairs of all ranks are compared with one another.
    Returns the loss divided by the number of ranks, so that the ranks' gradients add up to the gradient of the whole.
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
