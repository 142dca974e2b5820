"""Gather the documents of all ranks as negatives for each rank's queries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch import Tensor


def gather_documents(documents: Tensor, group: Any = None) -> Tensor:
    """Concatenate every rank's documents [m, ...] to [world * m, ...], with gradient.

    Args:
        documents: m and the dtype are the same on all ranks.
        group: a process group; the world by default.

    Returns:
        On every rank, row r * m + j is row j of rank r. Labels must follow this order: with another, the loss silently
            trains on wrong positives (sentence-transformers pull 3453). Without torch.distributed, or with one rank,
            documents is returned as it is.

    The backward pass is a reduce-scatter: each rank receives, for its own rows, the sum of all ranks' gradients. For
    their mean, divide the losses by the number of ranks. A collective in both directions.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return documents
    return _Gather.apply(documents, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, documents, group):
        ctx.group, ctx.shape = group, documents.shape
        everyones = documents.new_empty(dist.get_world_size(group) * len(documents), *documents.shape[1:])
        dist.all_gather_into_tensor(everyones, documents.contiguous(), group)
        return everyones

    @staticmethod
    def backward(ctx, gradient):
        mine = gradient.new_empty(ctx.shape)
        dist.reduce_scatter_tensor(mine, gradient.contiguous(), group=ctx.group)
        return mine, None
