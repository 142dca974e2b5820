"""`python -m conan_engine.mine`: what training would mine, ahead of time, by any number of ranks."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import a_gpu_each, losses, train

SUPERVISED = "checkpoints/supervised-*"


def mine(config, run, ranks=1):
    a_gpu_each(ranks)
    start = (
        [sys.executable]
        if ranks == 1
        else [
            str(Path(sys.executable).parent / "torchrun"),
            f"--nproc_per_node={ranks}",
            "--master_port=0",
            "--rdzv_backend=c10d",
            "--rdzv_endpoint=localhost:0",
        ]
    )
    return subprocess.run(
        [*start, "-m", "conan_engine.mine", str(config), f"--out_dir={run}"],
        capture_output=True,
        text=True,
        timeout=300,
    )


def mined(run):
    return {path.relative_to(run): path.read_bytes() for path in run.glob("negatives/*/*")}


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_training_begins_with_what_is_mined(tiny, whole, tmp_path, ranks):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for path in (*run.glob(SUPERVISED), *run.glob("negatives/*")):
        shutil.rmtree(path)
    done = mine(tiny, run, ranks)
    assert done.returncode == 0 and "pools of" in done.stdout, done.stderr
    assert mined(run) == mined(whole) != {}
    before = {path: path.stat().st_mtime_ns for path in run.glob("negatives/*/*")}
    code, _, err = train(tiny, run)
    assert code == 0, err
    assert losses(run) == losses(whole)
    assert {path: path.stat().st_mtime_ns for path in run.glob("negatives/*/*")} == before


def test_a_run_that_is_not_so_far_is_named(tiny, whole, tmp_path):
    run = tmp_path / "run"
    for what, said in (
        ("nothing", "is at no checkpoint yet"),
        ("weak", "is at step"),
        ("all", "the supervised stage has begun"),
    ):
        if what != "nothing":
            shutil.copytree(whole, run, dirs_exist_ok=True)
        if what == "weak":
            for path in (*run.glob(SUPERVISED), *run.glob("checkpoints/weak-*")):
                shutil.rmtree(path)
        done = mine(tiny, run)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_checkpoint_whose_pools_are_gone_is_named(tiny, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    last = sorted(run.glob(SUPERVISED))[-1]
    shutil.rmtree(last)  # under way again
    for path in run.glob("negatives/*"):
        shutil.rmtree(path)
    code, _, err = train(tiny, run)
    assert code == 2 and "cannot continue with the negatives mined here" in err and "Traceback" not in err
