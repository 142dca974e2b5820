"""Tensor parallelism by hand: N ranks share one copy of the model (Megatron-LM, arXiv 1909.08053), and between the
halves of a block they share out the tokens as well (sequence parallelism, arXiv 2205.05198).

    this rank's tokens   x [T/N, C] -> norm -> gather ->
    all tokens           [T, C] -> columns -> its heads, or its part of the FFN -> rows -> [T, C] -> scatter ->
    this rank's tokens   + x [T/N, C]

The first matrix of a half is cut by columns, its outputs: each rank computes its own heads, or its own part of the FFN,
without the others. The second is cut by rows, its inputs: each rank's result is a summand. `scatter` adds the summands
and leaves each rank its tokens; `gather` brings all tokens together; each is the other's gradient. So a half costs one
reduce-scatter and one all-gather in each direction, the traffic of one all-reduce, and norms and residuals are computed
once, not N times.

The token table, which is also the LM head, is cut by vocabulary: a rank looks up the tokens that it has, with zeros for
the others, and `scatter` adds up. For the cross entropy the ranks exchange three numbers per token (lm_head.py).

A parameter that is cut has `.split_by`. One that is not cut (norms) is on every rank, which has the gradient of its own
tokens only; sharded_adamw.py adds these up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from conan_engine.parallel.cpu_linear import Linear
from conan_engine.parallel.mesh import Group

if TYPE_CHECKING:
    from torch import Tensor


class Split(NamedTuple):
    """How a parameter is cut: along `dim`, each rank has 1 / N of each of its `sections` (sizes, one after another)."""

    dim: int
    sections: tuple

    def cut(self, whole: Tensor, group: Group) -> Tensor:
        """This rank's part of the whole."""
        if group.world == 1:
            return whole
        return torch.cat(
            [section.chunk(group.world, self.dim)[group.rank] for section in whole.split(self.sections, self.dim)],
            self.dim,
        )

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole from the parts of all ranks, in rank order."""
        each = [part.split([size // len(parts) for size in self.sections], self.dim) for part in parts]
        return torch.cat([piece for section in zip(*each) for piece in section], self.dim)


class TensorParallel:
    """What a model is built from, for the ranks of `group`; with one rank, plain layers and identities."""

    def __init__(self, group: Group | None = None) -> None:
        self.group = group or Group()

    def columns(self, inputs: int, *outputs) -> nn.Linear:
        """A linear layer without bias to several outputs side by side; this rank computes 1 / N of each."""
        return self._linear(inputs, sum(outputs) // self.group.world, Split(0, outputs))

    def rows(self, inputs: int, outputs: int) -> nn.Linear:
        """A linear layer without bias, whose inputs are what `columns` left on each rank; its output is a summand."""
        return self._linear(inputs // self.group.world, outputs, Split(1, (inputs,)))

    def table(self, rows: int, width: int) -> nn.Parameter:
        """A parameter [rows / N, width]: the vectors of this rank's part of the vocabulary."""
        table = nn.Parameter(torch.empty(rows // self.group.world, width))
        table.split_by = Split(0, (rows,))
        return table

    @staticmethod
    def _linear(inputs, outputs, split):
        linear = Linear(inputs, outputs)
        linear.weight.split_by = split
        return linear

    def mine(self, total: int) -> slice:
        """The slice of this rank's tokens among `total`. The first ranks have ceil(T / N) tokens, the last ones the
        rest.
        """
        each = -(-total // self.group.world)
        return slice(min(self.group.rank * each, total), min((self.group.rank + 1) * each, total))

    def look_up(self, tokens: Tensor, table: Tensor) -> Tensor:
        """The vectors [T/N, C] of this rank's tokens among int64 [T]."""
        if self.group.world == 1:
            return F.embedding(tokens, table)
        tokens, here = own(tokens, len(table), self.group)
        return self.scatter(F.embedding(tokens, table) * here[:, None])

    def gather(self, x: Tensor, total: int) -> Tensor:
        """[T/N, ...] -> [T, ...], in the dtype of the products. The gradients of all ranks' uses add up."""
        if self.group.world == 1:
            return x
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Gather.apply(x, self.group, total)

    def scatter(self, x: Tensor) -> Tensor:
        """Summands [T, ...] of every rank -> this rank's tokens [T/N, ...] of their sum."""
        return x if self.group.world == 1 else _Scatter.apply(x, self.group)

    def sum(self, x: Tensor) -> Tensor:
        """Summands of every rank -> their sum, on every rank. All use it alike, so the gradient is the same on each."""
        return x if self.group.world == 1 else _Sum.apply(x, self.group)


def own(ids: Tensor, size: int, group: Group) -> tuple[Tensor, Tensor]:
    """(index, here) of ids, int64, in a vocabulary of which each rank has `size`: their rows in this rank's part, 0
    for others; and whether they are in it.
    """
    place = ids - group.rank * size
    here = (place >= 0) & (place < size)
    return place.where(here, 0), here


# T need not be a multiple of N: only while sent, the last ranks' tokens are padded with zeros.


def _filled(x, rows):
    return x if len(x) == rows else F.pad(x, (0, 0) * (x.dim() - 1) + (0, rows - len(x)))


def _gathered(x, group, total):
    return group.gather(_filled(x, -(-total // group.world)))[:total]


def _scattered(x, group):
    each = -(-len(x) // group.world)
    here = max(0, min(each, len(x) - group.rank * each))
    return group.reduce_scatter(_filled(x, each * group.world))[:here]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, total):
        ctx.group = group
        return _gathered(x, group, total)

    @staticmethod
    def backward(ctx, gradient):
        return _scattered(gradient, ctx.group), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.total = group, len(x)
        return _scattered(x, group)

    @staticmethod
    def backward(ctx, gradient):
        return _gathered(gradient, ctx.group, ctx.total), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return group.sum(x.clone())

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None
