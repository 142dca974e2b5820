"""The ablation's arms are settings that load, and its intervals are those of a paired t-test."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import recipe
import recipe_report
from scipy import stats

from conan_engine.config import Config, Source, Supervised, Weak
from conan_engine.settings import load

rng = np.random.default_rng()
SOURCES = {"a": Source(), "catalogues": Source()}
PARTS = {"weak": Weak(data=SOURCES, dims=[4]), "supervised": Supervised(data=SOURCES, sts=SOURCES)}


CONFIGS = [recipe.ROOT / "configs" / f"{name}.toml" for name in ("recipe", "recipe-smollm", "recipe-smollm-cpu")]
DIMS = (32, 64, 128, 256)


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def config(request, monkeypatch):
    """Of each config, (path, settings over it). The language model that the one starts from need not be here."""
    monkeypatch.setattr("conan_engine.model.pretrained.adopt", lambda *_: None)
    return request.param, [
        "--model.width=576",
        "--model.heads=9",
        "--model.kv_heads=3",
    ] if "smollm" in request.param.stem else []


def rows_of(arms, seeds):
    keys = [
        f"{prefix}{metric}" for prefix in ("", *(f"dims.{dim}." for dim in DIMS)) for metric in recipe_report.METRICS
    ]
    keys = [key.replace(".docs.ndcg", ".ndcg") if key.startswith("dims") else key for key in keys]
    return [
        {"arm": arm, "seed": seed, "replaced": 0, "seconds": 1.0, **dict(zip(keys, rng.random(len(keys))))}
        for arm, seed in itertools.product(arms, seeds)
    ]


def test_an_arm_is_the_recipe_with_something_changed(config):
    path, settings = config
    whole = load(path, settings)
    for arm, changes in recipe.arms(whole, "teacher").items():
        changed = load(path, [*settings, *changes])
        assert (changed == whole) == (arm == recipe_report.ALL)
        assert changed.weak.data and changed.supervised.data
        if arm in recipe.FACTORS and "CLR" not in arm:
            assert not any(
                "catalogues" in source for stage in (changed.weak, changed.supervised) for source in stage.data
            )
        for leg in recipe.legs(changes, whole, Path("x"), 1):
            load(path, [*settings, f"--stages={leg.stages}", *leg.changes])
        assert sorted(change for leg in recipe.legs(changes, whole, Path("x"), 1) for change in leg.changes) == sorted(
            changes
        )


def test_comparisons_are_of_arms_that_there_are_and_use_every_arm():
    arms = {
        arm
        for config in CONFIGS
        for arm in recipe.arms(Config(init_from="x" * ("smollm" in config.stem), **PARTS), "teacher")
    }
    rows = rows_of(arms, [1])
    compared = {arm for one in recipe_report.comparisons(rows) for pair in one.pairs for arm in pair}
    assert compared == arms and set(itertools.chain(*recipe.ROUNDS)) <= arms
    assert {arm for one in recipe_report.COMPARISONS for pair in one.pairs for arm in pair} <= arms


def test_arms_share_what_they_have_in_common(config):
    settings = load(config[0], config[1])
    changes = recipe.arms(settings)
    ways = {arm: [leg.folder for leg in recipe.legs(changes[arm], settings, Path("x"), 1)] for arm in changes}
    whole = ways[recipe_report.ALL]
    assert all(ways[arm][:-1] == whole[:-1] for arm in ("SM + CLR", "no STS", "random negatives", "quantiles"))
    assert all(ways[arm][-2] != whole[-2] for arm in ("causal", "row", "none"))
    assert len({way[-1] for way in ways.values()}) == len(ways)
    other = [leg.folder for leg in recipe.legs([], settings, Path("x"), 2)]
    assert not set(other) & set(whole)
    for arm, way in ways.items():
        legs = recipe.legs(changes[arm], settings, Path("x"), 1)
        assert [leg.start for leg in legs] == [None, *way[:-1]]
        stages = [stage for leg in legs for stage in leg.stages]
        assert stages == (
            ["pretrain"] if arm.startswith("LLM2Vec") else [] if settings.init_from else ["pretrain", "sft"]
        ) + ["weak", "supervised"]


def test_an_interval_is_that_of_a_paired_t_test_over_the_seeds_that_have_both():
    one = recipe_report.Comparison("x", [("a", "b")])
    rows = rows_of("ab", range(6)) + rows_of("a", [9])
    mean, half, seeds = recipe_report.difference(rows, one, recipe_report.ENGLISH)
    with_it, without = ([row["docs.ndcg@10"] for row in rows if row["arm"] == arm and row["seed"] != 9] for arm in "ab")
    interval = stats.ttest_rel(with_it, without).confidence_interval(0.95)
    assert (mean - half, mean + half, seeds) == pytest.approx((interval.low, interval.high, 6))
    assert np.isnan(recipe_report.difference(rows_of("ab", [1]), one, recipe_report.MULTI)[1])
    assert recipe_report.difference(rows_of("a", [1]), one, recipe_report.MULTI) is None


def test_a_seed_of_several_pairs_counts_once():
    one = recipe_report.Comparison("x", [("a", "b"), ("c", "d")], prefix="dims.64.")
    rows = rows_of("abcd", range(5))
    score = {(row["arm"], row["seed"]): row["dims.64.ndcg@10"] for row in rows}
    each = [(score["a", seed] - score["b", seed] + score["c", seed] - score["d", seed]) / 2 for seed in range(5)]
    mean, half, seeds = recipe_report.difference(rows, one, "docs.ndcg@10")
    assert (mean, seeds) == (pytest.approx(np.mean(each)), 5) and half == pytest.approx(
        stats.sem(each) * stats.t.ppf(0.975, 4)
    )


@pytest.mark.parametrize(("found", "papers", "said"), [
    ((0.02, 0.01, 5), 1.5, "confirmed here"), ((-0.02, 0.01, 5), 1.5, "contradicted here"),
    ((0.02, 0.03, 5), 1.5, "not seen at this scale"),
    ((0.02, 0.01, 5), None, "helps here"), ((-0.02, 0.01, 5), None, "harms here"),
    ((0.02, float("nan"), 1), 1.5, "too few seeds"), (None, 1.5, "too few seeds"),
])  # fmt: skip
def test_a_verdict(found, papers, said):
    assert recipe_report.verdict(found, papers) == said


def test_it_goes_on_behind_the_rows_that_are_there(tmp_path, monkeypatch):
    trained, out = [], tmp_path / "recipe.json"

    def run(config, folder, *settings, share, log):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("step 1")
        folder.mkdir(exist_ok=True)
        trained.append((folder, settings))
        if stop and len(trained) == stop:
            raise KeyboardInterrupt

    config = tmp_path / "recipe.toml"
    config.write_text(CONFIGS[0].read_text().replace("runs/recipe", str(tmp_path)))
    scores = {key: value for key, value in rows_of(["x"], [1])[0].items() if key not in ("arm", "seed", "seconds")}
    for where, name, instead in (
        (recipe.training, "run", run),
        (recipe, "some_pairs", lambda *_: None),
        (recipe, "scores", lambda *_: dict(scores)),
    ):
        monkeypatch.setattr(where, name, instead)
    monkeypatch.setattr(recipe.checkpoint, "newest", lambda run: (run, {"seconds": 1.0}))
    monkeypatch.setattr(recipe.tasks, "load", lambda path: {"x": None})
    arms = ("--arm", "SM + CLR", "--arm", "equal weights", "--arm", "no STS")
    monkeypatch.setattr(
        "sys.argv",
        ["recipe.py", "--config", str(config), "--seeds", "2", *arms, "--out", str(tmp_path), "--tasks", "x"],
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "ROOT", tmp_path)
    stop = 3  # in the supervised stage of the first arm
    with pytest.raises(KeyboardInterrupt):
        recipe.main()
    assert not out.exists()
    stop = 0
    recipe.main()
    stages = [settings[0].removeprefix("--stages=") for _, settings in trained]
    one, other = ["['pretrain', 'sft']", "['weak']", "['supervised']"], ["['supervised']"]
    assert stages == one + other + other + one[:2] + other * 2 + one * 2
    assert trained[2] == trained[3] and "--token_weights=equal" in trained[-3][1] and "--seed=2" in trained[-1][1]
    assert f"--init_from={trained[-2][0]}" in trained[-1][1]
    rows = json.loads(out.read_text())["rows"]
    assert [(row["arm"], row["seed"]) for row in rows] == [
        ("SM + CLR", 1),
        ("no STS", 1),
        ("SM + CLR", 2),
        ("no STS", 2),
        ("equal weights", 1),
        ("equal weights", 2),
    ]
    assert (rows[0]["soft_mask"], rows[0]["cross_lingual"], rows[0]["dhnm"]) == (
        True,
        True,
        False,
    ) and "dhnm" not in rows[1]
    assert rows[0]["seconds"] == 2.0 and not any(folder.exists() for folder, _ in trained), (
        "language modelling does not count; what nobody needs is gone"
    )
    before = len(trained)
    recipe.main()
    assert len(trained) == before


def test_rows_table_and_figure_are_written_whatever_is_there_yet(tmp_path):
    out = tmp_path / "results" / "recipe.json"
    for rows in (rows_of(["SM"], [1]), rows_of(["SM", "none", recipe_report.ALL, "no Matryoshka"], [1, 2])):
        recipe_report.write(rows, out)
        assert json.loads(out.read_text())["rows"] == rows
        table = out.with_suffix(".md").read_text()
        compared = recipe_report.comparisons(rows)
        assert (
            len(compared) == (0 if len(rows) == 1 else 5)
            and all(one.name in table for one in compared)
            and all(f"| {row['arm']} |" in table for row in rows)
        )
        assert out.with_suffix(".png").stat().st_size > 10_000
