"""The LM head and its cross entropy, a chunk of tokens at a time: all logits at V = 150,000 would fill the memory."""

from __future__ import annotations

import torch
from torch import Tensor

from conan_engine.parallel.mesh import Group
from conan_engine.parallel.tensor_parallel import own
from conan_kernels import pointwise, products

# Logits of a chunk. At V = 150,000: on a CPU 224 tokens, 128 MiB in fp32; on a GPU, whose products need many rows,
# 3,579 tokens, 1 GiB in bf16
CHUNK_LOGITS = {"cpu": 1 << 25, "cuda": 1 << 29}


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, group: Group | None = None
) -> tuple[Tensor, Tensor]:
    """Cross entropy of softmax(hidden @ weight.T), summed over the tokens whose target counts. T x V is never in
    memory.

    Args:
        hidden: [T, C].
        weight: [V, C]; cast to the dtype of hidden for the products.
        targets: int64 [T], in 0..V-1 or ignore_index.
        group: the ranks that share the vocabulary (tensor parallelism). Each brings the same hidden and targets, and
            its own V / N rows of weight. The loss is the same on all; each rank's gradient of hidden is a summand of
            the whole. Per token, they exchange the largest logit, the sum of the exponentials and the target's logit.

    Returns:
        (fp32 sum, int64 count), both scalars. The gradient flows from the sum to hidden and weight, in their dtypes;
            one backward pass per forward pass.

    Raises:
        ValueError: for shapes or targets that do not fit. Targets are checked on a CPU only: on CUDA a check would
            synchronise, and a device assertion stops the run.
    """
    group = group or Group()
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()  # otherwise gradients would be computed that nobody uses
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        shapes = [list(x.shape) for x in (hidden, weight, targets)]
        raise ValueError(
            f"hidden [T, C], weight [V, C] and targets [T] expected, got {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    # in fine-tuning most targets do not count: skip their logits
    rows = (targets != ignore_index).nonzero()[:, 0]
    targets = targets[rows]
    V = len(weight) * group.world
    if not targets.is_cuda and len(targets) and not 0 <= targets.min() <= targets.max() < V:
        raise ValueError(f"targets in 0..{V - 1} expected, got {targets.min()}..{targets.max()}")
    return _LinearCrossEntropy.apply(hidden[rows], weight, targets, group), torch.tensor(
        len(rows), device=hidden.device
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """Compute the gradient along with the loss, chunk by chunk, while the logits exist: three products instead of four.

    Why not torch.nn.functional.linear_cross_entropy, which has a chunked form since 2.13: forward and backward of 2,048
    tokens at C = 1,024, V = 50,000 in fp32 on one core take it 11.6 s and 569 MiB beside the inputs, the whole logits
    9.1 s and 1,190 MiB, this 7.5 s and 497 MiB (of which gradients 203 MiB); and it does not skip tokens that do not
    count. On CUDA, softmax and gradient are one kernel each, which overwrite the logits in the dtype of the products.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, group):
        chunk = max(1, CHUNK_LOGITS[hidden.device.type] // len(weight))
        cast = weight.to(hidden.dtype)
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dweight = torch.empty_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        if dweight is not None and len(hidden) == 0:
            dweight.zero_()
        loss = torch.zeros((), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for first in range(0, len(hidden), chunk):
                rows = slice(first, first + chunk)
                index, here = own(targets[rows, None], len(weight), group)
                of_chunk, p = (_fused if hidden.is_cuda else _plain)(hidden[rows] @ cast.T, index, here, group)
                loss += of_chunk
                if dhidden is not None:
                    dhidden[rows] = p @ cast
                if dweight is not None:
                    products.add_product_(dweight, p.T, hidden[rows], first == 0)
                del p  # or it would be there while the next chunk's logits are computed
        ctx.gradients, ctx.dtype = (dhidden, dweight), weight.dtype
        return loss

    @staticmethod
    def backward(ctx, gradient):
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: one backward a forward; its gradients were scaled in place")
        dhidden, dweight = ctx.gradients
        ctx.gradients = None  # in place: V x C in fp32 is 2 GB at the paper's shape
        return (
            None if dhidden is None else dhidden.mul_(gradient),
            None if dweight is None else _scaled(dweight, gradient, ctx.dtype),
            None,
            None,
        )


def _scaled(x, factor, dtype):
    """x * factor in that dtype; in place where it has it already."""
    return x.mul_(factor) if x.dtype == dtype else pointwise.add_(torch.empty_like(x, dtype=dtype), x, True, factor)


def _plain(logits, index, here, group):
    """(summed loss, gradient of the logits in their dtype) of logits [n, V]; index int64 and here bool [n, 1] as in
    `own`.
    """
    dtype, logits = logits.dtype, logits.float()
    logits -= group.max(logits.amax(1, keepdim=True))
    of_target = logits.gather(1, index) * here
    p = logits.exp_()
    total, of_target = group.sum(torch.stack((p.sum(1, keepdim=True), of_target)))
    return (total.log() - of_target).sum(), p.div_(total).scatter_add_(1, index, -here.to(p.dtype)).to(dtype)


def _fused(logits, index, here, group):
    """The same as `_plain`; the gradient overwrites the logits."""
    of_target = (logits.gather(1, index) * here)[:, 0].float()
    own_peak, total = pointwise.softmax_sums(logits)
    peak = group.max(own_peak.clone())
    total, of_target = group.sum(torch.stack((total * (own_peak - peak).exp(), of_target)))
    lse = peak + total.log()
    return (lse - of_target).sum(), pointwise.softmax_minus_target_(logits, lse, index.where(here, -1)[:, 0])
