"""What a person watches: metrics.jsonl, a progress bar per stage, loss.png, and the loggers."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from conan_engine.config import METRICS, Config
from conan_engine.run.loggers import Followers

QUIET = 10  # seconds between two states of the progress bar in a file
VALIDATED = [f"validation/{metric}" for metric in METRICS]  # what the progress line shows of validation, the loss first


def rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file, such as metrics.jsonl. A line that was cut off is left out."""
    found = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def json_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file, or it cannot be read."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Log:
    """The log of a run. Rank 0 writes; on other ranks every method does nothing."""

    def __init__(self, run: str | Path, first: bool) -> None:
        self.path, self.active, self.followers = Path(run, "metrics.jsonl"), first, None

    def resume(self, stages_before: list[str], stage: str, step: int) -> None:
        """Remove the rows that a killed run wrote after its last checkpoint; those steps run again."""
        if not self.active:
            return
        kept = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # a line that the kill cut off
                if row["stage"] in stages_before or (row["stage"] == stage and row["step"] < step):
                    kept.append(line + "\n")
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, self.path)
        self.file = open(self.path, "a", buffering=1)

    def follow(self, names: list[str]) -> None:
        """Start a process for each of these loggers. config.json must exist."""
        if self.active:
            self.followers = Followers(self.path.parent, names, names == Config().log_to, self.say)

    @contextlib.contextmanager
    def stage(self, name: str, steps: int, done: int) -> Iterator[None]:
        """Show a progress bar for one stage."""
        self.name = name
        self.bar = tqdm(
            total=steps,
            initial=done,
            desc=name,
            unit="step",
            dynamic_ncols=True,
            disable=not self.active,
            mininterval=0.1 if sys.stderr.isatty() else QUIET,
        )
        try:
            yield
        finally:
            self.bar.close()  # so that an error gets a line of its own

    def step(self, step: int, row: dict[str, Any], best: bool = False) -> None:
        """Write the row of a step, name -> number or text. best: whether its validation is the best so far."""
        if not self.active:
            return
        self.file.write(json.dumps({"stage": self.name, "step": step, **row}) + "\n")
        self.bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_s']:,.0f} tokens/s", refresh=False)
        self.bar.update()
        validated = {key: value for key, value in row.items() if key in VALIDATED}
        if validated:
            numbers = ", ".join(f"{key.removeprefix('validation/')} {value:.4f}" for key, value in validated.items())
            self.say(f"{self.name} step {step + 1}: validation {numbers}{', the best so far' if best else ''}")
        if self.followers:
            self.followers.look()

    def say(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        if self.active:
            tqdm.write(text)

    def close(self) -> None:
        """Close the files and wait for the loggers."""
        if self.active:
            self.file.close()
            if self.followers:
                self.followers.close()

    def draw(self) -> None:
        """Draw loss.png: the loss of every stage by step, a panel per stage, with validation."""
        if not self.active:
            return
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        every = rows(self.path)
        stages = list(dict.fromkeys(row["stage"] for row in every))
        figure, axes = plt.subplots(1, len(stages), figsize=(4 * len(stages), 3.8), squeeze=False)
        for axis, stage in zip(axes[0], stages):
            mine = [row for row in every if row["stage"] == stage]
            for source in sorted({row["source"] for row in mine}):
                points = [(row["step"], row["loss"]) for row in mine if row["source"] == source]
                axis.plot(*zip(*points), linewidth=0.8, label=Path(source).name)
            validated = [
                (key, points)
                for key in VALIDATED
                if (points := [(row["step"], row[key]) for row in mine if key in row])
            ]
            other = axis.twinx() if any(key != VALIDATED[0] for key, _ in validated) else None
            for (key, points), style in zip(validated, "osv^"):
                of = axis if key == VALIDATED[0] else other
                of.plot(
                    *zip(*points),
                    "k" + style + ("-" if of is axis else ":"),
                    linewidth=0.8,
                    markersize=3,
                    label=key.replace("/", " "),
                )
            axis.set(title=stage, xlabel="step", ylabel="loss" if stage == stages[0] else "")
            lines = axis.get_lines()
            if other:
                other.set_ylim(0, 1)
                lines += other.get_lines()
            axis.legend(handles=list(lines), fontsize=7, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.22))
        figure.tight_layout()
        partial = self.path.with_name("loss.partial.png")
        figure.savefig(partial, dpi=110)
        os.replace(partial, self.path.with_name("loss.png"))
        plt.close(figure)
