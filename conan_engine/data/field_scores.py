"""The scores that records bring ("pos_scores", "neg_scores"), in a file beside the shards.

One for each positive and each given negative, in the order of the fields without the queries; NaN where a record has
none. There is no file if no record has any.
"""

from __future__ import annotations

import itertools
import json
import zlib
from pathlib import Path

import numpy as np

from conan_engine.data.shards import MANIFEST, Shards

FILE = "field_scores.f32"


class FieldScores:
    """Writes the scores of one unit along with its records. folder: the unit's."""

    def __init__(self, folder: Path) -> None:
        self.path, self.before = folder / FILE, 0  # how many NaNs were held back so far
        self.path.unlink(missing_ok=True)

    def add(self, records: list[dict]) -> None:
        """Add dicts of pairs, each of which becomes one record per positive."""
        found = np.fromiter(itertools.chain.from_iterable(map(_of_pairs, records)), np.float32)
        if self.path.exists() or not np.isnan(found).all():
            with open(self.path, "ab") as file:
                file.write(np.full(self.before, np.nan, np.float32).tobytes() + found.tobytes())
            self.before = 0
        else:
            self.before += len(found)


def _of_pairs(record):
    positives, negatives = record["pos"], record.get("neg", ())
    of_negatives = record.get("neg_scores", [np.nan] * len(negatives))
    for score in record.get("pos_scores", [np.nan] * len(positives)):
        yield score
        yield from of_negatives


def join(folder: Path, units: list[str]) -> int | None:
    """Join the files of a folder's finished units, named in order. Returns a checksum, or None if no unit has
    scores.
    """
    if not any((folder / unit / FILE).exists() for unit in units):
        return None
    checksum, partial = 0, folder / f"{FILE}.partial"
    with open(partial, "wb") as whole:
        for unit in units:
            path = folder / unit / FILE
            part = path.read_bytes() if path.exists() else np.full(_count(folder / unit), np.nan, np.float32).tobytes()
            checksum = zlib.crc32(part, checksum)
            whole.write(part)
    partial.replace(folder / FILE)
    return checksum


def _count(folder):
    if not json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["records"]:
        return 0
    shards = Shards(folder)
    return int(shards.field_counts(np.arange(len(shards))).sum(dtype=np.int64)) - len(shards)


def of(shards: Shards) -> np.ndarray | None:
    """All scores of a finished folder, mapped: float32 [fields without queries], or None."""
    path = shards.directory / FILE
    return np.memmap(path, np.float32, "r") if path.exists() else None
