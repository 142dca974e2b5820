"""Signs of life between ranks: a rank that hangs, or whose machine is gone, ends the run in minutes and is named."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

PACKAGE = str(Path(__file__).parent.parent)
KEEPER = "the process that keeps the ranks' store: rank 0, or the first launcher"
_watch = None  # the watch of this process


def begin(store: Any, rank: int, world: int, timeout: float) -> None:
    """Start to tell the other ranks through the store, every few seconds, that this rank lives and where it is, and
    to check the next rank.

    After 0.8 * timeout seconds without a sign of it, print a line and end this process; the launcher then ends the
    others.
    """
    global _watch
    _watch = _Watch(store.clone(), rank, world, timeout)


def end() -> None:
    """Stop, before this process leaves for good reason.

    A thread inside the store's code while Python exits would abort the process, so this waits for the thread; not for
    long, since the store may belong to a process that is gone.
    """
    if _watch:
        _watch.ended.set()
        for thread in _watch.threads:
            thread.join(2.0)


def another_ended(error: BaseException) -> bool:
    """Whether this is the error that a rank gets when a peer has ended, which the peer has reported itself."""
    return isinstance(error, RuntimeError) and re.search(r"Connection (closed|reset) by peer", str(error)) is not None


def timed_out(error: BaseException) -> bool:
    """Whether this is the error of a collective that gave up waiting."""
    return isinstance(error, RuntimeError) and re.search(r"[Tt]imed out", str(error)) is not None


def waited_for() -> str:
    """Which ranks a collective waited for, in words: those that are not in one."""
    return _watch.waited_for() if _watch else "another rank"


class _Watch:
    def __init__(self, store, rank, world, timeout):
        self.store, self.rank, self.world, self.timeout, self.ended = store, rank, world, timeout, threading.Event()
        self.other, self.sign = (rank + 1) % world, {}
        self.pause = min(5.0, timeout / 20)
        self.main = threading.main_thread().ident
        self.beat, self.fresh, self.answered = 0, time.monotonic(), time.monotonic()
        self._tell()
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self._exchange, self._check)]
        for thread in self.threads:
            thread.start()

    def _tell(self):
        self.beat += 1
        where, waits = _place(self.main)
        sign = {
            "beat": self.beat,
            "who": f"process {os.getpid()} on host {socket.gethostname()}",
            "at": where,
            "waits": waits,
        }
        self.store.set(f"alive/{self.rank}", json.dumps(sign))

    def _read(self, rank):
        """The last sign of a rank, or {}."""
        key = f"alive/{rank}"
        return json.loads(self.store.get(key)) if self.store.check([key]) else {}

    def _exchange(self):
        """Tell and read. It never returns if the process of the store is gone or hangs."""
        with contextlib.suppress(RuntimeError):
            while not self.ended.wait(self.pause):
                self._tell()
                sign = self._read(self.other)
                self.answered = time.monotonic()
                if sign != self.sign:
                    self.sign, self.fresh = sign, self.answered

    def _check(self):
        while not self.ended.wait(self.pause):
            silent = time.monotonic() - self.fresh
            if silent > 0.8 * self.timeout:
                known = time.monotonic() - self.answered < 0.4 * self.timeout
                who = _named(self.other, self.sign) if known else KEEPER
                print(
                    f"\nrank {self.rank}: waited for {who}, which has given no sign of life for {silent:.0f} s; ending",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)

    def waited_for(self):
        signs = {}

        def read():
            with contextlib.suppress(RuntimeError):
                for rank in range(self.world):
                    signs[rank] = self._read(rank)

        time.sleep(2 * self.pause)  # by then, the others' signs are from after the end
        reading = threading.Thread(target=read, daemon=True)
        reading.start()
        reading.join(max(2.0, self.pause))
        if len(signs) < self.world:
            return KEEPER
        others = (
            f"{_named(rank, sign)}, at {sign.get('at')}"
            for rank, sign in signs.items()
            if rank != self.rank and not sign.get("waits")
        )
        return " and ".join(others) or "another rank"


def _named(rank, sign):
    return f"rank {rank} ({sign.get('who', 'not seen yet')})"


def _place(thread):
    """(file and line at which a thread is, within this package if possible; whether it is in a collective)."""
    frame = innermost = sys._current_frames().get(thread)
    while frame and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    frame = frame or innermost
    name = Path(frame.f_code.co_filename).name
    return f"{name}:{frame.f_lineno}", name == "mesh.py"
