"""Records left out while a source is read: written down, counted by reason, and too many of them stop the run."""

import collections
import json
import os
import sys
from pathlib import Path

from conan_engine.errors import UserError

NAME = "rejected.jsonl"
ENOUGH = 10_000  # records after which the share of bad ones is known well enough to stop early


class Rejects:
    """Of one source for one use, in folder/rejected.jsonl: a JSON object a record, of use, source where it has several files, file, line (or
    row) and reason.

    What an earlier start wrote there of this source and use is taken out first. Call it with a place and the forms.Bad of
    each record that is left out.
    """

    def __init__(self, folder, source, use, max_share):
        self.path, self.source, self.use, self.max_share = Path(folder) / NAME, source, use, max_share
        self.reasons, self.kept = collections.Counter(), 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            others = [line for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True) if not self._mine(line)]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(others), encoding="utf-8")
            os.replace(partial, self.path)
        self._file = open(self.path, "a", encoding="utf-8")

    def _mine(self, line):
        try:
            row = json.loads(line)
        except ValueError:
            return True  # cut off when an earlier start was killed
        return (row.get("use"), row.get("source", row.get("file"))) == (self.use, self.source)

    def __call__(self, place, bad):
        self.reasons[bad.reason] += 1
        file, _, place = place.rpartition(": ")  # of a source of several files
        kind, _, number = place.partition(" ")
        where = {"source": self.source, "file": file} if file else {"file": self.source}
        self._file.write(json.dumps({"use": self.use, **where, kind: int(number), "reason": str(bad)}, ensure_ascii=False) + "\n")
        if self.kept + self.reasons.total() >= ENOUGH:
            self._judge()

    def counting(self, records):
        """The same records, counted."""
        for record in records:
            self.kept += 1
            yield record

    def close(self):
        """Say what was left out. Raises UserError if it was more than the largest share."""
        self._file.close()
        if self.reasons:
            self._judge()
            print(f"{self.source}: left out {self.reasons.total()} of {self.kept + self.reasons.total()} records for {self.use}: {self._by_reason()}; see {self.path}", file=sys.stderr, flush=True)

    def _judge(self):
        bad, read = self.reasons.total(), self.kept + self.reasons.total()
        if bad > self.max_share * read:
            self._file.close()
            raise UserError(
                f"{self.source}: {bad} of the first {read} records cannot be used ({self._by_reason()}), more than max_bad_share = {self.max_share:g}; "
                f"{self.path} lists them: mend the file, or raise max_bad_share"
            )

    def _by_reason(self):
        return ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
