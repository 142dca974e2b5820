"""Whatever the mesh of ranks, tensor x data, a run has the same losses; and it goes on on another."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from runs import losses, start, train

MESHES = [(1, 1), (2, 1), (1, 2), (2, 2)]  # (ranks that share a model, ranks that share the data)
STAGES = ("pretrain", "sft", "weak", "supervised")
CHUNKS = ["--pretrain.chunk=2", "--sft.chunk=2", "--weak.chunk=5", "--supervised.chunk=7"]
TOKENS = [f"--{stage}.chunk_tokens=70" for stage in STAGES]


def on_mesh(tiny, run, mesh, *options):
    code, out, err = train(tiny, run, f"--tensor_parallel={mesh[0]}", *options, ranks=mesh[0] * mesh[1])
    assert code == 0, err
    return out


def assert_same_losses(run, other):
    assert [x[:2] for x in losses(run)] == [x[:2] for x in losses(other)]
    assert [x[2] for x in losses(run)] == pytest.approx([x[2] for x in losses(other)], rel=1e-5)


@pytest.mark.slow
def test_four_ranks_have_the_losses_of_one(tiny, whole, tmp_path):
    on_mesh(tiny, tmp_path / "run", (2, 2), "--recompute=block")
    assert_same_losses(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [[], CHUNKS, TOKENS], ids=["whole", "chunks", "tokens"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_mesh_has_the_losses_of_one_rank(tiny, whole, tmp_path, stage, chunks):
    # rounding reaches a loss times 1 / T: at T = 0.02 it can be a few 1e-5 after some steps
    options = [
        f"--stages=['{stage}']",
        f"--{stage}.steps=20",
        "--weak.temperature=0.05",
        "--supervised.temperature=0.05",
    ]
    options += [f"--init_from={whole}", f"--tokenizer.path={whole / 'tokenizer.model'}", *chunks]
    for mesh in MESHES:
        on_mesh(tiny, tmp_path / f"{mesh}", mesh, *options)
        assert_same_losses(tmp_path / f"{mesh}", tmp_path / "(1, 1)")
    assert len(losses(tmp_path / "(2, 2)")) == 20


@pytest.mark.slow
def test_killed_and_started_again_on_the_same_mesh_is_bit_for_bit_the_same(tiny, tmp_path):
    on_mesh(tiny, tmp_path / "undisturbed", (2, 2))
    run = tmp_path / "run"
    for _ in range(2):
        wanted = random.randrange(2, 22)
        process = start(tiny, run, "--tensor_parallel=2", ranks=4)
        rows = run / "metrics.jsonl"
        while process.poll() is None and not (rows.exists() and len(rows.read_text().splitlines()) >= wanted):
            time.sleep(0.01)
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        process.kill()
        process.communicate()
    on_mesh(tiny, run, (2, 2))
    assert losses(run) == losses(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(tiny, whole, tmp_path):
    on_mesh(tiny, tmp_path / "saved", (2, 2))
    for stage in STAGES:
        for mesh in ((1, 1), (4, 1), (1, 4)):
            run = tmp_path / f"{stage}-{mesh}"
            shutil.copytree(tmp_path / "saved", run)
            for name in STAGES[STAGES.index(stage) :]:
                for step in (4, 6) if name != stage else (6,):
                    shutil.rmtree(run / f"checkpoints/{name}-{step:08d}")
            out = on_mesh(tiny, run, mesh)
            assert f"resuming after step 4 of {stage}" in out and f"tensor_parallel = {mesh[0]}, was 2" in out
            assert_same_losses(run, whole)
