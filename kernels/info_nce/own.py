"""What the chunked form of InfoNCE computes row by row: prefix norms, and a query's own candidates, its positive and
its hard negatives. On CUDA rows.py does it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor


# z of a candidate that the softmax leaves out. Finite, so that 0 * LEFT_OUT is 0; its exponential, less any maximum, is
# 0 too.
LEFT_OUT = -1e30
OWN_ELEMENTS = 1 << 25  # numbers of own candidates that are widened to fp32 at a time: 128 MiB


def inverse_norms(vectors: Tensor, blocks: list[slice]) -> Tensor:
    """[..., E] -> fp32 [k, ...]: 1 / norm of each prefix; 0 for a zero prefix, so that its cosines are 0."""
    norms = [torch.linalg.vector_norm(vectors[..., block], dim=-1, dtype=torch.float32) for block in blocks]
    squares = torch.stack(norms).square().cumsum(0)
    return torch.where(squares > 0, squares, torch.inf).rsqrt()


def suffix_sum(x: Tensor) -> Tensor:
    """Sums over dims k >= b, for every b: [k, ...] -> [k, ...]."""
    return x.flip(0).cumsum(0).flip(0)


def own_similarities(
    queries: Tensor, documents: Tensor, target: Tensor, hard: Tensor, blocks: list[slice], rq: Tensor, rd: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosines and inverse norms of each query's positive (first) and hard negatives, each fp32 [k, N, 1+K]."""
    inverse = torch.cat((rd[:, target, None], inverse_norms(hard, blocks)), dim=2)
    N, K, E = hard.shape
    similarity = torch.empty_like(inverse)
    chunk = max(1, OWN_ELEMENTS // ((1 + K) * E))
    for first in range(0, N, chunk):
        rows = slice(first, first + chunk)
        dot = 0
        for b, block in enumerate(blocks):
            own = torch.cat((documents[:, block][target[rows], None], hard[rows, :, block]), dim=1).float()
            dot = dot + (own * queries[rows, None, block]).sum(2)
            similarity[b, rows] = dot
    return similarity.mul_(inverse).mul_(rq[..., None]), inverse


def margin_limits(positive: Tensor, T: float | Tensor, absolute: float, fraction: float) -> Tensor:
    """The z above which a candidate is left out, by the similarities of the positives [k, N]; on CUDA, too."""
    return (positive + absolute + fraction * positive.abs()) / T


def own_logits(similarity_own: Tensor, T: float, absolute: float, fraction: float) -> tuple[Tensor, Tensor]:
    """z = similarity / T of a query's own candidates [k, N, 1+K], without hard negatives above the margin; and the
    margin_limits [k, N].
    """
    limits = margin_limits(similarity_own[..., 0], T, absolute, fraction)
    z = similarity_own / T
    hard = z[..., 1:]
    hard.masked_fill_(hard > limits[..., None], LEFT_OUT)
    return z, limits


def softmax_of_rows(others: Tensor, z_own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax over everything a query sees.

    others [...]: log-sum-exp of z of the shared documents without the positive; z_own [..., 1+K]: of the positive and
    the hard negatives. Returns loss [...] = -log softmax of the positive, lse [...], dloss/dz_own [..., 1+K]. The
    positive enters the sum with the value that it is compared with, so the loss is never below 0; softplus keeps its
    digits where the others hardly count.
    """
    positive = z_own[..., 0]
    others = torch.cat((others[..., None], z_own[..., 1:]), dim=-1).logsumexp(-1)
    loss = F.softplus(others - positive)
    lse = positive + loss
    u_hard = torch.exp(z_own[..., 1:] - lse[..., None])
    return loss, lse, torch.cat((-torch.sigmoid(others - positive)[..., None], u_hard), dim=-1)


def add_hard_gradients(
    queries: Tensor,
    hard: Tensor,
    weighted: Tensor,
    radial: Tensor,
    blocks: list[slice],
    dqueries: Tensor,
    dhard: Tensor,
) -> None:
    """Add to dqueries (fp32 [N, E]) and write to dhard [N, K, E] the gradients through the hard negatives'
    similarities.

    weighted, radial: [k, N, K], the factors of the other side and of the own vector in each block.
    """
    for b, block in enumerate(blocks):
        w, h, q = weighted[b, ..., None], hard[..., block].float(), queries[:, None, block]
        dqueries[:, block] += (w * h).sum(1)
        dhard[..., block] = w * q - radial[b, ..., None] * h
