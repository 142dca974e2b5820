"""Batches for a stage, planned, packed and read by threads of C++ (csrc/batches/loader.h) while the step before them
computes.

What a step holds depends on the seed, the sources and the step alone: not on ranks, threads or where a run was stopped.
Every step draws from one source, so that in-batch negatives are of one kind and hard; steps are shared out in exact
proportion. A source is an endless run of epochs, each in a seeded permutation that is computed as it is needed.
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
    """One rank's part of a step, T tokens in B sequences end to end. On the rank's device are tokens, cu_seqlens,
    positions, targets and mask; the rest is on the CPU. Where a record is a sequence (text, instruction) its fields
    follow each other in it; else field f of record r is sequence f * n + r."""

    source: str
    tokens: torch.Tensor  # int32 [T]
    cu_seqlens: torch.Tensor  # int32 [B+1]
    positions: torch.Tensor  # int32 [T], of each token in its sequence
    fields: torch.Tensor  # int32 [F+1], each field's first token, then T
    # int32 [T], the token that follows, -100 where there is none to learn; text, instruction
    targets: torch.Tensor | None
    mask: torch.Tensor | None  # bool [T], whether targets has one
    rows: torch.Tensor | None  # int32 [R+1], each packed row's first sequence, then B
    records: np.ndarray  # int64 [n], by number in the source
    groups: torch.Tensor  # int64 [n]
    scores: torch.Tensor  # float32 [n]


class Loader:
    """An endless stream of batches; `next` hands out one a step.

    shards: name -> Shards, all of `kind` (a key of shards.FIELDS). weights: name -> float; a source's share of the
    steps is in proportion to weight * records ** size_power. shape and batch (over all ranks): "rows", so many rows of
    max_tokens tokens, records packed into them by best fit and split where longer (text); "records", so many records;
    "tokens", as many records as so many tokens hold, a multiple of the ranks. max_tokens: fields are cut there (pairs,
    sts). fields: the first so many of a record. skip_bad_records: what is damaged is left out (pairs, sts: replaced by
    another of the batch), said on stderr and counted in `skipped`.

    state: int64 array; where the stream stands after the batch handed out last. Set before the first `next`, it goes on
    from there, on any number of ranks. Raises UserError, naming shard and record, for what is damaged or does not fit.
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
        # To a GPU the ids go as they are stored, where the extension was built with nvcc; else, and where not all is
        # learnt, they are widened on the CPU.
        narrow = group.device.type == "cuda" and _loader.has_cuda and kind != "instruction"
        self.unpacker = Unpacker(group.device) if narrow else None
        self.options["raw"] = self.unpacker is not None
        self.device, self.state, self.skipped = group.device, None, 0
        self._stream: Any = None

    def next(self) -> Batch:
        """The next step's Batch; its tensors stay whole for as long as someone holds them. Ctrl-C gets through."""
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
        """Ends and joins the threads."""
        if self._stream is not None:
            self._stream.close()

    def drawn_from(self, name: str, steps: int) -> np.ndarray:
        """All records of a source that the first `steps` steps draw, sorted: int64. For the shape "records"."""
        source = self.names.index(name)
        count = len(self.shards[name])
        # past one epoch every record is drawn
        wanted = min(_loader.Mixture(self.weights).drawn(steps)[source] * self.batch, count)
        return np.sort(order(self.seed + 1_000_003 * source, 0, count, np.arange(wanted)))
