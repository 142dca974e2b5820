"""Which documents are right for a query besides its own record's positive, so that none counts as its negative.

A query is identified by its tokens, as the model reads it. Right for it are the groups of the positives of all its
records, of every document that reads like one of these, and of every document that reads like the query itself.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from conan_engine.errors import UserError

if TYPE_CHECKING:
    from conan_engine.data.shards import Shards


FILE = "known-2.npz"  # version 0.1 wrote known.npz, where texts had no numbers


class Known:
    """The known positives of a source's pairs, by record number. All arrays are int64.

    records [S] (ascending) and lists [S]: the records whose query has more than one group, and the number of the
    query's list. starts [L+1] and groups [I]: list l is groups[starts[l] : starts[l+1]]. negatives [G]: the group of
    each given negative, record by record; of one that is nobody's positive, -1 - n, where n numbers the distinct texts
    among these.
    """

    def __init__(
        self, records: np.ndarray, lists: np.ndarray, starts: np.ndarray, groups: np.ndarray, negatives: Any
    ) -> None:
        self.records, self.lists, self.starts, self.groups, self.negatives = records, lists, starts, groups, negatives

    def of(self, record: int, own: int) -> np.ndarray:
        """All groups that are right for a record's query. own: the record's group."""
        place = np.searchsorted(self.records, record)
        if place == len(self.records) or self.records[place] != record:
            return np.array([own])
        return self.groups[slice(*self.starts[self.lists[place] : self.lists[place] + 2])]

    def among(self, records: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """What conan_kernels.Known takes for a batch: (first [N], last [N], ids [I]); None if no query has another
        group than its own.

        records: int64 [N], of the batch's queries; groups: int64 [M], of all documents in the batch.
        """
        if not len(self.records):
            return None
        place = np.searchsorted(self.records, records).clip(max=len(self.records) - 1)
        have = np.flatnonzero(self.records[place] == records)
        lists, which = np.unique(self.lists[place[have]], return_inverse=True)
        of_list, number = ranges(self.starts[lists], self.starts[lists + 1])
        ids = self.groups[number]
        here = np.isin(ids, groups)
        count = np.bincount(of_list[here], minlength=len(lists))
        here &= (count > 1)[of_list]  # a single group is the query's own
        if not here.any():
            return None
        last = np.cumsum(np.where(count > 1, count, 0))
        bounds = np.zeros((2, len(records)), np.int64)
        bounds[:, have] = np.concatenate(([0], last))[which], last[which]
        return *bounds, ids[here]


def ranges(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of all ranges [first[i], last[i]), one after another: i and number, each int64 [sum of lengths]."""
    lengths = last - first
    i = np.repeat(np.arange(len(lengths)), lengths)
    return i, np.arange(len(i)) + (last - np.cumsum(lengths))[i]


def find(queries: np.ndarray, documents: np.ndarray, groups: np.ndarray, negatives: np.ndarray) -> Known:
    """The Known of records, from the hashes of their queries, positives and given negatives, and their groups: int64
    [R]; the negatives' [G].
    """
    # every (document, group) once, ordered by document
    table = _distinct(documents, groups)
    known = [_joined(queries, key, *table) for key in (documents, queries)]
    query, group = _distinct(*(np.concatenate(parts) for parts in zip(*known)))
    first = np.flatnonzero(_fresh(query))
    last = np.append(first[1:], len(query))
    several = last - first > 1
    _, inside = ranges(first[several], last[several])
    starts = np.concatenate(([0], np.cumsum((last - first)[several])))
    found, lists = _find(query[first[several]], queries)
    among_positives, entry = _find(table[0], negatives)
    number = np.unique(negatives, return_inverse=True)[1]
    return Known(
        np.flatnonzero(found),
        lists[found],
        starts,
        group[inside],
        np.where(among_positives, table[1][entry], -1 - number),
    )


def _find(ascending, wanted):
    """Whether each of `wanted` is in `ascending`, and its first position."""
    place = np.searchsorted(ascending, wanted)
    return np.append(ascending, 0)[place] == np.where(place < len(ascending), wanted, 1), np.minimum(
        place, len(ascending) - 1
    )


def _fresh(x):
    """Where a sorted array has a value that differs from the one before."""
    return np.concatenate(([True], x[1:] != x[:-1]))


def _distinct(first, second):
    """The distinct pairs, in order: two arrays."""
    order = np.lexsort((second, first))
    first, second = first[order], second[order]
    fresh = _fresh(first) | _fresh(second)
    return first[fresh], second[fresh]


def _joined(queries, key, documents, groups):
    """(query, group) for each query and each entry of the table whose document is the query's key."""
    i, entry = ranges(*(np.searchsorted(documents, key, side=side) for side in ("left", "right")))
    return queries[i], groups[entry]


def make(shards: Shards) -> None:
    """Compute and keep the known positives of a finished folder of pairs, unless they are there. Raises UserError if
    the folder cannot be written.
    """
    path = shards.directory / FILE
    if path.exists():
        return
    records = np.arange(len(shards), dtype=np.int64)
    given = np.maximum(shards.field_counts(records) - 2, 0).astype(np.int64)
    record, field = ranges(np.full(len(records), 2), 2 + given)
    known = find(
        shards.hashes(records, 0), shards.hashes(records, 1), shards.groups(records), shards.hashes(record, field)
    )
    partial = path.with_name(f"{FILE}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            np.savez(file, **vars(known))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        raise UserError(
            f"{partial}: cannot write it: {error.strerror}; make room or choose another folder, then run again"
        ) from None


def of(shards: Shards) -> Known:
    """The Known of a finished folder of pairs, made if it is missing. Raises UserError if it is damaged."""
    make(shards)
    path = shards.directory / FILE
    try:
        with np.load(path) as arrays:
            return Known(**{name: arrays[name] for name in ("records", "lists", "starts", "groups", "negatives")})
    except Exception as error:  # a ZIP file, whose parts have checksums, can be damaged in any way
        raise UserError(f"{path}: damaged ({error}); delete it and run again: it is computed again") from None
