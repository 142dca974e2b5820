"""Scores that records bring with them: one for each positive and given negative, in the order of the shards' fields,
whatever units they come in."""

import numpy as np
import pytest
from runs import shards_of, small_tokenizer, write_lines

from conan_engine.config import Supervised
from conan_engine.data import field_scores
from conan_engine.data.sources import paths

PLAIN = [{"query": f"question {i}", "pos": [f"answer {i}"], "neg": [f"wrong {i}"] * (i % 3)} for i in range(30)]
SCORED = [
    {
        "query": f"question {i}",
        "pos": [f"answer {i}", f"another {i}"],
        "neg": [f"wrong {i}", f"bad {i}"],
        "pos_scores": [i, i + 0.5],
    }
    | ({"neg_scores": [-i, 0.25]} if i % 2 else {})
    for i in range(30, 60)
]


def expected(records):
    found = []
    for record in records:
        for score in record.get("pos_scores", [np.nan]):
            found += [score, *record.get("neg_scores", [np.nan] * len(record["neg"]))]
    return np.array(found, np.float32)


@pytest.mark.parametrize(
    "records",
    [SCORED, PLAIN + SCORED, SCORED + PLAIN, SCORED[:3] + PLAIN + SCORED[3:]],
    ids=["all", "later", "first", "between"],
)
@pytest.mark.parametrize("several", [False, True])
def test_scores_stand_as_fields_do(tmp_path, monkeypatch, records, several):
    if several:
        monkeypatch.setattr(paths, "UNIT", (500, 500))
    shards = shards_of(
        write_lines(tmp_path / "pairs.jsonl", records),
        "supervised",
        Supervised(),
        small_tokenizer(tmp_path),
        tmp_path / "data",
    )
    assert len(list(shards.directory.glob("unit-*"))) > several * 3
    found = field_scores.of(shards)
    np.testing.assert_array_equal(found, expected(records))
    assert len(found) == (shards.field_counts(np.arange(len(shards))) - 1).sum()


def test_other_scores_are_other_data(tmp_path):
    tokenizer, found = small_tokenizer(tmp_path), []
    for name, records in (("a", SCORED), ("b", [record | {"pos_scores": [7, 8]} for record in SCORED]), ("c", PLAIN)):
        found.append(
            shards_of(
                write_lines(tmp_path / f"{name}.jsonl", records),
                "supervised",
                Supervised(),
                tokenizer,
                tmp_path / "data",
            )
        )
    assert found[0].tokens == found[1].tokens and found[0].fingerprint != found[1].fingerprint
    assert field_scores.of(found[2]) is None
