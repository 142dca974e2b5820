"""train.py, called by benchmarks that train again and again: in their own process, which saves a start each time."""

import contextlib
import signal
import sys
from pathlib import Path

import torch

from conan_engine import train
from conan_engine.run.interrupts import SIGNALS


def run(config, folder, *settings, share=None, log=None):
    """Train `config` (a path) into `folder`, or go on there. share: a run's folder whose shards, and a teacher's
    vectors, are taken and added to; log: where its output goes. Raises what train.py raises; a signal ends the caller
    again afterwards."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in ("data", "texts") if share else ():
        Path(share, name).mkdir(parents=True, exist_ok=True)
        if not Path(folder, name).exists():
            Path(folder, name).symlink_to(Path(share, name).resolve())
    handlers, argv = {number: signal.getsignal(number) for number in SIGNALS}, sys.argv
    sys.argv = ["train.py", str(config), *map(str, settings), f"--out_dir={folder}"]
    try:
        with contextlib.ExitStack() as stack:
            if log:
                file = stack.enter_context(open(log, "a", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(file))
                stack.enter_context(contextlib.redirect_stderr(file))
            train.main()
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
