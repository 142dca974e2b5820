"""SIGTERM and SIGUSR1, by which schedulers and spot machines say that the end is near, with seconds to spare."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from conan_engine.errors import Stopped
from conan_engine.parallel import watch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interrupts:
    """From its making on, either signal raises errors.Stopped: what a run prepares is kept as far as it got. Within
    `later` it is only noted in `asked`, the signal's name, for the caller to end when nothing is half done.

    doing: what the person is told was going on. Rank 0 alone says anything.
    """

    def __init__(self) -> None:
        self.asked, self.doing, self._later = None, "starting", False
        for number in SIGNALS:
            signal.signal(number, self._handle)

    @contextlib.contextmanager
    def later(self) -> Iterator[None]:
        self._later = True
        try:
            yield
        except RuntimeError as error:
            if self.asked and watch.another_ended(error):  # it had the same signal, and had not come this far
                self._stop()
            raise
        finally:
            self._later = False
        if self.asked:
            self._stop()

    def stop(self, standing: str) -> None:
        """Raise Stopped; standing: where the run stands."""
        self.ignore()  # a launcher and a scheduler may both send one
        told = f"stopped by {self.asked or 'a signal to another rank'}"
        raise Stopped(
            f"{told} {standing}; the same command goes on from there" if os.environ.get("RANK", "0") == "0" else ""
        )

    def ignore(self) -> None:
        """From now on: there is nothing left to stop."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _stop(self):
        self.stop(f"while {self.doing}")

    def _handle(self, number, frame):
        self.asked = signal.Signals(number).name
        if not self._later:
            self._stop()
