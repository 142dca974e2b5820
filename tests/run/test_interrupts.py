"""SIGTERM and SIGUSR1: the step is finished and saved, one line says so, and the next start gives the losses of a run
that was never stopped, bit for bit."""

import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from runs import losses, start, train

from conan_engine import errors
from conan_engine.run.interrupts import Interrupts

MOMENTS = {
    "preparing": ("conan_engine.data.build:make_shards", "while preparing data"),
    "step": ("conan_engine.stages:Weak.backward", "after step 1 of weak, which is saved"),
    "saving": ("conan_engine.run.saving:Saver.start", "after step 4 of pretrain, which is saved"),
    "mining": ("conan_engine.negatives.mining:Mining.run", "while mining hard negatives"),
}


def stop(process, how):
    """Send the signal as soon as the process lingers; (exit code, stderr)."""
    for line in process.stdout:
        if line == "lingering\n":
            break
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def said(err):
    return [line for line in err.replace("\r", "\n").splitlines() if line.startswith("stopped by")]


@pytest.mark.parametrize(("moment", "how"), [
    pytest.param("preparing", "SIGTERM", marks=pytest.mark.slow), ("step", "SIGUSR1"),
    pytest.param("saving", "SIGTERM", marks=pytest.mark.slow),
    pytest.param("mining", "SIGUSR1", marks=pytest.mark.slow),
])  # fmt: skip
def test_one_rank_stopped_goes_on_bit_for_bit(tiny, whole, tmp_path, moment, how):
    run, (place, where) = tmp_path / "run", MOMENTS[moment]
    code, err = stop(start(tiny, run, linger=place), getattr(signal, how))
    assert code == 143 and "Traceback" not in err, err
    assert said(err) == [f"stopped by {how} {where}; the same command continues from there"]
    code, out, err = train(tiny, run)
    assert code == 0 and ("resuming" in out) == (moment != "preparing"), err
    assert losses(run) == losses(whole)


@pytest.fixture(scope="session")
def whole_of_two(tiny, tmp_path_factory):
    """As `whole`, of two ranks: their sums round otherwise."""
    run = tmp_path_factory.mktemp("whole-of-two") / "run"
    code, _, err = train(tiny, run, ranks=2)
    assert code == 0, err
    return run


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_two_ranks_stopped_go_on_bit_for_bit(tiny, whole_of_two, tmp_path, moment, how):
    run, (place, where) = tmp_path / "run", MOMENTS[moment]
    code, err = stop(start(tiny, run, ranks=2, linger=place), getattr(signal, how))
    (line,) = said(err)  # the other rank may have come to mine first
    assert code == 1 and line.removeprefix(f"stopped by {how} ").removesuffix(
        "; the same command continues from there"
    ) in (where, "while starting supervised"), err
    assert "RuntimeError" not in err and "UserError" not in err, err
    code, _, err = train(tiny, run, ranks=2)
    assert code == 0, err
    assert losses(run) == losses(whole_of_two)


def test_a_signal_to_one_rank_stops_both_after_the_step(tiny, whole, tmp_path):
    run = tmp_path / "run"
    process = start(
        tiny,
        run,
        "--stages=['weak']",
        f"--init_from={whole}",
        f"--tokenizer.path={whole / 'tokenizer.model'}",
        ranks=2,
        linger="conan_engine.stages:Weak.backward",
    )
    while "lingering" not in process.stdout.readline():
        pass
    ranks = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "linger.py"], capture_output=True, text=True
    ).stdout.split()
    assert len(ranks) == 2
    os.kill(int(random.choice(ranks)), signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    (line,) = said(err)
    assert (
        line.endswith("after step 1 of weak, which is saved; the same command continues from there")
        and "RuntimeError" not in err
    )
    assert (run / "checkpoints/weak-00000001/state.json").exists()


@pytest.mark.slow
def test_stopped_at_random_moments_it_gets_to_the_same_end(tiny, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole / "data", run / "data")
    shutil.copy(whole / "tokenizer.model", run)
    for _ in range(3):
        process = start(tiny, run)
        while process.poll() is None and not (run / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(random.uniform(0, 1.5))
        process.send_signal(random.choice([signal.SIGTERM, signal.SIGUSR1]))
        _, err = process.communicate(timeout=60)
        # negative: it had not begun
        assert process.returncode in (143, 0, -signal.SIGTERM, -signal.SIGUSR1) and "Traceback" not in err, err
    code, _, err = train(tiny, run)
    assert code == 0, err
    assert losses(run) == losses(whole)


@pytest.fixture
def interrupts():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    yield Interrupts()
    for number, handler in zip((signal.SIGTERM, signal.SIGUSR1), before):
        signal.signal(number, handler)


def test_what_comes_within_later_waits_for_its_end(interrupts):
    interrupts.doing = "counting"
    counted = 0
    with pytest.raises(errors.Stopped, match="stopped by SIGUSR1 while counting"):
        with interrupts.later():
            signal.raise_signal(signal.SIGUSR1)
            counted += 1
    assert counted == 1 and interrupts.asked == "SIGUSR1"
    signal.raise_signal(signal.SIGTERM)  # a second one changes nothing any more


def test_a_peer_that_had_the_signal_first_is_no_error(interrupts):
    with pytest.raises(RuntimeError, match="peer"), interrupts.later():
        raise RuntimeError("[tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    with pytest.raises(errors.Stopped), interrupts.later():
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("[tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
