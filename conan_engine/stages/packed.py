"""Sequences end to end, as a step has them, and the pieces that a rank computes at a time."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from conan_engine.config import Stage as StageSettings
    from conan_engine.data.loader import Batch
    from conan_engine.parallel.mesh import Group


class Packed(NamedTuple):
    """Sequences end to end: tokens int32 [T], cu_seqlens int32 [B+1]."""

    tokens: torch.Tensor
    cu_seqlens: torch.Tensor

    def cut(self, settings: StageSettings, rows: Tensor | None = None) -> tuple[list[Packed], Tensor | None]:
        """What a rank computes at a time, as settings.chunk or settings.chunk_tokens says: (pieces, order).

        order: None, or int64 [B]: sequence i of the pieces is sequence order[i] here. rows: as in `split`. On a CPU
        each piece is sorted by length: attention takes neighbours of one length together.
        """
        if settings.chunk_tokens:
            parts, order = self.split_by_tokens(settings.chunk_tokens)
        else:
            parts, order = self.split(settings.chunk, rows), None
        if self.tokens.is_cuda or order is not None:  # split_by_tokens has sorted them
            return parts, order
        within = [part.cu_seqlens.diff().argsort(stable=True) for part in parts]
        firsts = accumulate((len(one) for one in within), initial=0)
        moved = torch.cat([first + one for first, one in zip(firsts, within)])
        parts = [part.taken(one) for part, one in zip(parts, within)]
        return parts, moved

    def split(self, chunk: int, rows: Tensor | None = None) -> list[Packed]:
        """Cut into pieces of at most `chunk` sequences; 0 gives one piece.

        With `rows`, int32 [R+1], pieces have at most `chunk` rows instead; rows[r] is the first sequence of row r, and
        rows[R] the number of sequences. The pieces are views on the same device.
        """
        count = len(self.cu_seqlens) - 1 if rows is None else len(rows) - 1
        if chunk == 0 or count <= chunk:
            return [self]
        edges = [*range(0, count, chunk), count]
        return self._between(edges if rows is None else rows[edges].tolist())

    def split_by_tokens(self, most: int) -> tuple[list[Packed], Tensor | None]:
        """Cut into pieces of at most `most` tokens, as `cut` returns them; a longer sequence is a piece of its own.

        Sequences of similar length come together, the longest first. All pieces but the first are full: ranks exchange
        gradients during the last one.
        """
        lengths = self.cu_seqlens.diff().cpu()
        if len(lengths) < 2 or lengths.sum() <= most:
            return [self], None
        order = lengths.argsort(stable=True, descending=True)
        edges, filled = [len(order)], 0
        for i, length in reversed(list(enumerate(lengths[order].tolist()))):
            if filled + length > most and i + 1 < edges[-1]:
                edges.append(i + 1)
                filled = 0
            filled += length
        order = order.to(self.cu_seqlens.device)
        return self.taken(order)._between([0, *reversed(edges)]), order

    def taken(self, order: Tensor) -> Packed:
        """The sequences in another order, int64 [B]."""
        lengths, starts = self.cu_seqlens.diff()[order], self.cu_seqlens[order]
        cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        count = len(self.tokens)
        before = (starts - cu_seqlens[:-1]).repeat_interleave(lengths, output_size=count)
        return Packed(self.tokens[before + torch.arange(count, device=before.device)], cu_seqlens)

    def _between(self, edges: list[int]) -> list[Packed]:
        bounds = self.cu_seqlens[edges].tolist()
        return [
            Packed(self.tokens[start:end], self.cu_seqlens[first : last + 1] - start)
            for first, last, start, end in zip(edges, edges[1:], bounds, bounds[1:])
        ]


def packed(batch: Batch) -> Packed:
    """The sequences of a batch."""
    return Packed(batch.tokens, batch.cu_seqlens)


def nothing(batch: Batch) -> Batch:
    """A batch of the same source without records."""
    return batch._replace(
        tokens=batch.tokens[:0], cu_seqlens=batch.cu_seqlens[:1], records=batch.records[:0], groups=batch.groups[:0]
    )


def concatenate(*parts) -> Packed:
    """The sequences of all parts, one part after another."""
    cu_seqlens, end = [parts[0].cu_seqlens], parts[0].cu_seqlens[-1]
    for part in parts[1:]:
        cu_seqlens.append(part.cu_seqlens[1:] + end)
        end = end + part.cu_seqlens[-1]
    return Packed(torch.cat([part.tokens for part in parts]), torch.cat(cu_seqlens))


def sizes(packed: Packed, group: Group, both_ways: bool, learnt: int | Tensor = 0) -> dict[str, int]:
    """Counts over the sequences of all ranks: tokens, pairs of tokens that attend to each other, and learned tokens.

    both_ways: each of the two tokens attends to the other.
    """
    lengths = packed.cu_seqlens.diff().long()
    tokens, squares = group.sum(torch.stack((lengths.sum(), lengths.square().sum()))).tolist()
    return {"tokens": tokens, "pairs": squares if both_ways else (squares + tokens) // 2, "learnt": int(learnt)}
