"""Batches for a stage. C++ threads (csrc/batches/loader.h) plan, pack and read them while the step before computes.

What a step holds depends on the seed, the sources and the step alone: not on ranks, threads, or where a run was
stopped. Every step draws from one source, so that in-batch negatives are of one kind and hard; steps are shared out in
exact proportion. A source is an endless series of epochs, each in a seeded permutation that is computed as needed.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from conan_engine import _loader
from conan_engine.data.shards import order
from conan_engine.data.unpack import Unpacker

if TYPE_CHECKING:
    from conan_engine.data.shards import Shards


class Batch(NamedTuple):
    """One rank's part of a step: T tokens in B sequences, end to end.

    tokens, cu_seqlens, positions, targets and mask are on the rank's device, the rest on the CPU. Where a record is one
    sequence (text, instruction), its fields follow each other in it; elsewhere field f of record r is sequence f * n +
    r.
    """

    source: str
    tokens: torch.Tensor  # int32 [T]
    cu_seqlens: torch.Tensor  # int32 [B+1]
    positions: torch.Tensor  # int32 [T], the position of each token in its sequence
    fields: torch.Tensor  # int32 [F+1], each field's first token, then T
    # int32 [T], the next token, -100 where there is none to learn; for text, instruction
    targets: torch.Tensor | None
    mask: torch.Tensor | None  # bool [T], whether there is a target
    rows: torch.Tensor | None  # int32 [R+1], each packed row's first sequence, then B
    records: np.ndarray  # int64 [n], the records' numbers in the source
    groups: torch.Tensor  # int64 [n]
    scores: torch.Tensor  # float32 [n]


class Loader:
    """An endless stream of batches; `next` returns one per step.

    Args:
        shards: {name: Shards}, all of `kind` (a key of shards.FIELDS).
        weights: {name: float}; a source's share of the steps is proportional to weight * records ** size_power.
        shape, batch: what a step holds over all ranks. "rows": so many rows of max_tokens tokens, into which records
            are packed by best fit, and split where longer (text). "records": so many records. "tokens": as many records
            as so many tokens hold, a multiple of the ranks.
        max_tokens: fields are cut there (pairs, sts).
        fields: only the first so many fields of a record.
        skip_bad_records: leave out damaged records (pairs, sts: replaced by another of the batch), report them on
            stderr, and count them in `skipped`.

    `state`, an int64 array, is the position after the last batch returned. Set before the first `next`, the stream
    continues from there, on any number of ranks. Raises UserError, naming shard and record, for damage and for a record
    that does not fit.
    """

    def __init__(
        self,
        shards: dict[str, Shards],
        weights: dict[str, float],
        *,
        kind: str,
        shape: str,
        batch: int,
        seed: int,
        group: Any,
        threads: int,
        max_tokens: int = 0,
        fields: int = 2,
        size_power: float = 0.0,
        skip_bad_records: bool = False,
    ) -> None:
        self.names, self.shards, self.batch, self.seed = list(weights), shards, batch, seed
        self.weights = [weight * len(shards[name]) ** size_power for name, weight in weights.items()]
        self.options = {
            "kind": kind, "shape": getattr(_loader.Shape, shape), "batch": batch, "max_tokens": max_tokens,
            "fields": fields, "multiple": group.world,
            "seed": seed % 2**64, "rank": group.rank, "world": group.world, "skip_bad_records": skip_bad_records,
            "threads": threads, "ahead": threads + 2,
        }  # fmt: skip
        # Ids go to a GPU as they are stored, if the extension was built with nvcc; otherwise, and where not everything
        # is learned, the CPU widens them.
        narrow = group.device.type == "cuda" and _loader.has_cuda and kind != "instruction"
        self.unpacker = Unpacker(group.device) if narrow else None
        self.options["raw"] = self.unpacker is not None
        self.device, self.state, self.skipped = group.device, None, 0
        self._stream: Any = None

    def next(self) -> Batch:
        """The Batch of the next step; its tensors stay valid as long as something refers to them. Ctrl-C interrupts
        it.
        """
        if self._stream is None:
            sets = [self.shards[name].mapped for name in self.names]
            self._stream = _loader.Loader(sets=sets, weights=self.weights, step=0, state=self.state, **self.options)
        batch = self._stream.next()
        self.state = batch["state"]
        for what in batch["skipped"]:
            print(f"left out: {what}", file=sys.stderr, flush=True)
        self.skipped += len(batch["skipped"])
        packed: dict[str, Any] = dict.fromkeys(("tokens", "cu_seqlens", "positions", "targets", "mask"))
        if self.unpacker:
            packed |= self.unpacker.upload(*(batch[name] for name in ("ids", "width", "cu_seqlens", "follow")))
        else:
            packed |= {
                name: torch.from_numpy(batch[name]).to(self.device) for name in packed if batch[name] is not None
            }
        rest: dict[str, Any] = {
            name: None if batch[name] is None else torch.from_numpy(batch[name])
            for name in ("fields", "rows", "groups", "scores")
        }
        return Batch(self.names[batch["source"]], records=batch["records"], **packed, **rest)

    def close(self) -> None:
        """End and join the threads."""
        if self._stream is not None:
            self._stream.close()

    def drawn_from(self, name: str, steps: int) -> np.ndarray:
        """All records of a source that the first `steps` steps draw, sorted: int64. For the shape "records"."""
        source = self.names.index(name)
        count = len(self.shards[name])
        # after one epoch, every record is drawn
        wanted = min(_loader.Mixture(self.weights).drawn(steps)[source] * self.batch, count)
        return np.sort(order(self.seed + 1_000_003 * source, 0, count, np.arange(wanted)))
