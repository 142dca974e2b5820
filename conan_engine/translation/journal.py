"""What was answered, on the disk line by line: nothing is paid for twice."""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from pathlib import Path
from typing import Any

from conan_engine.errors import UserError


class Journal:
    """What has been answered, a line an answer, on disk before the next is asked for. The first line says of what."""

    def __init__(self, path: str | Path, facts: dict[str, Any]) -> None:
        """Raises UserError where the journal of another command is there."""
        self.path, self.places, self.counts = Path(path), {}, Counter()
        self.file = open(self.path, "ab+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.path}: another process is writing here; wait for its end") from None
        self.file.seek(0)
        whole = 0
        for line in self.file:
            if not line.endswith(b"\n"):
                break  # cut off by a kill
            row = json.loads(line)
            if whole:
                self._note(row, whole)
            elif row != facts:
                different = ", ".join(
                    f"{key} was {row.get(key)!r}, is {facts[key]!r}" for key in facts if row.get(key) != facts[key]
                )
                raise UserError(
                    f"{self.path}: of another command ({different}); finish that one, or remove the file and pay again"
                )
            whole += len(line)
        self.file.truncate(whole)
        self.file.seek(whole)
        if not whole:
            self._write(facts)

    def add(self, row: dict[str, Any]) -> None:
        self._note(row, self.file.tell())
        self._write(row)

    def _note(self, row, place):
        self.places[row["number"]] = place
        self.counts[row.get("reason", "translated")] += 1
        for key in ("prompt", "completion"):
            self.counts[key] += row[key]

    def _write(self, row):
        self.file.write(line(row))
        self.file.flush()

    def read(self, number: int) -> dict[str, Any]:
        """What was written of a query."""
        with open(self.path, "rb") as file:
            file.seek(self.places[number])
            return json.loads(file.readline())


def line(row: dict[str, Any]) -> bytes:
    """JSON that a person can read, unless it holds half of a character, which UTF-8 cannot say."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row).encode() + b"\n"
