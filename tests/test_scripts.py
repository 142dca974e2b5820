"""The Slurm script, with stand-ins for Slurm's commands: what it starts, and that it queues itself again when its time
is over."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAND_INS = {
    "scontrol": 'echo "scontrol $@" >> "$LOG"; [ "$1" != show ] || printf "node7\\nnode8\\n"',
    "scancel": 'echo "scancel $@" >> "$LOG"; kill -USR1 "$(cat "$LOG.srun")"',
    "srun": 'trap "sleep 0.5; echo saved >> $LOG; exit 1" USR1; echo $$ > "$LOG.srun"; echo "srun $@" >> "$LOG"; '
    'for i in $(seq 100); do sleep 0.1; [ ! -e "$LOG.done" ] || exit 0; done',
}


@pytest.fixture
def job(tmp_path):
    """The script as Slurm starts it, and what its commands note."""
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "45678",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    process = subprocess.Popen([ROOT / "scripts/train.slurm", "my config.toml", "--weak.steps=3"], env=environment)
    until = time.monotonic() + 10
    while not ((tmp_path / "log").exists() and "srun" in (tmp_path / "log").read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    yield process, tmp_path / "log"
    process.kill()


def test_it_is_queued_again_when_its_time_is_over(job):
    process, log = job
    process.send_signal(signal.SIGUSR1)
    process.wait(timeout=20)
    shown, started, *after = log.read_text().splitlines()
    assert shown == "scontrol show hostnames node[7-8]"
    for part in (
        "torchrun --nnodes=2:2 --nproc_per_node=4",
        "--rdzv_endpoint=node7:25678",
        "--signals-to-handle=SIGTERM,SIGUSR1",
        "conan_engine/train.py my config.toml --weak.steps=3",
    ):
        assert part in started
    # in this order: not before it is saved
    assert after == ["scancel --signal=USR1 45678", "saved", "scontrol requeue 45678"]


def test_it_is_not_when_it_has_come_to_its_end(job):
    process, log = job
    log.with_name("log.done").touch()
    assert process.wait(timeout=20) == 0
    assert len(log.read_text().splitlines()) == 2
