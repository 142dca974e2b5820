"""Going on with other settings: each that differs is named, and what cannot change within a stage is refused."""

import dataclasses
import shutil

import pytest
from runs import losses, one_line, train, write_lines

from conan_engine.errors import UserError
from conan_engine.run import resuming
from conan_engine.settings import load


@pytest.fixture
def differences(tiny):
    def of(*now, was=(), under_way="weak"):
        state = {"config": dataclasses.asdict(load(tiny, was))}
        return resuming.differences("run/checkpoints/x", state, load(tiny, now), under_way)

    return of


def test_nothing_is_said_of_what_is_the_same(differences):
    assert differences() == ""


def test_every_setting_that_differs_is_named_with_both_values(differences):
    said = differences("--weak.lr=0.5", "--save_every=7", "--model.layers=2", was=["--weak.warmup=0.2"])
    assert sorted(said.split(", ")) == sorted(
        "save_every = 7, was 4, model.layers = 2, was 1, weak.lr = 0.5, was 0.001, weak.warmup = 0.05, was 0.2".split(
            ", "
        )
    )


FIXED = [
    "--seed=2",
    "--weak.batch=8",
    "--weak.batch_tokens=99",
    "--weak.max_tokens=16",
    "--weak.size_power=0.5",
    "--weak.min_score=0.1",
    "--weak.teacher=a:b",
    "--weak.data.other.jsonl=1",
]


@pytest.mark.parametrize("setting", FIXED)
def test_what_batches_follow_from_is_refused_within_the_stage_alone(differences, setting):
    key = setting[2:].partition("=")[0]
    with pytest.raises(
        UserError, match=rf"run/checkpoints/x: {key} was .* now: that cannot change while weak is under way"
    ):
        differences(setting)
    assert f"{key} = " in differences(setting, under_way=None)
    assert (f"{key} = " in differences(setting, under_way="sft")) if key != "seed" else True


def test_several_are_refused_at_once(differences):
    with pytest.raises(UserError, match=r"seed was 1 and is 2 now; weak.batch was 16 and is 8 now: that cannot"):
        differences("--seed=2", "--weak.batch=8", "--weak.lr=1")


@pytest.mark.parametrize(
    "setting",
    [
        "--negatives.pool=9",
        "--negatives.count=3",
        "--supervised.sts_batch=4",
        "--supervised.steps=9",
        "--supervised.sts.x.jsonl=1",
    ],
)
def test_what_the_pools_follow_from_is_refused_in_the_stage_that_has_them(differences, setting):
    with pytest.raises(UserError, match="while supervised is under way"):
        differences(setting, under_way="supervised")
    assert differences(setting, under_way="weak")


def test_a_source_is_told_by_its_name(differences, tiny):
    path = f"{tiny.parent}/pairs.jsonl"
    with pytest.raises(UserError, match=r"weak.data.\S*/pairs.jsonl was 2.0 and is 3.0 now"):
        differences(f"--weak.data.{path}=3")
    with pytest.raises(
        UserError, match=r"supervised.data.\S*/pairs.jsonl was 2.0 and is {'weight': 2.0, 'hard_negatives': 3} now"
    ):
        differences(f"--supervised.data.{path}={{ weight = 2, hard_negatives = 3 }}", under_way="supervised")
    with pytest.raises(UserError, match=r"weak.data.other.jsonl was absent and is 1.0 now"):
        differences("--weak.data.other.jsonl=1")


@pytest.mark.slow
def test_a_run_goes_on_with_another_learning_rate_and_says_so(tiny, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "checkpoints/supervised-00000006")
    one_line(
        train(tiny, run, "--supervised.batch=16", "--seed=3"),
        "seed was 1 and is 3 now; supervised.batch was 8 and is 16 now",
        "supervised is under way",
    )
    assert losses(run) == losses(whole), "what stood there is as it was"
    code, out, err = train(tiny, run, "--supervised.lr=0.5")
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("resuming")]
    assert line.endswith("supervised.lr = 0.5, was 0.001") or "supervised.lr = 0.5, was 0.001, " in line
    assert losses(run)[:-1] == losses(whole)[:-1] and losses(run)[-1] != losses(whole)[-1]


@pytest.mark.slow
def test_a_file_that_has_become_another_is_named(tiny, tmp_path):
    path = write_lines(tmp_path / "mine.jsonl", [{"text": f"The first text of all, number {i}."} for i in range(200)])
    config = tmp_path / "mine.toml"
    config.write_text(
        tiny.read_text().replace(f"{tiny.parent}/text.jsonl", str(path)).replace("vocab_size = 600", "vocab_size = 300")
    )
    options = ["--stages=['pretrain']"]
    code, _, err = train(config, tmp_path / "run", *options)
    assert code == 0, err
    shutil.rmtree(tmp_path / "run/checkpoints/pretrain-00000006")
    write_lines(path, [{"text": f"The second text of all, number {i}."} for i in range(200)])
    one_line(
        train(config, tmp_path / "run", *options), "mine.jsonl has other records than before", "pretrain is under way"
    )
    write_lines(path, [{"text": f"The first text of all, number {i}."} for i in range(200)])
    code, out, err = train(config, tmp_path / "run", *options)
    assert code == 0 and "resuming after step 4 of pretrain" in out, err
