"""Settings: defaults, files, overrides, and the line that a mistake gets."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conan_engine.config import STAGES, Config, Source, Stage
from conan_engine.errors import UserError
from conan_engine.settings import from_dict, listing, load, rules

CONFIGS = Path(__file__).parents[2] / "configs"

SUPERVISED = "stages = ['supervised']\n[supervised]\nsteps = 1\n"


def write(tmp_path, text):
    path = tmp_path / "some.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["demo.toml", "base.toml", "small.toml", "conan-1.4b.toml"])
def test_shipped_configs_load(name):
    assert load(CONFIGS / name).stages == ["pretrain", "sft", "weak", "supervised"]


RANGES = {key: (value, interval) for key, value, interval in listing.ranges(Config())}


def ends(interval):
    return [rules._number(text) for text in interval[1:-1].split(", ")]


def test_every_number_has_a_range_that_its_default_is_in_and_that_help_shows():
    numbers = {key: value for key, value in _leaves(Config()) if type(value) in (int, float)}
    assert numbers.keys() == RANGES.keys()
    shown = "\n".join(listing.as_help())
    for key, (value, interval) in RANGES.items():
        assert rules.is_within(value, interval)
        stage, _, name = key.partition(".")
        head = f"--STAGE.{name}=" if hasattr(Stage(), name) and stage in STAGES else f"--{key}="
        (said,) = re.findall(rf"^  {re.escape(head)}.*\n((?:      .*\n)+)", shown + "\n", re.MULTILINE)
        assert f"number in {interval}" in " ".join(said.split())


def test_help_says_what_each_setting_means_in_80_columns():
    said = [one for section in listing.sections() for one in section.settings]
    assert all(one.meaning and one.default is not None for one in said)
    assert {one.key.split(".")[-1] for one in said} >= {key.split(".")[-1] for key, _ in _leaves(Config())}
    assert max(map(len, listing.as_help())) <= 80
    (rate,) = [one for one in said if one.key == "STAGE.lr"]
    assert rate.default == "0.0001 (sft: 2e-05)"


def _leaves(node, prefix=""):
    for key, value in vars(node).items():
        yield from _leaves(value, f"{prefix}{key}.") if dataclasses.is_dataclass(value) else [(f"{prefix}{key}", value)]


@pytest.mark.parametrize("key", RANGES)
def test_a_number_out_of_its_range_is_one_line(key):
    value, interval = RANGES[key]
    low, high = ends(interval)
    outside = [low - 1, high + 1, 10**21, -(10**21)] + [low] * (interval[0] == "(") + [high] * (interval[-1] == ")")
    outside += [math.nan, math.inf, -math.inf] if isinstance(value, float) else []
    for bad in outside:
        bad = bad if isinstance(value, float) or not math.isfinite(bad) else int(bad)
        with pytest.raises(UserError) as error:
            load(CONFIGS / "demo.toml", [f"--{key}={bad}"])
        kind = "number" if isinstance(value, float) else "whole number"
        assert f"{key} is {float(bad) if isinstance(value, float) else bad!r}; expected a {kind} in {interval}" in str(
            error.value
        )


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_values_within_their_ranges_load_or_are_one_line(data):
    chosen = {}
    for key in data.draw(st.sets(st.sampled_from(sorted(RANGES)), max_size=4)):
        value, interval = RANGES[key]
        low, high = ends(interval)
        if isinstance(value, float):
            chosen[key] = data.draw(
                st.floats(low, high, exclude_min=interval[0] == "(", exclude_max=interval[-1] == ")")
            )
        else:
            chosen[key] = data.draw(st.integers(int(low) + (interval[0] == "("), int(high) - (interval[-1] == ")")))
    try:
        loaded = load(CONFIGS / "demo.toml", [f"--{key}={value!r}" for key, value in chosen.items()])
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert {key: dict(_leaves(loaded))[key] for key in chosen} == chosen


def test_an_out_dir_without_a_name_is_refused():
    with pytest.raises(UserError, match="out_dir is ''; expected the path of a folder"):
        load(CONFIGS / "demo.toml", ["--out_dir="])


def test_a_file_overrides_the_default_and_an_argument_the_file():
    config = load(
        CONFIGS / "demo.toml", ["--weak.lr=0.5", "--out_dir=elsewhere", "--weak.data.docstrings=7", "--stages=['sft']"]
    )
    assert (config.weak.lr, config.out_dir, config.stages) == (0.5, "elsewhere", ["sft"])
    assert config.weak.data["docstrings"].weight == 7 and "catalogues" in config.weak.data
    assert "catalogues" not in load(CONFIGS / "demo.toml", ["--weak.data.catalogues=0"]).weak.data
    assert list(load(CONFIGS / "demo.toml", ["--weak.data={ docstrings = 3 }", "--validation.data={}"]).weak.data) == [
        "docstrings"
    ], "a table given whole replaces the file's"
    assert load(CONFIGS / "demo.toml", ["--validation.data={}"]).validation.data == {}


@pytest.mark.parametrize("path", ["my/pairs.jsonl", "a=b/x=1.jsonl", "../a b.parquet", "x.y.z", "C:\\pairs.csv", "x=1"])
def test_a_path_may_hold_dots_and_equals_signs(path):
    about = load(CONFIGS / "demo.toml", [f"--weak.data.{path}=2"]).weak.data[path]
    assert about == Source(weight=2.0)
    about = load(
        CONFIGS / "demo.toml",
        [f'--supervised.data.{path}={{ weight = 3, query = "title", pos = "body", hard_negatives = 2 }}'],
    ).supervised.data[path]
    assert about == Source(3.0, {"query": "title", "pos": "body"}, hard_negatives=2)


def test_what_is_said_of_a_source_comes_back_from_a_saved_run(tmp_path):
    text = """
