"""The scores of weak.teacher for a unit's pairs, kept in a file: they serve any min_score, and a killed process
loses none.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from conan_engine.data import encoding, teachers


class Scores:
    """float64 scores, one after another. A teacher scores a query with each of its positives."""

    def __init__(self, job: Any, name: str, device: str | None = None) -> None:
        """job: a Job; name: of the unit; device: where a model computes."""
        self.teacher, self.path, self.device = job.teacher, job.scores / f"{name}.f64", device
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, records):
        """(record, score) of each pair of the records."""
        have = np.fromfile(self.path, np.float64) if self.path.exists() else np.empty(0)
        with open(self.path, "r+b" if self.path.exists() else "wb") as file:
            file.seek(8 * len(have))  # over a number that was cut off
            for batch in encoding.batches({**r, "pos": [positive]} for r in records for positive in r["pos"]):
                scores, have = have[: len(batch)], have[len(batch) :]
                if len(scores) < len(batch):
                    asked = batch[len(scores) :]
                    given = teachers.scores(
                        "weak.teacher",
                        self.teacher,
                        [r["query"] for r in asked],
                        [r["pos"][0] for r in asked],
                        self.device,
                    )
                    file.write(given.tobytes())
                    file.flush()
                    scores = np.concatenate((scores, given))
                yield from zip(batch, scores.tolist())
