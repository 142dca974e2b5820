"""A peer that stands still ends the run, by name and in time."""

import os
import random
import signal
import subprocess
import time

import pytest
import torch
from ranked import on_ranks
from runs import losses, start

from conan_engine.parallel import watch
from conan_engine.parallel.mesh import Mesh


def ranks_of(process):
    """{rank: pid} of a torchrun's workers."""
    pids = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "train.py"], capture_output=True, text=True
    ).stdout.split()
    environments = {int(pid): open(f"/proc/{pid}/environ").read().split("\0") for pid in pids}
    return {
        int(line.removeprefix("RANK=")): pid
        for pid, lines in environments.items()
        for line in lines
        if line.startswith("RANK=")
    }


@pytest.mark.parametrize("store", ["the launcher's", "rank 0's"])
@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named_and_the_run_ends(tiny, tmp_path, monkeypatch, store):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", str(int(store == "rank 0's")))
    process = start(tiny, tmp_path / "run", "--timeout=5", "--pretrain.steps=100000", ranks=2)
    rows = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and not (rows.exists() and len(losses(tmp_path / "run")) > 2):
        time.sleep(0.1)
    rank, pid = (
        random.choice(sorted(ranks_of(process).items())) if store == "the launcher's" else (0, ranks_of(process)[0])
    )
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    said = next((line for line in process.stderr if "waited for" in line), "")
    assert time.monotonic() - started < 20
    os.kill(pid, signal.SIGCONT)  # or torchrun would wait half a minute for it to hear
    process.communicate(timeout=60)
    assert process.returncode == 1
    who = (
        f"rank {rank} (process {pid} on host "
        if store == "the launcher's"
        else "the process that keeps the ranks' store"
    )
    assert said.startswith(f"rank {1 - rank}: waited for {who}"), said
    assert "given no sign of life for" in said


def _late(_, meet):
    torch.distributed.destroy_process_group()
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=3)
    mesh = Mesh("cpu", timeout=3)
    if rank == 1:
        time.sleep(10)  # alive, and not where the others wait
        return
    with pytest.raises(RuntimeError) as error:
        mesh.sum(torch.ones(1))
    if watch.timed_out(error.value):  # or the other has met it, and gone
        assert watch.waited_for().startswith("rank 1 (process ") and ", at test_watch.py:" in watch.waited_for()
        assert "rank 0" not in watch.waited_for() and "rank 2" not in watch.waited_for()


@pytest.mark.slow
def test_a_rank_that_is_elsewhere_is_named_with_its_place(tmp_path):
    on_ranks(3, _late, str(tmp_path / "meet"))


class _BusyStore:
    """Whoever tells it something is a while in the store's own code."""

    def __init__(self, store):
        self.store = store

    def clone(self):
        return self

    def set(self, key, value):
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            self.store.set(key, value)

    def check(self, _):
        return False


def _ends(mesh):
    watch.end()
    watch.begin(_BusyStore(torch.distributed.distributed_c10d._get_default_store()), mesh.rank, mesh.world, timeout=20)
    time.sleep(1.2)  # within what is told after the first second


def test_a_process_ends_in_order_while_its_watch_is_in_the_store():
    on_ranks(2, _ends)
