"""Bad records that are left out while a source is read: listed, counted by reason, and limited."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from conan_engine.errors import UserError

NAME = "rejected.jsonl"
# after so many records of a source's first unit, the share of bad ones is known well enough to stop
ENOUGH = 10_000


class TooMany(UserError):
    """Too many bad records: reading on is useless."""


class Rejects:
    """Lists the bad records of a unit in a file, a JSON object each: use, source (unless it is the file), file, line
    or row, reason.

    Call it with the path, the place and the Bad of each. max_share: of a source's first unit, raise TooMany as soon as
    ENOUGH records show a larger share; None: never.
    """

    def __init__(self, path: str | Path, source: str, use: str, max_share: float | None) -> None:
        self.source, self.use, self.max_share = source, use, max_share
        self.reasons, self.kept = collections.Counter(), 0
        self._file = open(path, "w", encoding="utf-8")

    def __call__(self, path, place, bad):
        self.reasons[bad.reason] += 1
        kind, _, number = place.partition(" ")
        where = {"file": self.source} if str(path) == self.source else {"source": self.source, "file": str(path)}
        self._file.write(
            json.dumps({"use": self.use, **where, kind: int(number), "reason": str(bad)}, ensure_ascii=False) + "\n"
        )
        if self.max_share is not None and self.kept + self.reasons.total() >= ENOUGH:
            self._file.flush()
            judge(self.source, self.kept, self.reasons, self.max_share, self._file.name)

    def counting(self, records: Iterable) -> Iterator[Any]:
        """The same records, counted."""
        for record in records:
            self.kept += 1
            yield record

    def close(self) -> None:
        self._file.close()


def judge(source: str, kept: int, reasons: collections.Counter, max_share: float, listed: str | Path) -> None:
    """Raise TooMany if more than max_share of the records was left out. listed: the file that lists them."""
    bad, read = reasons.total(), kept + reasons.total()
    if bad > max_share * read:
        raise TooMany(
            f"{source}: {bad} of the first {read} records cannot be used ({by_reason(reasons)}), more than "
            f"max_bad_share = {max_share:g}; "
            f"{listed} lists them: mend the file, or raise max_bad_share"
        )


def by_reason(reasons: dict[str, int]) -> str:
    return ", ".join(
        f"{count:,} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    )
