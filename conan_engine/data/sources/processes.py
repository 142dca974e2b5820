"""Run work on several processes."""

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

import loky  # unlike multiprocessing, its processes need not import the main module, and with it torch
from loky.process_executor import TerminatedWorkerError

from conan_engine.errors import UserError


class Pool:
    """`processes` of them (0: one per core), started when first needed, ended by close() or with this process.

    set_up(*arguments) is called in each of them first.
    """

    def __init__(self, processes: int = 0, set_up: Callable | None = None, *arguments) -> None:
        self.processes = processes or len(os.sched_getaffinity(0))
        self._executor = loky.ProcessPoolExecutor(self.processes, initializer=begin, initargs=(set_up, *arguments))

    def map(self, function: Callable, items: Iterable) -> Iterator[Any]:
        """function(item) for each item, in order. Raises what the function raises, and UserError if a process is
        killed.

        At most twice as many items as processes are under way.
        """
        waiting = collections.deque()
        with _told(self.processes):
            for item in items:
                waiting.append(self._executor.submit(function, item))
                if len(waiting) == 2 * self.processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def unordered(self, function: Callable, items: Iterable, look: Callable[[], None]) -> Iterator[Any]:
        """(i, function(item)) for item i, as each is finished; look() is called every second. Raises as `map` does."""
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
    """Report a killed process as a UserError."""
    try:
        yield
    except TerminatedWorkerError:
        raise UserError(
            f"one of {processes} processes that prepare data was killed; if memory ran out, use fewer "
            "(--workers, or tokenizer.processes). Run again: what is finished is kept"
        ) from None


def begin(set_up: Callable | None = None, *arguments) -> None:
    """What a process does first: it ends with its parent, which alone hears signals; then set_up(*arguments)."""
    # these signals reach all processes of a job: the first process ends the others
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if set_up:
        set_up(*arguments)


def _end_with(parent):
    while os.getppid() == parent:  # after a kill -9 of the parent, nobody else would end this process
        time.sleep(1)
    os._exit(1)
