"""Show a run in TensorBoard, wandb, MLflow or trackio.

Each logger is a process of its own (conan_engine/follow.py) that reads what train.py writes.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conan_engine.config import LOGGERS as NAMES

PROJECT = "conan-engine"  # if the environment names no project
PAUSE = 0.5  # seconds between two reads of the file
PATIENCE = 30  # seconds that a finished run waits for its loggers


class TensorBoard:
    """A logger. `where` tells a person where to look; log(step, numbers); settings are {dotted key: value};
    close(picture: a path, or None).
    """

    def __init__(self, run: Path, state: dict[str, Any], settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.where = f"tensorboard --logdir {run / 'tensorboard'}"
        self.writer = SummaryWriter(run / "tensorboard", flush_secs=10)
        if state["sent"] < 0:
            self.writer.add_text("settings", "".join(f"- {key} = {value}\n" for key, value in settings.items()), 0)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, step)

    def close(self, picture: Path | None) -> None:
        if picture:
            from matplotlib.image import imread

            self.writer.add_image("loss", imread(picture)[..., :3], dataformats="HWC")
        self.writer.close()


class WandB:
    def __init__(self, run: Path, state: dict[str, Any], settings: dict[str, Any]) -> None:
        import wandb

        self.wandb = wandb
        project, name = os.environ.get("WANDB_PROJECT", PROJECT), os.environ.get("WANDB_NAME", run.name)
        self.run = wandb.init(
            project=project,
            name=name,
            id=state["id"],
            resume="allow",
            config=settings,
            dir=run / "loggers",
            settings=wandb.Settings(console="off"),
        )
        self.where = self.run.url or f"wandb sync {Path(self.run.dir).parent}"

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def close(self, picture: Path | None) -> None:
        if picture:
            self.run.log({"loss.png": self.wandb.Image(str(picture))})
        self.run.finish()


class MLflow:
    def __init__(self, run: Path, state: dict[str, Any], settings: dict[str, Any]) -> None:
        import mlflow

        self.mlflow = mlflow
        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
            mlflow.set_experiment(PROJECT)
        self.run = mlflow.start_run(run_id=state.get("mlflow"), run_name=run.name, log_system_metrics=False)
        state["mlflow"] = self.run.info.run_id
        self.where = f"run {state['mlflow']} of {mlflow.get_tracking_uri()}"
        if state["sent"] < 0:
            mlflow.log_params({self._key(key): str(value)[:500] for key, value in settings.items()})

    def _key(self, key):
        return re.sub(r"[^\w\-. :/]", "_", key)  # MLflow refuses other characters

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.mlflow.log_metrics({self._key(key): value for key, value in numbers.items()}, step=step, synchronous=True)

    def close(self, picture: Path | None) -> None:
        if picture:
            self.mlflow.log_artifact(str(picture))
        self.mlflow.end_run()


class Trackio:
    def __init__(self, run: Path, state: dict[str, Any], settings: dict[str, Any]) -> None:
        import trackio

        self.trackio = trackio
        # trackio tells runs apart by their name alone
        project, name = os.environ.get("TRACKIO_PROJECT", PROJECT), f"{run.name}-{state['id']}"
        self.run = trackio.init(project=project, name=name, config=settings, resume="allow", embed=False)
        self.where = f"trackio show --project {project}"

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def close(self, picture: Path | None) -> None:
        if picture:
            self.run.log({"loss.png": self.trackio.Image(str(picture))})
        self.run.finish()


LOGGERS: dict[str, Any] = dict(zip(NAMES, (TensorBoard, WandB, MLflow, Trackio)))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings: {dotted key: value}; a value that is neither number nor text becomes JSON."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, int | float | str) else json.dumps(value)
    return found


def send(run: Path, name: str, ended: Callable[[], bool]) -> None:
    """Send a run's rows to a logger, and each new row, until ended() is true and all are sent. Waits for another
    process that sends to the same logger.
    """
    folder = run / "loggers"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state: dict[str, Any] = (
            json.loads(path.read_text()) if path.exists() else {"id": secrets.token_hex(4), "sent": -1}
        )
        config = json.loads((run / "config.json").read_text())
        before, total = {}, 0  # the steps of the stages before it
        for stage in config["stages"]:
            before[stage], total = total, total + config[stage]["steps"]
        logger = LOGGERS[name](run, state, flat(config))
        state["where"] = logger.where
        _keep(path, state)
        for row in _rows(run / "metrics.jsonl", ended):
            step = before[row["stage"]] + row["step"]
            if step > state["sent"]:
                logger.log(
                    step,
                    {
                        f"{row['stage']}/{key}": value
                        for key, value in row.items()
                        if isinstance(value, int | float) and key != "step"
                    },
                )
                state["sent"] = step
                _keep(path, state)
        picture = run / "loss.png"
        logger.close(picture if picture.exists() and state["sent"] + 1 == total else None)


def _rows(path, ended):
    """The rows of a JSON Lines file that is still being written, until ended()."""
    with open(path, encoding="utf-8") as file:
        last, rest = False, ""
        while not last:
            last = ended()  # ask before reading, so that everything written by then is read
            *lines, rest = (rest + file.read()).split("\n")
            yield from map(json.loads, lines)
            time.sleep(0 if last else PAUSE)


def _keep(path, state):
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(state))
    partial.replace(path)


class Followers:
    """The logger processes of a run, one for each of config.log_to. say(line) prints."""

    def __init__(self, run: str | Path, names: list[str], default: bool, say: Callable[[str], None]) -> None:
        self.run, self.say, self.processes, self.looked = Path(run), say, {}, 0.0
        for name in names:
            if importlib.util.find_spec(name):
                (self.run / "loggers").mkdir(exist_ok=True)
                with open(self.run / "loggers" / f"{name}.log", "ab") as log:
                    command = [sys.executable, "-m", "conan_engine.follow", str(self.run), name, "--beside"]
                    # in its own session: Ctrl-C and the launcher's signals are for the run; this process ends when its
                    # pipe closes
                    self.processes[name] = subprocess.Popen(
                        command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
                    )
            elif not default:
                say(f"log_to: {name} is not installed here, and nothing goes there: pip install {name}")
        self.told = set()

    def look(self) -> None:
        """Call now and then: print where the run can be seen, and which logger has ended early."""
        if time.monotonic() - self.looked < 1:
            return
        self.looked = time.monotonic()
        for name, process in list(self.processes.items()):
            self._tell(name)
            if process.poll() is not None:
                del self.processes[name]
                self._failed(name, f"has ended ({self._last_line(name)}); training goes on")

    def _tell(self, name):
        if name in self.told:
            return
        try:
            where = json.loads((self.run / "loggers" / f"{name}.json").read_text()).get("where")
        except (OSError, ValueError):
            return
        self.told.add(name)
        if name != "tensorboard":
            self.say(f"{name}: {where}")

    def _last_line(self, name):
        lines = (self.run / "loggers" / f"{name}.log").read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "without a word")

    def _failed(self, name, what):
        self.say(
            f"log_to: {name} {what}; see {self.run}/loggers/{name}.log. What is missing there: python -m "
            f"conan_engine.follow {self.run} {name}"
        )

    def close(self) -> None:
        """Give the loggers some time to send the rest."""
        for process in self.processes.values():
            process.stdin.close()
        until = time.monotonic() + PATIENCE
        for name, process in self.processes.items():
            try:
                code = process.wait(max(0.1, until - time.monotonic()))
                self._tell(name)
                if code:
                    self._failed(name, f"has failed ({self._last_line(name)})")
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self._failed(name, f"has not taken all within {PATIENCE} s")
