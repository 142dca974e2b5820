"""Read and tokenise the documents of units, window by window, in processes beside the one that embeds them."""

from __future__ import annotations

import itertools
import os
import queue
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from loky.backend import get_context

from conan_engine.data.sources.processes import begin
from conan_engine.errors import UserError

if TYPE_CHECKING:
    from conan_engine.data.sources.paths import Piece
    from conan_engine.data.tokenizer import AnyTokenizer
    from conan_engine.vectors.corpus import Corpus


CHARACTERS = 2**21  # a window ends at so many characters, or at `rows` documents
SMALL = 2**21  # bytes of files that are read in this process, since others take a second to start


class Window(NamedTuple):
    """Documents of a unit, one after another: from number `first` on. tokens: int32 [T]; cu_seqlens: int64 [n+1]."""

    unit: int
    first: int
    tokens: np.ndarray
    cu_seqlens: np.ndarray


class Task(NamedTuple):
    """A unit to read: its number, its Pieces, and how many of its documents are finished, which are passed over."""

    unit: int
    pieces: list[Piece]
    finished: int


class Reading(NamedTuple):
    """How units are read. rows: documents of a window, at most. The windows of a unit depend on nothing else."""

    corpus: Corpus
    tokenizer: AnyTokenizer
    max_tokens: int
    rows: int

    def windows(self, task: Task) -> Iterator[Window]:
        first = 0
        for texts in self._batches(task.pieces):
            if first >= task.finished:
                yield Window(task.unit, first, *packed(self.tokenizer.encode_texts(texts, self.max_tokens)))
            first += len(texts)

    def _batches(self, pieces):
        batch, characters = [], 0
        for document in self.corpus.documents(pieces):
            batch.append(document.text)
            characters += len(document.text)
            if len(batch) == self.rows or characters >= CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch


def packed(encoded: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids, one after another: (tokens int32 [T], cu_seqlens int64 [n+1])."""
    cu_seqlens = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(ids) for ids in encoded], out=cu_seqlens[1:])
    return np.fromiter(itertools.chain.from_iterable(encoded), np.int32, cu_seqlens[-1]), cu_seqlens


def read(reading: Reading, tasks: list[Task], processes: int) -> Generator[Window, None, None]:
    """The Windows of some units; those of one unit are in order. Raises UserError as Corpus.documents does, and if a
    process is killed.

    So many processes beside this one read, each some of the units; 0: this one reads. At most two windows a process
    wait in memory.
    """
    if not processes or sum(piece.bytes for task in tasks for piece in task.pieces) <= SMALL:
        for task in tasks:
            yield from reading.windows(task)
        return
    processes = min(processes, len(tasks))
    context = get_context("loky")  # its processes import neither the main module nor torch
    windows = context.Queue(processes)
    running = [
        context.Process(target=_read, args=(reading, tasks[number::processes], windows), daemon=True)
        for number in range(processes)
    ]
    for process in running:
        process.start()
    try:
        unfinished = processes
        while unfinished:
            found = _next(windows, running)
            if found is None:
                unfinished -= 1
            elif isinstance(found, str):
                raise UserError(found)
            else:
                yield Window(*found)
    finally:
        for process in running:
            process.terminate()
            process.join()


def _next(windows, running):
    while True:
        try:
            return windows.get(timeout=1)
        except queue.Empty:
            if any(process.exitcode for process in running):
                raise UserError(
                    f"one of {len(running)} processes that read the corpus was killed; if memory ran out, use fewer "
                    "(--workers). Run again: what is finished is kept"
                ) from None


def _read(reading: Reading, tasks: list[Task], windows: Any) -> None:
    """The work of a process: put the windows of its units, as plain tuples, then None; or what is wrong, as text."""
    begin()
    reading.tokenizer.threads = 1
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the same for that library
    try:
        for task in tasks:
            for window in reading.windows(task):
                windows.put(tuple(window))
        windows.put(None)
    except UserError as error:
        windows.put(str(error))
