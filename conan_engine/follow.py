"""Show a run elsewhere: `python -m conan_engine.follow RUN tensorboard|wandb|mlflow|trackio`.

Sends a run's settings, every row of its metrics.jsonl that was not sent yet, and loss.png, to one of these
(`pip install` it first). train.py does it itself with log_to = ["wandb", ...]: it starts this command beside itself,
which reads what train.py writes, so that no logger can slow a run or end it; what one had not taken when the run ended,
this command sends later. Keys are those of metrics.jsonl behind the stage's name ("weak/loss"); a step is counted from
the run's beginning. What was sent, and under which name, stands in RUN/loggers/NAME.json: without that file a new curve
begins.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import select
import sys
from pathlib import Path

from conan_engine import command
from conan_engine.errors import UserError
from conan_engine.run.loggers import LOGGERS, send


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m conan_engine.follow", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("name", choices=LOGGERS)
    parser.add_argument("--beside", action="store_true", help="go on until standard input is closed")
    arguments = parser.parse_args()
    run = arguments.run
    if not all((run / name).exists() for name in ("metrics.jsonl", "config.json")):
        raise UserError(f"{run}: holds no metrics.jsonl and config.json, as a run does; name the folder of a run")
    if not importlib.util.find_spec(arguments.name):
        raise UserError(f"{arguments.name} is not installed here: pip install {arguments.name}")
    send(run, arguments.name, _closed if arguments.beside else lambda: True)


def _closed():
    """Whether the process at the other end of standard input has ended, or let go."""
    return bool(select.select([sys.stdin], [], [], 0)[0]) and not os.read(0, 1)


if __name__ == "__main__":
    command.run(main)
