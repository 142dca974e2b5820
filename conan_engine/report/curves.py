"""The curves of each stage, from the rows of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from conan_engine.config import METRICS
from conan_engine.report.charts import Curve, chart

PARTS = ("info_nce", "cosent", "distil")  # of a loss
CHARTS = {  # key of metrics.jsonl: title
    "alpha": "alpha, how far the soft mask is open",
    "gradient_norm": "gradient norm, before clipping",
    "lr": "learning rate",
    "replaced": "hard negatives replaced",
    "tokens_per_s": "tokens per second",
    "sent_ms": "milliseconds waiting for other ranks",
    "tflops": "TFLOP/s of one GPU",
    "mfu": "MFU, share of the device's peak",
    "skipped": "steps skipped",
}


class StageOfRun(NamedTuple):
    """A stage of the report: its name, steps done and planned, charts, and its last and best validation."""

    name: str
    done: int
    steps: int
    charts: list[Markup]
    validation: list[tuple[str, float, float, int]]  # (metric, last value, best value, step of the best)


def of_stage(name: str, steps: int, rows: Sequence[dict[str, Any]]) -> StageOfRun:
    """A stage from its rows, oldest first. steps: as planned."""
    charts = []
    for key, title in (("loss", "loss"), ("accuracy", "accuracy, share of queries whose positive scores highest")):
        curves = [
            _curve(Path(source).name, [row for row in rows if row["source"] == source], key)
            for source in sorted({row["source"] for row in rows if key in row})
        ]
        if key == "loss":
            curves.append(_measured("validation", rows, "validation/loss"))
        charts.append(chart(title, curves))
    charts.append(chart("parts of the loss", [_curve(part, rows, part) for part in PARTS]))
    scores = [metric for metric in METRICS if metric != "loss"]
    charts.append(chart("validation", [_measured(metric, rows, f"validation/{metric}") for metric in scores]))
    charts.append(_matryoshka(rows))
    for key, title in CHARTS.items():
        if key != "skipped" or any(row.get(key) for row in rows):
            charts.append(chart(title, [_curve(key, rows, key)]))
    waiting = [{**row, "share": 100 * row["waited"] / row["seconds"]} for row in rows if row.get("seconds")]
    charts.append(chart("waiting for data, % of the step", [_curve("waited", waiting, "share")]))
    return StageOfRun(name, len(rows), steps, [one for one in charts if one], _validation(rows))


def _curve(name, rows, key):
    points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    return Curve(name, *(zip(*points) if points else ((), ())))


def _measured(name, rows, key):
    return _curve(name, rows, key)._replace(dots=True)


def _matryoshka(rows):
    """nDCG@10 of the last validation by the dims kept."""
    last = next((row for row in reversed(rows) if "validation/ndcg@10" in row), {})
    prefix = "validation/ndcg@10/"
    dims = sorted(int(key.removeprefix(prefix)) for key in last if key.startswith(prefix))
    if not dims:
        return Markup("")
    values = [last[f"{prefix}{dim}"] for dim in dims]
    return chart("nDCG@10 of the last validation by dims kept", [Curve("nDCG@10", dims, values, True)], doubling=True)


def _validation(rows):
    found = []
    for key in dict.fromkeys(key for row in rows for key in row if key.startswith("validation/")):
        values = [(row["step"], row[key]) for row in rows if key in row]
        if key == "validation/seconds":
            continue
        smaller_is_better = key.endswith("/loss") or key == "validation/loss"
        best = (np.argmin if smaller_is_better else np.argmax)([value for _, value in values])
        found.append((key.removeprefix("validation/"), values[-1][1], values[best][1], values[best][0] + 1))
    return found
