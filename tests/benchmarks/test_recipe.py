"""The ablation's arms are settings that load, and its intervals are those of a paired t-test."""

import itertools
import json

import numpy as np
import pytest
import recipe
import recipe_report
from scipy import stats

from conan_engine.config import load

rng = np.random.default_rng()


def rows_of(arms, seeds):
    keys = [f"{prefix}{metric}" for prefix in ("", *(f"dims.{dim}." for dim in recipe.DIMS)) for metric in recipe_report.METRICS]
    keys = [key.replace(".docs.ndcg", ".ndcg") if key.startswith("dims") else key for key in keys]
    return [{"arm": arm, "seed": seed, "replaced": 0, "seconds": 1.0, **dict(zip(keys, rng.random(len(keys))))} for arm, seed in itertools.product(arms, seeds)]


@pytest.mark.parametrize("arm", recipe.ARMS)
def test_an_arm_is_the_recipe_with_something_changed(arm):
    whole, changed = (load(recipe.ROOT / "benchmarks/recipe.toml", changes) for changes in ([], recipe.ARMS[arm]))
    assert (changed == whole) == (arm == recipe_report.ALL)
    assert changed.weak.data and changed.supervised.data
    if arm in recipe.FACTORS and "CLR" not in arm:
        assert not any("catalogues" in source for stage in (changed.weak, changed.supervised) for source in stage.data)


def test_comparisons_are_of_arms_that_there_are_and_use_every_arm():
    assert {arm for one in recipe_report.COMPARISONS for pair in one.pairs for arm in pair} == set(recipe.ARMS)


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
    assert (mean, seeds) == (pytest.approx(np.mean(each)), 5) and half == pytest.approx(stats.sem(each) * stats.t.ppf(0.975, 4))


@pytest.mark.parametrize(("found", "papers", "said"), [
    ((0.02, 0.01, 5), 1.5, "confirmed here"), ((-0.02, 0.01, 5), 1.5, "contradicted here"), ((0.02, 0.03, 5), 1.5, "not seen at this scale"),
    ((0.02, 0.01, 5), None, "helps here"), ((-0.02, 0.01, 5), None, "harms here"), ((0.02, float("nan"), 1), 1.5, "too few seeds"), (None, 1.5, "too few seeds"),
])  # fmt: skip
def test_a_verdict(found, papers, said):
    assert recipe_report.verdict(found, papers) == said


def test_it_goes_on_behind_the_rows_that_are_there(tmp_path, monkeypatch):
    trained, out = [], tmp_path / "recipe.json"

    def train(run, *settings):
        assert not (run / "left over").exists()
        (run / "left over").parent.mkdir(parents=True, exist_ok=True)
        (run / "left over").touch()
        trained.append((run.name, settings))
        if stop and len(trained) == stop:
            raise KeyboardInterrupt

    scores = {key: value for key, value in rows_of(["x"], [1])[0].items() if key not in ("arm", "seed", "seconds")}
    for name, instead in (("WORK", tmp_path), ("train", train), ("some_pairs", lambda: None), ("scores", lambda run, given: dict(scores))):
        monkeypatch.setattr(recipe, name, instead)
    monkeypatch.setattr(recipe.checkpoint, "newest", lambda run: (run, {"seconds": 1.0}))
    monkeypatch.setattr(recipe.tasks, "load", lambda: None)
    monkeypatch.setattr("sys.argv", ["recipe.py", "--seeds", "2", "--arm", "SM + CLR", "--arm", "equal weights", "--out", str(out)])
    monkeypatch.chdir(tmp_path)
    stop = 2  # the first seed's language model, then in its first arm
    with pytest.raises(KeyboardInterrupt):
        recipe.main()
    assert not out.exists()
    (tmp_path / "arm-1" / "left over").unlink()
    stop = 0
    recipe.main()
    assert [name for name, _ in trained] == ["lm-1", "arm-1", "arm-1", "lm-1-equal", "arm-1", "lm-2", "arm-2", "lm-2-equal", "arm-2"]
    assert trained[1] == trained[2] and "--seed=2" in trained[-1][1] and "--token_weights=equal" in trained[-1][1]
    rows = json.loads(out.read_text())["rows"]
    assert [(row["arm"], row["seed"]) for row in rows] == [("SM + CLR", 1), ("equal weights", 1), ("SM + CLR", 2), ("equal weights", 2)]
    assert (rows[0]["soft_mask"], rows[0]["cross_lingual"], rows[0]["dhnm"]) == (True, True, False) and "dhnm" not in rows[1]
    recipe.main()
    assert len(trained) == 9


def test_rows_table_and_figure_are_written_whatever_is_there_yet(tmp_path):
    out = tmp_path / "results" / "recipe.json"
    for rows in (rows_of(["SM"], [1]), rows_of(recipe.ARMS, [1, 2])):
        recipe_report.write(rows, out)
        assert json.loads(out.read_text())["rows"] == rows
        table = out.with_suffix(".md").read_text()
        assert all(one.name in table for one in recipe_report.COMPARISONS) and all(f"| {row['arm']} |" in table for row in rows)
        assert out.with_suffix(".png").stat().st_size > 10_000
