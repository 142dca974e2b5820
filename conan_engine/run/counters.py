"""Counts of a stage's steps: updates, and steps that were skipped."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conan_engine.config import Config


class Counters(dict):
    """The counts as a checkpoint keeps them.

    updates: steps that changed the weights. skipped: steps whose loss or gradient was not finite. skipped_in_a_row: how
    many of these came last. Validation keeps its best row here too.
    """

    def __init__(self, kept: dict[str, Any] | None = None) -> None:
        super().__init__({"updates": 0, "skipped": 0, **(kept or {}), "skipped_in_a_row": 0})

    def count(self, loss: float, gradient_norm: float) -> bool:
        """Count a step. Returns whether it may change the weights."""
        finite = math.isfinite(loss) and math.isfinite(gradient_norm)
        self["updates"] += finite
        self["skipped"] += not finite
        self["skipped_in_a_row"] = 0 if finite else self["skipped_in_a_row"] + 1
        return finite


def skipped(config: Config, name: str, step: int, counters: dict[str, Any]) -> str:
    """The error of a run whose last steps of the stage `name`, up to `step`, were skipped."""
    settings = getattr(config, name)
    again = f", and delete {config.out_dir}/checkpoints/{name}-* to train the stage again"
    return (
        f"{name} step {step}: the last {counters['skipped_in_a_row']} steps were not finite, and were skipped; the "
        f"weights before them are saved. Lower {name}.lr (now {settings.lr:g}) or look at the data of the steps logged "
        f"in {config.out_dir}/metrics.jsonl" + again * (step + 1 == settings.steps)
    )
