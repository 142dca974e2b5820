"""Signs of life between the ranks of a run: one whose process stands still or whose machine is gone ends the run in minutes, by name."""

import datetime
import json
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path

PACKAGE = str(Path(__file__).parent)
_watch = None  # this process's


def begin(store, rank, world, timeout):
    """From now on this rank tells the others through the store, every few seconds, that it lives and where it is; and looks whether the
    next one does. After 0.8 * timeout seconds without a sign it says so and ends this process: the launcher then ends the others."""
    global _watch
    _watch = _Watch(store.clone(), rank, world, timeout)


def end():
    """Before this process leaves the others for good reason."""
    if _watch:
        _watch.ended.set()


def timed_out(error):
    """Whether a collective gave up waiting."""
    return isinstance(error, RuntimeError) and re.search(r"[Tt]imed out", str(error)) is not None


def waited_for():
    """Who kept a collective waiting, in words: the ranks that are not in one."""
    return _watch.waited_for() if _watch else "another rank"


class _Watch:
    def __init__(self, store, rank, world, timeout):
        self.store, self.rank, self.world, self.timeout, self.ended = store, rank, world, timeout, threading.Event()
        self.pause = min(5.0, timeout / 20)
        self.store.set_timeout(datetime.timedelta(seconds=max(1.0, self.pause)))
        self.main = threading.main_thread().ident
        self.beat = 0
        self._tell()
        threading.Thread(target=self._run, daemon=True).start()

    def _tell(self):
        self.beat += 1
        where, waits = _place(self.main)
        sign = {"beat": self.beat, "who": f"process {os.getpid()} on host {socket.gethostname()}", "at": where, "waits": waits}
        self.store.set(f"alive/{self.rank}", json.dumps(sign))

    def _sign(self, rank):
        """The last one, or {}."""
        key = f"alive/{rank}"
        return json.loads(self.store.get(key)) if self.store.check([key]) else {}

    def _run(self):
        other, last, since = (self.rank + 1) % self.world, {}, time.monotonic()
        while not self.ended.wait(self.pause):
            try:
                self._tell()
                sign, known = self._sign(other), True
            except RuntimeError:  # the store itself does not answer: with some launchers rank 0 keeps it
                sign, known = last, False
            if sign != last:
                last, since = sign, time.monotonic()
            elif time.monotonic() - since > 0.8 * self.timeout and not self.ended.is_set():
                who = _named(other, sign) if known else "the machine of rank 0 or the launcher's first"
                said = f"waited for {who}, which has given no sign of life for {time.monotonic() - since:.0f} s"
                print(f"\nrank {self.rank}: {said}; ending", file=sys.stderr, flush=True)
                os._exit(1)

    def waited_for(self):
        time.sleep(2 * self.pause)  # what the others tell is by then of after the end
        signs = {rank: self._sign(rank) for rank in range(self.world) if rank != self.rank}
        return " and ".join(f"{_named(rank, sign)}, at {sign.get('at')}" for rank, sign in signs.items() if not sign.get("waits")) or "another rank"


def _named(rank, sign):
    return f"rank {rank} ({sign.get('who', 'not seen yet')})"


def _place(thread):
    """(file and line in which that thread is, of this package if it is in one of its functions; whether it is in a collective)."""
    frame = innermost = sys._current_frames().get(thread)
    while frame and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    frame = frame or innermost
    name = Path(frame.f_code.co_filename).name
    return f"{name}:{frame.f_lineno}", name == "parallel.py"
