"""What the stages of pairs minimise. InfoNCE comes fused from the kernels; here is how the engine calls it, across ranks, and
CoSENT. Ranks may bring different numbers of queries, documents and pairs, or none: each takes part in the others' collectives, forward and
backward, and a query counts the same wherever it is."""

import torch

import conan_kernels


def margin_of(settings):
    """What a stage's margin and margin_strategy are to the kernels: a Margin, or None."""
    if settings.margin_strategy == "relative":
        return conan_kernels.Margin(0.0, settings.margin)
    return conan_kernels.Margin(settings.margin) if settings.margin < 2 else None


def info_nce(queries, documents, query_group, document_group, temperature, group, dims=None, known=None, margin=None):
    """InfoNCE over the whole global batch, with the documents of every rank as in-batch negatives.

    queries [n, E] and documents [m, E] are this rank's; the positive of queries[i] is documents[i]. query_group [n] and
    document_group [m], int64: a document of a query's own group never counts as its negative, nor one of a group that `known`
    (a conan_kernels.Known of this rank's queries) names, nor, with a margin (a
    conan_kernels.Margin), one that is nearer than the positive by more than that. Returns this rank's summands (loss, accuracy) of the means over all queries;
    the sum of every rank's gradients is the gradient of the mean.
    """
    counts = group.counts(len(documents))
    documents = group.gather_with_gradient(documents, counts)
    document_group = group.gather(document_group, counts)
    target = torch.arange(len(queries), device=queries.device) + sum(counts[: group.rank])

    def of_mine():
        return conan_kernels.info_nce(
            queries, documents, target, temperature, dims=dims, query_group=query_group, document_group=document_group, known=known, margin=margin
        )

    return _summands(of_mine, queries, documents, group)


def info_nce_of_own(queries, documents, hard, temperature, group, dims=None, margin=None):
    """InfoNCE of each query over its positive, documents[i] [n, E], and its own negatives, hard[i] [n, K, E], alone. Returns as
    `info_nce`."""
    nobody = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)  # of one group, no document is a negative
    target = torch.arange(len(queries), device=queries.device)

    def of_mine():
        return conan_kernels.info_nce(queries, documents, target, temperature, dims=dims, hard=hard, query_group=nobody, document_group=nobody, margin=margin)

    return _summands(of_mine, queries, documents, group)


def _summands(of_mine, queries, documents, group):
    """Of the mean loss and accuracy over all ranks' queries, what this rank's give; of_mine(): their own mean."""
    everyone = sum(group.counts(len(queries)))
    if not len(queries):  # a mean of nothing; yet the others wait for this rank in the documents' backward
        return 0.0 * (queries.sum() + documents.sum()), torch.zeros((), device=queries.device)
    result, share = of_mine(), len(queries) / everyone
    return result.loss * share, result.accuracy * share


def cosent(first, second, score, temperature, group, dims=None):
    """CoSENT: log(1 + sum over pairs scored higher of exp((cos(lower) - cos(higher)) / T)), averaged over the dims.

    first, second [m, E] and score [m] are this rank's pairs; all ranks' pairs are compared with one another. Returns the
    loss divided by the number of ranks, so that the ranks' gradients add up to the gradient of the whole.
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
