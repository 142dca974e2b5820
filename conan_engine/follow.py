"""Send the metrics of a run to a logger: tensorboard, wandb, mlflow or trackio.

Sends the settings, the rows of metrics.jsonl that were not sent yet, and
loss.png. train.py starts this command itself for each name in log_to; it runs
beside the training and reads what the training writes, so a logger can neither
slow a run nor end it. What a logger missed, this command sends later. What was
sent is noted in RUN/loggers/NAME.json; without that file a new curve begins.

Example:
    python -m conan_engine.follow runs/demo wandb
"""

from __future__ import annotations

import importlib.util
import os
import select
import sys
from pathlib import Path

from conan_engine import command
from conan_engine.errors import UserError
from conan_engine.run.loggers import LOGGERS, send


def main() -> None:
    parser = command.Parser("follow", __doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument("name", choices=LOGGERS, help="a logger, whose package is installed")
    parser.add_argument("--beside", action="store_true", help="keep sending until standard input is closed")
    arguments = parser.parse_args()
    run = arguments.run
    if not all((run / name).exists() for name in ("metrics.jsonl", "config.json")):
        raise UserError(f"{run}: holds no metrics.jsonl and config.json; name the folder of a run")
    if not importlib.util.find_spec(arguments.name):
        raise UserError(f"{arguments.name} is not installed; pip install {arguments.name}")
    send(run, arguments.name, _closed if arguments.beside else lambda: True)


def _closed():
    """Whether the process at the other end of standard input has closed it or ended."""
    return bool(select.select([sys.stdin], [], [], 0)[0]) and not os.read(0, 1)


if __name__ == "__main__":
    command.run(main)
