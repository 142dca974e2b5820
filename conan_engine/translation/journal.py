"""A journal of answers on disk, line by line, so that none is paid for twice."""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from pathlib import Path
from typing import Any

from conan_engine.errors import UserError


class Journal:
    """The answers so far, one per line, each on disk before the next is asked for. The first line says which command
    they belong to.
    """

    def __init__(self, path: str | Path, facts: dict[str, Any]) -> None:
        """Raises UserError if the file is the journal of another command."""
        self.path, self.places, self.counts = Path(path), {}, Counter()
        self.file = open(self.path, "ab+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.path}: another process is writing here; wait until it ends") from None
        self.file.seek(0)
        whole = 0
        for line in self.file:
            if not line.endswith(b"\n"):
                break  # a line that a kill cut off
            row = json.loads(line)
            if whole:
                self._note(row, whole)
            elif row != facts:
                different = ", ".join(
                    f"{key} was {row.get(key)!r}, is {facts[key]!r}" for key in facts if row.get(key) != facts[key]
                )
                raise UserError(
                    f"{self.path}: belongs to another command ({different}); finish that one, or remove the file and "
                    "pay again"
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
        """The answer to a query."""
        with open(self.path, "rb") as file:
            file.seek(self.places[number])
            return json.loads(file.readline())


def line(row: dict[str, Any]) -> bytes:
    """JSON that a person can read, except for half of a surrogate pair, which UTF-8 cannot hold."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row).encode() + b"\n"
