"""What the stages of pairs minimise. InfoNCE comes fused from the kernels; here is how the engine calls it, across ranks, and
CoSENT."""

import torch

import conan_kernels


def info_nce(queries, documents, query_group, document_group, temperature, group, dims=None, known=None):
    """InfoNCE over the whole global batch, with the documents of every rank as in-batch negatives.

    queries [n, E] and documents [m, E] are this rank's; the positive of queries[i] is documents[i]. query_group [n] and
    document_group [m], int64: a document of a query's own group never counts as its negative, nor one of a group that `known`
    (a conan_kernels.Known of this rank's queries) names. Returns (loss, accuracy)
    with loss / n summed over ranks the mean over all queries: the sum of every rank's gradients is the gradient of that.
    """
    documents = group.gather_with_gradient(documents)
    document_group = group.gather(document_group)
    per_rank = len(documents) // group.world
    target = torch.arange(len(queries), device=queries.device) + group.rank * per_rank
    result = conan_kernels.info_nce(
        queries, documents, target, temperature, dims=dims, query_group=query_group, document_group=document_group, known=known
    )
    return result.loss / group.world, result.accuracy


def info_nce_of_own(queries, documents, hard, temperature, group, dims=None):
    """InfoNCE of each query over its positive, documents[i] [n, E], and its own negatives, hard[i] [n, K, E], alone. Returns as
    `info_nce`."""
    nobody = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)  # of one group, no document is a negative
    target = torch.arange(len(queries), device=queries.device)
    result = conan_kernels.info_nce(
        queries, documents, target, temperature, dims=dims, hard=hard, query_group=nobody, document_group=nobody
    )
    return result.loss / group.world, result.accuracy


def cosent(first, second, score, temperature, group, dims=None):
    """CoSENT: log(1 + sum over pairs scored higher of exp((cos(lower) - cos(higher)) / T)), averaged over the dims.

    first, second [m, E] and score [m] are this rank's pairs; all ranks' pairs are compared with one another. Returns the
    loss divided by the number of ranks, so that the ranks' gradients add up to the gradient of the whole.
    """
    score = group.gather(score)
    higher = score[:, None] > score[None, :]  # [M, M]: row scored above column
    losses = []
    for dim in dims or [first.shape[1]]:
        cosine = torch.nn.functional.cosine_similarity(first[:, :dim], second[:, :dim])
        cosine = group.gather_with_gradient(cosine) / temperature  # [M]
        difference = (cosine[None, :] - cosine[:, None])[higher]
        losses.append(torch.logsumexp(torch.cat((difference.new_zeros(1), difference)), dim=0))
    return torch.stack(losses).mean() / group.world
