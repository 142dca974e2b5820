"""What stands in the rows of vectors: the documents that they were made of, or their ids alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from conan_engine.vectors.corpus import Corpus, Document

if TYPE_CHECKING:
    from conan_engine.vectors.stored import Stored


class Records:
    """corpus: that the vectors are of; None for the one that they name themselves, if its files are unchanged."""

    def __init__(self, stored: Stored, corpus: Corpus | None = None) -> None:
        self.stored = stored
        self.corpus = corpus
        if corpus is None and stored.about:
            named = Corpus(stored.about["source"], stored.about["source"])
            self.corpus = named if named.unchanged(stored.about["files"]) else None
        if self.corpus is None:
            return
        units = self.corpus.units()
        if stored.about and len(units) == len(stored.about["units"]):
            self._units, self._ends = units, np.cumsum(stored.about["units"])
        else:
            self._units, self._ends = [list(itertools.chain.from_iterable(units))], np.array([len(stored)])

    def of(self, rows: Iterable[int]) -> dict[int, Document]:
        """The Document of each row, read from its file; of a corpus that is gone, its id alone."""
        wanted = sorted(set(rows))
        if self.corpus is None:
            return self._ids(wanted)
        found = {}
        for unit, of_unit in itertools.groupby(wanted, lambda row: int(np.searchsorted(self._ends, row, "right"))):
            first = int(self._ends[unit - 1]) if unit else 0
            of_unit = list(of_unit)
            documents = self.corpus.documents(self._units[unit])
            there = itertools.islice(documents, of_unit[-1] - first + 1)
            left = set(of_unit)
            found |= {first + i: document for i, document in enumerate(there) if first + i in left}
        return found

    def _ids(self, rows):
        names = {}
        if self.stored.ids:
            with open(self.stored.ids, encoding="utf-8") as file:
                wanted = set(rows)
                names = {row: json.loads(line) for row, line in zip(range(rows[-1] + 1), file) if row in wanted}
        return {row: Document(names.get(row), "") for row in rows}