stages = ["supervised"]
[supervised]
steps = 1
data."a.csv" = { weight = 2, query = "q", pos = ["p1", "p2"], in_batch_negatives = false, hard_negatives = 3 }
data."b.jsonl" = 1
sts = { "c.parquet" = { sentence1 = "a", sentence2 = "b", score = "c" } }
"""
    config = load(write(tmp_path, text))
    assert config.supervised.data["a.csv"] == Source(2.0, {"query": "q", "pos": ["p1", "p2"]}, False, 3)
    assert from_dict(json.loads(json.dumps(dataclasses.asdict(config))), "saved") == config


def test_the_papers_own_numbers_are_the_defaults(tmp_path):
    config = load(write(tmp_path, "stages = ['weak']\n[weak]\nsteps = 1\ndata = { docstrings = 1 }"))
    assert (config.model.layers, config.model.width, config.model.ffn, config.model.heads, config.model.kv_heads) == (
        8,
        3584,
        8192,
        32,
        8,
    )
    assert (
        config.pretrain.batch,
        config.sft.lr,
        config.weak.min_score,
        config.negatives.count,
        config.supervised.beta,
    ) == (256, 2e-5, 0.4, 7, 0.8)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[weak]\ntemprature = 0.1", "unknown key 'weak.temprature'; the nearest is 'weak.temperature'"),
        ("[modle]\nlayers = 2", "unknown key 'modle'; the nearest is 'model'"),
        ("seed = 'x'", "seed is 'x'; expected int"),
        ("plan_only = 1", "plan_only is 1; expected bool"),
        ("tensor_parallel = 0", "tensor_parallel is 0; expected a whole number in [1, 1024]"),
        ("tensor_parallel = 3", "model.heads is 32; expected a multiple of tensor_parallel = 3"),
        ("tensor_parallel = 16", "model.kv_heads is 8; expected a multiple of tensor_parallel = 16"),
        ("tensor_parallel = 4\n[model]\nffn = 1002", "model.ffn is 1002; expected a multiple of tensor_parallel = 4"),
        (
            "tensor_parallel = 4\n[tokenizer]\nvocab_size = 1002",
            "tokenizer.vocab_size is 1002; expected a multiple of tensor_parallel = 4",
        ),
        ("weak = 3", "weak is a section"),
        ("[weak]\ndata = { a = -1 }", "weights above 0, or 0 to leave a source out"),
        ("[weak]\ndata = { a = '1' }", "the weight is '1'"),
        ("[weak]\ndata = { a = nan }", "weights above 0"),
        ("[weak]\ndata = 'a.jsonl'", "weak.data is 'a.jsonl'; expected a table of source = weight"),
        ("[weak]\ndata = { a = { wieght = 1 } }", "weak.data['a']: unknown key 'wieght'; the nearest is 'weight'"),
        ("[weak]\ndata = { a = { query = 'q' } }", "the columns named, query, make no record"),
        ("[weak]\ndata = { a = { text = ['q'] } }", "text is ['q']; expected the name of a column"),
        (
            "stages = ['weak']\n[weak]\nsteps = 1\ndata = { a = { in_batch_negatives = false } }",
            "weak.data['a'].in_batch_negatives is False; expected true",
        ),
        (f"{SUPERVISED}data = {{ a = {{ hard_negatives = 99 }} }}", "expected at most negatives.pool = 32"),
        (f"{SUPERVISED}data = {{ a = {{ hard_negatives = -2 }} }}", "expected 0 or more, or -1"),
        (f"{SUPERVISED}data = {{ a = {{ hard_negatives = true }} }}", "hard_negatives is True; expected int"),
        (
            f"{SUPERVISED}data = {{ a = 1 }}\nsts = {{ b = {{ hard_negatives = 1 }} }}",
            "supervised.sts['b'].hard_negatives is 1; expected none here",
        ),
        (
            f"{SUPERVISED}data = {{ a = {{ hard_negatives = 0, in_batch_negatives = false }} }}",
            "a query needs something to be told apart from",
        ),
        ("max_bad_share = 1.5", "max_bad_share is 1.5; expected a number in [0, 1)"),
        ("[supervised]\ndims = ['a']", "expected a list of int"),
        ("[weak]\nmask = 'diagonal'", "weak.mask is 'diagonal'; expected 'column' or 'row' or 'uniform'"),
        ("[model]\nheads = 5", "model.heads is 5"),
        ("stages = ['weak', 'sft']", "in this order"),
        ("stages = ['weak']", "weak.steps is 0; expected at least 1"),
        (
            "stages = ['weak']\n[weak]\nsteps = 1\nchunk = 4\nchunk_tokens = 999",
            "weak.chunk_tokens is 999; expected 0, since weak.chunk is 4; one of the two must be 0",
        ),
        ("init_whiten = 0.25", "init_whiten is 0.25; expected 0, since init_from is empty"),
        ("seed = ", "cannot read this config"),
    ],
)
def test_a_mistake_gets_one_clear_line(tmp_path, text, said):
    with pytest.raises(UserError) as error:
        load(write(tmp_path, text))
    assert said in str(error.value) and "some.toml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("weak.lr=1", "expected --section.key=value"),
        ("--weak.lrr=1", "nearest is 'weak.lr'"),
        ("--weak.data.my/x.jsonl=much", "expected --weak.data.SOURCE=WEIGHT"),
    ],
)
def test_a_wrong_argument_is_named(argument, said):
    with pytest.raises(UserError, match=said):
        load(CONFIGS / "demo.toml", [argument])


def test_a_config_that_comes_with_the_engine_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("demo") == load("demo.toml") == load(CONFIGS / "demo.toml")
    (tmp_path / "demo").write_text("seed = 7\n" + (CONFIGS / "demo.toml").read_text())
    assert load("demo").seed == 7  # a file that is here comes first
    with pytest.raises(UserError, match="configs/demo.toml: there is no such config; .* conan-1.4b, demo, "):
        load("configs/demo.toml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="absent.toml: there is no such config"):
        load(tmp_path / "absent.toml")
