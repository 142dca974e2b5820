"""Runs that survive machines: two launchers stand for two machines, and lose a rank or one of them."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ROOT, a_gpu_each, losses


def _machine(nodes, port, tiny, run):
    """A launcher of one rank, as on each of so many machines."""
    command = [
        Path(sys.executable).parent / "torchrun", f"--nnodes={nodes}", "--nproc_per_node=1", "--max-restarts=3",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=test", "--rdzv_conf=last_call_timeout=5",
        ROOT / "conan_engine/train.py", tiny, f"--out_dir={run}",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def _ranks(machine):
    return list(map(int, Path(f"/proc/{machine.pid}/task/{machine.pid}/children").read_text().split()))


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "lost"), [("2", "a rank"), ("1:2", "a rank"), ("1:2", "a machine")])
def test_a_run_starts_again_by_itself_and_ends_with_the_losses_of_an_undisturbed_one(
    tiny, whole, tmp_path, nodes, lost
):
    a_gpu_each(2)
    run = tmp_path / "run"
    shutil.copytree(whole / "data", run / "data")
    shutil.copy(whole / "tokenizer.model", run)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    first = _machine(nodes, port, tiny, run)  # it keeps the list of who is there, and stays
    time.sleep(2)
    second = _machine(nodes, port, tiny, run)
    try:
        wanted, rows, until = random.randrange(1, 20), run / "metrics.jsonl", time.monotonic() + 100
        while not (rows.exists() and len(rows.read_text().splitlines()) >= wanted) and time.monotonic() < until:
            time.sleep(0.01)
        ranks = _ranks(second)
        if lost == "a machine":
            second.kill()
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
        out, _ = first.communicate(timeout=150)
        assert first.returncode == 0, out
        if lost == "a rank":
            assert second.wait(timeout=60) == 0
    finally:
        for process in (first, second):
            process.kill()
    assert [x[:2] for x in losses(run)] == [x[:2] for x in losses(whole)]
    assert [x[2] for x in losses(run)] == pytest.approx([x[2] for x in losses(whole)], rel=1e-5)
