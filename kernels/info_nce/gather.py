"""Documents of all ranks as negatives for each rank's queries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch import Tensor


def gather_documents(documents: Tensor, group: Any = None) -> Tensor:
    """Every rank's documents [m, ...] as one tensor [world * m, ...], with gradient; m and the dtype are the same on
    all.

    Rank r's row j is row r * m + j of the result, on every rank: labels are to be made by this order (where they assume
    another, the loss trains on wrong positives without a sound; sentence-transformers pull 3453). Backward
    reduce-scatters: each rank receives, for its own rows, the sum of all ranks' gradients, so the ranks' losses are to
    be divided by the number of ranks if their mean is meant. `group`: a process group, default the world; a collective
    call in both directions. Without torch.distributed, or with one rank, documents is returned as it is.
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
