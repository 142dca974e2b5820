"""SIGTERM and SIGUSR1: schedulers and spot machines send them before they end a process."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from conan_engine.errors import Stopped
from conan_engine.parallel import watch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interrupts:
    """Once made, either signal raises errors.Stopped; what the run has prepared is kept.

    Within `later`, the signal's name is only noted in `asked`, and the caller stops when nothing is half done. doing:
    what the message says was going on. Only rank 0 prints.
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
            if self.asked and watch.another_ended(error):  # the other rank had the same signal and stopped first
                self._stop()
            raise
        finally:
            self._later = False
        if self.asked:
            self._stop()

    def stop(self, standing: str) -> None:
        """Raise Stopped. standing: where the run stands."""
        self.ignore()  # a launcher and a scheduler may both send a signal
        told = f"stopped by {self.asked or 'a signal to another rank'}"
        raise Stopped(
            f"{told} {standing}; the same command continues from there" if os.environ.get("RANK", "0") == "0" else ""
        )

    def ignore(self) -> None:
        """Ignore both signals from now on: nothing is left to stop."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _stop(self):
        self.stop(f"while {self.doing}")

    def _handle(self, number, frame):
        self.asked = signal.Signals(number).name
        if not self._later:
            self._stop()
