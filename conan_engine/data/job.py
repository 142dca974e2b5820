"""What there is to do for a source: which files become which shards."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from conan_engine.config import Source
from conan_engine.data.shards import MANIFEST
from conan_engine.data.sources import installed, paths


class Job(NamedTuple):
    """The work on a source for a use.

    source: a built-in name, or a path. use: a key of unit_records.TAKES. stage: that stage's settings. about: the
    source's. folder: of its shards. scores: the folder of the teacher's scores. reads: the path that is read; a
    built-in source is written out there first. kind: of a built-in source's records. max_bad_share: leave out bad
    records up to this share; None: the first one raises UserError.
    """

    source: str
    use: str
    stage: Any
    about: Source
    folder: Path
    scores: Path
    reads: str
    kind: str | None
    max_bad_share: float | None

    @property
    def shape(self) -> str:
        """The kind of its shards."""
        return {"pretrain": "text", "sft": "instruction", "sts": "sts"}.get(self.use, "pairs")

    @property
    def teacher(self) -> str:
        """The teacher that scores its pairs, or ""."""
        return self.stage.teacher if self.use == "weak" else ""

    def unit(self, number: int) -> Path:
        """The folder of a unit."""
        return self.folder / unit_name(number)

    def units(self) -> list:
        """The pieces of files in each unit. For a complete job, empty lists, one per unit folder."""
        if self.finished():
            return [[]] * len(list(self.folder.glob("unit-*")))
        if self.reads != self.source:
            self._write_out()
        return paths.cut(self.reads)

    def _write_out(self):
        """Write the records of a built-in source to a file of lines: read once, for all processes."""
        path = Path(self.reads)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
            with open(partial, "w", encoding="utf-8") as file:
                for record in installed.READERS[self.source, self.kind]():
                    file.write(json.dumps(record) + "\n")
            partial.replace(path)

    def finished(self, number: int | None = None) -> bool:
        """Whether it, or one unit of it, is complete."""
        return ((self.folder if number is None else self.unit(number)) / MANIFEST).exists()


def unit_name(number: int) -> str:
    """The name of a unit's folder."""
    return f"unit-{number:06d}"
