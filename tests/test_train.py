"""The training script as a person runs it: resume, ranks, skipped steps, and what a mistake gets."""

import contextlib
import json
import math
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import losses, one_line, start, train, untimed, untrained

import conan_engine
from conan_engine import encode, evaluate, search
from conan_engine import train as engine
from conan_engine.run import checkpoint


def test_all_four_stages_run_and_leave_what_a_person_looks_for(whole):
    assert [(stage, step) for stage, step, _ in losses(whole)] == [
        (s, i) for s in ("pretrain", "sft", "weak", "supervised") for i in range(6)
    ]
    for name in (
        "loss.png",
        "config.json",
        "tokenizer.model",
        "checkpoints/supervised-00000006/model-00000-of-00001.safetensors",
    ):
        assert (whole / name).stat().st_size > 0
    assert losses(whole)[5][2] < losses(whole)[0][2] - 0.1, "pretraining learns"


def test_killed_anywhere_and_started_again_gives_the_same_losses_bit_for_bit(tiny, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole / "data", run / "data")
    shutil.copy(whole / "tokenizer.model", run)
    for _ in range(3):
        wanted = random.randrange(2, 22)
        process = start(tiny, run)
        while process.poll() is None and not (
            (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= wanted
        ):
            time.sleep(0.01)
        process.kill()
        process.communicate()
    code, _, err = train(tiny, run)
    assert code == 0, err
    assert losses(run) == losses(whole)
    assert untimed(run) == untimed(whole), "every column but the times"


@pytest.mark.slow
def test_bfloat16_goes_on_bit_for_bit_too(tiny, whole, tmp_path):
    options = [
        "--stages=['sft', 'weak']",
        "--precision=bfloat16",
        f"--init_from={whole}",
        f"--tokenizer.path={whole / 'tokenizer.model'}",
    ]
    run, stopped = tmp_path / "run", tmp_path / "stopped"
    assert train(tiny, run, *options)[0] == 0
    shutil.copytree(run, stopped)
    shutil.rmtree(stopped / "checkpoints/weak-00000006")
    code, out, err = train(tiny, stopped, *options)
    assert code == 0 and "resuming after step 4 of weak" in out, err
    assert losses(stopped) == losses(run)
    in_float32 = [x[2] for x in losses(whole) if x[0] == "sft"]
    assert in_float32[0] != losses(run)[0][2] == pytest.approx(in_float32[0], rel=0.2)


def test_a_blended_stage_ends_between_what_it_began_with_and_what_it_made(tiny, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for made in ("weak-00000006", "supervised-00000004", "supervised-00000006"):
        shutil.rmtree(run / "checkpoints" / made)
    options = ["--stages=['pretrain', 'sft', 'weak']", "--weak.blend=0.25"]
    code, out, err = train(tiny, run, *options)
    assert code == 0 and "weak.blend = 0.25, was 1.0" in out, err
    began, made, blended = (dict(checkpoint.load_model(folder)[0].named_parameters()) for folder in (
        whole / "checkpoints/sft-00000006", whole / "checkpoints/weak-00000006", run))  # fmt: skip
    for name, weight in blended.items():
        assert not torch.equal(began[name], made[name])
        torch.testing.assert_close(weight, 0.75 * began[name] + 0.25 * made[name], rtol=1e-6, atol=1e-7)
    for lost in ("weak-00000006", "sft-00000004", "sft-00000006"):
        shutil.rmtree(run / "checkpoints" / lost)
    one_line(train(tiny, run, *options), "holds no checkpoint of sft any more, which weak.blend = 0.25 needs")


def test_the_first_stage_blends_with_what_the_seed_draws(tiny, whole, untrained_run, tmp_path):
    weights = [checkpoint.load_model(untrained_run)[0].blocks[0].ffn_out.weight]
    for blend in (0.5, 1):
        run = tmp_path / str(blend)
        shutil.copytree(whole / "data", run / "data")
        code, _, err = train(
            tiny,
            run,
            "--stages=['weak']",
            f"--tokenizer.path={whole / 'tokenizer.model'}",
            "--weak.steps=2",
            f"--weak.blend={blend}",
        )
        assert code == 0, err
        weights.append(checkpoint.load_model(run)[0].blocks[0].ffn_out.weight)
    drawn, blended, trained = weights
    torch.testing.assert_close(blended, (drawn + trained) / 2, rtol=1e-6, atol=1e-7)
    assert not torch.equal(drawn, trained)


def test_a_damaged_checkpoint_is_passed_over_with_a_line_that_says_so(tiny, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    weights = run / "checkpoints/supervised-00000006/model-00000-of-00001.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[random.randrange(len(damaged))] ^= 1
    weights.write_bytes(damaged)
    (run / "checkpoints/supervised-00000004/optimizer-00000-of-00001.safetensors").write_bytes(b"half")
    for state in run.glob("checkpoints/*/state.json"):
        state.write_text(json.dumps(json.loads(state.read_text()) | {"seconds": 1000.0}))
    began = time.perf_counter()
    code, out, err = train(tiny, run)
    assert code == 0, err
    assert (
        1000
        < json.loads((run / "checkpoints/supervised-00000006/state.json").read_text())["seconds"]
        < 1000 + time.perf_counter() - began
    )
    assert "supervised-00000006 is damaged" in out and "supervised-00000004 is damaged" in out
    assert losses(run) == losses(whole)
    assert untimed(run) == untimed(whole), "every column but the times"


@pytest.mark.slow
@pytest.mark.parametrize(
    "chunks",
    [
        ["--pretrain.chunk=3", "--sft.chunk=5", "--weak.chunk=7", "--supervised.chunk=9"],
        [f"--{stage}.chunk_tokens=70" for stage in ("pretrain", "sft", "weak", "supervised")],
    ],
)
def test_chunks_give_the_curve_of_the_whole_batch(tiny, whole, tmp_path, chunks):
    run = tmp_path / "run"
    code, _, err = train(tiny, run, *chunks)
    assert code == 0, err
    assert [x[2] for x in losses(run)] == pytest.approx([x[2] for x in losses(whole)], rel=1e-4)


def overflow(model):
    """Weights that are finite, and products that are not."""
    with torch.no_grad():
        model.norm.fill_(3e38)


@pytest.mark.parametrize(("steps", "skips"), [(20, 3), (3, 10)])
def test_steps_that_are_not_finite_are_skipped_and_end_the_run_with_the_checkpoint_intact(tiny, tmp_path, steps, skips):
    start_run = untrained(tiny, tmp_path / "start", overflow)
    options = ["--stages=['weak']", f"--init_from={start_run}", f"--weak.steps={steps}", f"--max_skips={skips}"]
    result = train(tiny, tmp_path / "run", *options)
    one_line(
        result,
        "weak step 2: the last 3 steps were not finite, and were skipped; the weights before them are saved. "
        "Lower weak.lr (now 0.001)",
    )
    assert "step skipped" in result[1] and "done:" not in result[1]
    (saved,) = (tmp_path / "run/checkpoints").glob("weak-*")
    assert all(weight.isfinite().all() for weight in checkpoint.load_model(saved)[0].parameters())
    again = train(tiny, tmp_path / "run", *options)
    if steps == 3:  # the stage is at its end, and is not taken for done
        one_line(
            again,
            "the last 3 steps were not finite",
            f"delete {tmp_path / 'run'}/checkpoints/weak-* to train the stage again",
        )
    else:
        one_line(again, "weak step 5: the last 3 steps were not finite")


def test_weights_that_are_not_finite_are_never_saved(tiny, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints/supervised-00000006")
    before = {path: path.read_bytes() for path in run.glob("checkpoints/*/*")}
    spoil = (
        "import torch; from conan_engine import command, train; from conan_engine.parallel import sharded_adamw; "
        "step = sharded_adamw.ShardedAdamW.step\n"
    )
    spoil += "def bad(self, *a, **k): step(self, *a, **k); self.buckets[0].master.data[3] = float('nan')\n"
    spoil += "sharded_adamw.ShardedAdamW.step = bad; command.run(train.main)"
    done = subprocess.run(
        [sys.executable, "-c", spoil, str(tiny), f"--out_dir={run}"], capture_output=True, text=True, timeout=120
    )
    one_line(
        (done.returncode, done.stdout, done.stderr),
        "supervised step",
        "no longer finite",
        "Lower supervised.lr (now 0.001)",
    )
    assert {path: path.read_bytes() for path in run.glob("checkpoints/*/*")} == before


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_the_checkpoint_before_it_whole(tiny, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints/supervised-00000006")
    weights = (run / "checkpoints/supervised-00000004/model-00000-of-00001.safetensors").stat().st_size
    for room in (weights // 2, weights + 1000):  # within the first file, within the second
        process = start(tiny, run)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, room))  # no file may grow beyond it
        out, err = process.communicate()
        one_line(
            (process.returncode, out, err),
            "supervised-00000006: cannot write it",
            "continues from the checkpoint before",
        )
        assert not list(run.glob("checkpoints/.*")) and not (run / "checkpoints/supervised-00000006").exists()
    code, _, err = train(tiny, run)
    assert code == 0, err
    assert losses(run) == losses(whole)


PRETRAIN = "--stages=['pretrain']"


@pytest.mark.slow
def test_a_source_that_is_missing_broken_or_empty_gets_one_line(tiny, tmp_path):
    def with_source(content):
        path = tmp_path / "mine.jsonl"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        config = tmp_path / "mine.toml"
        text = Path(tiny).read_text()
        config.write_text(text.replace(f"{tiny.parent}/text.jsonl", str(path)))
        return train(config, tmp_path / "run", PRETRAIN)

    one_line(with_source(None), "mine.jsonl: no such file")
    one_line(with_source(b'{"text": "a"}\n{"text": \n'), "mine.jsonl: line 2: broken JSON")
    one_line(with_source(b'{"text": "a"}\n{"txt": "b"}\n'), "mine.jsonl: line 2", "'txt'")
    one_line(with_source(b""), "mine.jsonl: holds no records")
    one_line(with_source(b'{"text": "a"}\n{"text": "\xff"}\n'), "mine.jsonl: line 2: not UTF-8")
    one_line(
        with_source(b'{"text": "too little text for this vocabulary"}\n'),
        "tokenizer.vocab_size is 600, larger than the text allows",
    )


def test_a_mistake_in_settings_gets_one_line(tiny, tmp_path):
    one_line(train(tiny, tmp_path / "run", "--weak.temprature=1"), "'weak.temprature'", "'weak.temperature'")


def test_a_batch_that_no_rank_can_split_is_named(tiny, whole, tmp_path):
    code, _, err = train(tiny, tmp_path / "run", PRETRAIN, "--pretrain.batch=7", ranks=2)
    assert code != 0 and "error: pretrain.batch is 7, which 2 ranks cannot split evenly" in err


def test_a_checkpoint_of_another_shape_is_named(tiny, whole):
    one_line(train(tiny, whole, "--model.ffn=32"), "model.ffn = 64", "says 32")


@pytest.mark.slow
def test_another_tokenizer_is_an_error(tiny, whole, tmp_path):
    code, _, err = train(tiny, tmp_path / "other", PRETRAIN, "--tokenizer.vocab_size=500")
    assert code == 0, err
    one_line(
        train(
            tiny,
            tmp_path / "run",
            PRETRAIN,
            f"--init_from={whole}",
            f"--tokenizer.path={tmp_path / 'other/tokenizer.model'}",
        ),
        "was trained with tokenizer",
    )


def test_a_damaged_shard_is_named(tiny, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole / "data", run / "data")
    shutil.copy(whole / "tokenizer.model", run)
    shard = next(run.glob("data/pretrain-*/unit-*/*.tokens"))
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 3] ^= 16
    shard.write_bytes(damaged)
    one_line(train(tiny, run, PRETRAIN), shard.name)


def test_help_lists_every_setting_and_version_says_which(tmp_path, monkeypatch, capsys):
    def answer(command, argument):
        monkeypatch.setattr(sys, "argv", ["a-command", argument])
        with pytest.raises(SystemExit) if command is not engine else contextlib.nullcontext():
            command.main()
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    said = answer(engine, "--help")
    for line in (
        "  --weak.temperature=0.02\n      of InfoNCE; ours: the paper gives none (number in [1e-3, 100])\n",
        "  --STAGE.batch=64 (pretrain: 256, supervised: 4)\n      per step, over all ranks: rows of",
        "  --plan_only=false\n      print",
    ):
        assert line in said
    for command in (engine, evaluate, search, encode):
        assert answer(command, "--version") == f"conan-engine {conan_engine.__version__}\n"
    monkeypatch.setenv("RANK", "1")
    assert answer(engine, "--help") == "", "one rank is enough"
    assert not list(tmp_path.iterdir())


# (setting, ends of its range that a run must survive): what a stage computes with
EXTREMES = {
    "model.norm_eps": (1e-30, 1), "model.rope_theta": (1, 1e15), "model.embedding_scale": (1e-9, 1e9),
    "weak.size_power": (0, 2), "weak.lr": (0, 1), "weak.warmup": (0, 1),
    "weak.final_lr": (0, 1), "weak.weight_decay": (0, 10), "weak.clip": (1e-30, 1e9), "weak.blend": (1e-9, 1),
    "weak.temperature": (1e-3, 100), "weak.margin": (-2, 2),
    "weak.min_score": (-1e9, 1e9), "supervised.temperature": (1e-3, 100), "supervised.sts_temperature": (1e-3, 100),
    "supervised.beta": (0, 1000), "negatives.low": (-2, 2),
    "negatives.max_ratio": (0, 10), "negatives.factor": (0, 1000), "seed": (0, 2**31 - 1), "loader_threads": (1, 256),
    "weak.batch": (1, 4096), "weak.chunk": (0, 2**31 - 1),
    "weak.chunk_tokens": (0, 2**31 - 1),
    "validation.every": (1, 2**31 - 1), "keep": (1, 10**6), "max_skips": (1, 10**6),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("key", EXTREMES)
def test_a_run_at_the_ends_of_a_range_computes_or_says_in_a_line_why_not(tiny, whole, tmp_path, key, end):
    stage = (
        key.partition(".")[0]
        if key.startswith(("weak", "supervised"))
        else "supervised"
        if key.startswith("negatives")
        else "weak"
    )
    options = [
        f"--stages=['{stage}']",
        f"--{stage}.steps=3",
        f"--tokenizer.path={whole / 'tokenizer.model'}",
        f"--{key}={EXTREMES[key][end]}",
    ]
    code, out, err = train(tiny, tmp_path / "run", *options)
    if code:
        one_line((code, out, err))
    else:
        assert all(
            math.isfinite(value)
            for row in untimed(tmp_path / "run")
            for value in row.values()
            if isinstance(value, float)
        )
