"""Pools of hard negatives, and their dynamic replacement during training (arXiv 2509.12892, section 3.4)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conan_engine.errors import UserError
from conan_engine.negatives import mining

if TYPE_CHECKING:
    from conan_engine.config import Negatives


def should_replace(first: Any, now: Any, rule: Negatives) -> Any:
    """Which negatives have become too easy (dynamic hard negative mining, arXiv 2509.12892, section 3.4).

    first: cosine when the negative came into use, S_0; now: its current cosine, S_i; arrays of one shape -> bool array.
    A negative is replaced if S_0 < low, or if factor * S_i < S_0 and S_i < bound. How large these cosines are depends
    on the model: if all are below `low`, each negative is replaced by an easier one at every use. `bounds = "quantile"`
    is for such models.
    """
    return (first < rule.low) | ((rule.factor * now < first) & (now < rule.bound))


class Pools:
    """For each query: candidates, best first; the `count` of them in use; and their first cosines.

    All ranks map all pools and apply the same updates, so any rank can draw any query next. A checkpoint holds what has
    changed.
    """

    def __init__(
        self, corpus: Any, queries: np.ndarray, candidates: np.ndarray, rule: Negatives, folder: str | Path = ""
    ) -> None:
        """queries: sorted record ids [Q]; candidates: indices into the corpus, int [Q, P]; folder: what mining.py
        has written.
        """
        self.corpus, self.queries, self.rule, self.folder = corpus, queries, rule, Path(folder)
        self.candidates = candidates
        self.slot = np.tile(np.arange(rule.count, dtype=np.int16), (len(queries), 1))  # [Q, K]: place in the pool
        self.first = np.full((len(queries), rule.count), np.nan, dtype=np.float32)  # S_0; NaN before the first use
        self.used = np.zeros(len(queries), bool)
        self.replaced = 0
        # a teacher's scores of the positive and of each candidate, float32 [Q, 1+P]; see distilling.py
        self.targets = None

    def draw(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The documents in use for these queries: (records, fields, groups), each int64 [n * K], query by query."""
        rows = np.searchsorted(self.queries, records)
        documents = np.take_along_axis(self.candidates[rows], self.slot[rows].astype(np.int64), axis=1).ravel()
        return self.corpus.record[documents], self.corpus.field[documents], self.corpus.group[documents]

    def targets_of(self, records: np.ndarray) -> np.ndarray:
        """The teacher's scores of these queries' positives and documents in use: float32 [n, 1+K], NaN where there
        is none.
        """
        rows = np.searchsorted(self.queries, records)
        slot = np.concatenate((np.zeros((len(rows), 1), np.int64), 1 + self.slot[rows].astype(np.int64)), axis=1)
        return np.take_along_axis(self.targets[rows], slot, axis=1)

    def update(self, records: np.ndarray, scores: np.ndarray) -> None:
        """Apply the rule to the cosines [n, K] that the loss has just computed. A replacement is drawn at the next
        use; an exhausted pool keeps what it has.
        """
        rows = np.searchsorted(self.queries, records)
        first = np.where(np.isnan(self.first[rows]), scores, self.first[rows])
        slot = self.slot[rows]
        due = should_replace(first, scores, self.rule)
        # the next candidates of the pool, in slot order
        fresh = slot.max(axis=1, keepdims=True) + np.cumsum(due, axis=1)
        due &= fresh < self.candidates.shape[1]
        self.slot[rows] = np.where(due, fresh, slot)
        self.first[rows] = np.where(due, np.nan, first)
        self.used[rows] = True
        self.replaced += int(due.sum())

    def state(self) -> dict[str, np.ndarray]:
        """What has changed since mining, and where the pools are."""
        rows = np.flatnonzero(self.used)
        return {
            "rows": rows,
            "slot": self.slot[rows],
            "first": self.first[rows],
            "folder": np.frombuffer(self.folder.name.encode(), np.uint8),
            "replaced": np.array([self.replaced]),
        }

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        rows = state["rows"]
        self.slot[rows], self.first[rows], self.used[rows] = state["slot"], state["first"], True
        self.replaced = int(state.get("replaced", [0])[0])  # checkpoints of version 0.1 have none

    @classmethod
    def mapped(cls, corpus: Any, queries: np.ndarray, rule: Negatives, folder: str | Path) -> Pools:
        """The pools that mining.Mining wrote into a folder. Raises UserError if they are missing or do not match."""
        try:
            about = json.loads(Path(folder, mining.ABOUT).read_text(encoding="utf-8"))
            candidates = np.load(Path(folder, mining.POOLS), mmap_mode="r")
            if about["documents"] != len(corpus):
                if about["documents"] != corpus.positives + len(corpus.given):
                    raise ValueError("it holds other documents")
                candidates = corpus.renumbered(candidates)
            if candidates.shape != (len(queries), rule.pool):
                raise ValueError("it holds other pools")
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{folder}: cannot continue with the negatives mined here ({error}); restore the folder, or "
                "delete the stage's checkpoints to mine again"
            ) from None
        if rule.bounds == "quantile":
            rule = dataclasses.replace(rule, bounds="cosine", low=about["low"], bound=about["bound"])
        return cls(corpus, queries, candidates, rule, folder)
