"""Work on several processes."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any

import loky  # whose processes, other than multiprocessing's, need not import the main module and with it torch
from loky.process_executor import TerminatedWorkerError

from conan_engine.errors import UserError


class Pool:
    """`processes` of them (0: one a CPU core), started when first needed; close() ends them, and so does the end of
    this process, however it comes. set_up(*arguments) is called in each of them first."""

    def __init__(self, processes: int = 0, set_up: Callable | None = None, *arguments) -> None:
        self.processes = processes or len(os.sched_getaffinity(0))
        self._executor = loky.ProcessPoolExecutor(self.processes, initializer=_begin, initargs=(set_up, arguments))

    def map(self, function: Callable, items: Iterable) -> Iterator[Any]:
        """function(item) for each item, in order; at most twice as many as processes are under way. Raises what the
        function raises, and UserError if a process is killed."""
        waiting = collections.deque()
        with _told(self.processes):
            for item in items:
                waiting.append(self._executor.submit(function, item))
                if len(waiting) == 2 * self.processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def unordered(self, function: Callable, items: Iterable, look: Callable[[], None]) -> Iterator[Any]:
        """(i, function(item)) for item i, as each is done; look() is called every second. Raises as `map` does."""
        items, waiting = enumerate(items), {}
        with _told(self.processes):
            while True:
                for i, item in itertools.islice(items, 2 * self.processes - len(waiting)):
                    waiting[self._executor.submit(function, item)] = i
                if not waiting:
                    return
                done, _ = wait(waiting, 1, FIRST_COMPLETED)
                look()
                for future in done:
                    yield waiting.pop(future), future.result()

    def close(self) -> None:
        self._executor.shutdown(kill_workers=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@contextlib.contextmanager
def _told(processes):
    """A killed process is said in one line."""
    try:
        yield
    except TerminatedWorkerError:
        raise UserError(
            f"one of {processes} processes that prepare data was killed; if memory ran out, take fewer "
            "(tokenizer.processes). "
            f"Run again: it goes on behind what is finished"
        ) from None


def _begin(set_up, arguments):
    # which reach all of a job's processes: the first one ends these
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if set_up:
        set_up(*arguments)


def _end_with(parent):
    while os.getppid() == parent:  # after kill -9 nobody else would tell
        time.sleep(1)
    os._exit(1)
