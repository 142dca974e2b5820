"""Records left out while a source is read: what is written down, and when there are too many."""

import json

import pytest
import runs
from runs import small_tokenizer

from conan_engine.config import Source, Supervised, Weak
from conan_engine.data import rejects
from conan_engine.errors import UserError

GOOD = [json.dumps({"query": f"question {i}", "pos": [f"answer {i}"]}) for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def shards_of(path, tokenizer, share=0.01, use="weak", stage=None):
    return runs.shards_of(path, use, stage or Weak(data={str(path): Source()}), tokenizer, path.parent / "data", share)


def rows_of(path):
    return [json.loads(line) for line in (path.parent / "data" / rejects.NAME).read_text().splitlines()]


def test_what_is_left_out_is_listed_and_counted_by_reason(tmp_path, tokenizer, capsys):
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        "\n".join([*GOOD[:200], "{broken", *GOOD[200:], '{"query": "a", "pos": [" "]}']).encode()
        + b'\n{"query": "\xff", "pos": "b"}\n'
    )
    assert len(shards_of(path, tokenizer)) == 300
    assert [(row["use"], row["file"], row["line"]) for row in rows_of(path)] == [
        ("weak", str(path), n) for n in (201, 302, 303)
    ]
    assert [row["reason"].split(" (")[0] for row in rows_of(path)] == [
        "broken JSON",
        "'pos' holds an empty text; there is nothing to embed in it: fill it or leave the record out",
        "not UTF-8",
    ]
    said = capsys.readouterr().err
    assert (
        f"{path}: left out 3 of 303 records for weak: 1 broken JSON, 1 empty text, 1 not UTF-8; see "
        f"{tmp_path}/data/rejected.jsonl" in said.splitlines()
    )


def test_without_the_setting_the_first_one_stops_the_run(tmp_path, tokenizer):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([*GOOD[:5], "{broken"]))
    with pytest.raises(UserError, match="x.jsonl: line 6: broken JSON"):
        shards_of(path, tokenizer, share=None)


@pytest.mark.parametrize(("bad", "stops"), [(3, False), (4, True)])
def test_more_than_the_largest_share_stops_the_run(tmp_path, tokenizer, bad, stops):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([*["{broken"] * bad, *GOOD]))
    if not stops:
        assert len(shards_of(path, tokenizer)) == 300
        return
    with pytest.raises(
        UserError,
        match=r"x.jsonl: 4 of the first 304 records cannot be used \(4 broken JSON\), more than max_bad_share = 0.01; "
        r".*rejected.jsonl lists them",
    ):
        shards_of(path, tokenizer)
    assert len(rows_of(path)) == 4
    assert not list((tmp_path / "data").glob("*/manifest.json"))
    assert len(shards_of(path, tokenizer, share=0.5)) == 300 and len(rows_of(path)) == 4  # not listed twice


def test_a_source_that_is_mostly_wrong_is_given_up_early(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(rejects, "ENOUGH", 50)
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([*GOOD[:10], *["{broken"] * 10_000]))
    with pytest.raises(UserError, match="40 of the first 50 records"):
        shards_of(path, tokenizer)


def test_an_instruction_without_a_text_is_left_out_too(tmp_path, tokenizer):
    path = tmp_path / "x.jsonl"
    records = [{"instruction": "find", "input": f"question {i}", "output": "answer" if i else ""} for i in range(200)]
    path.write_text("\n".join(map(json.dumps, records)))
    stage = Supervised(data={str(path): Source()})
    assert len(shards_of(path, tokenizer, use="supervised", stage=stage)) == 199
    assert [(row["line"], row["reason"].partition(";")[0]) for row in rows_of(path)] == [(1, "its output is empty")]


def test_columns_named_in_the_config_are_read(tmp_path, tokenizer):
    path = tmp_path / "x.csv"
    path.write_text("title,body\nquestion 1,answer 1\nquestion 2,answer 2\n")
    shards = shards_of(path, tokenizer, stage=Weak(data={str(path): Source(columns={"query": "title", "pos": "body"})}))
    tokens, bounds = shards.gather([0, 1], 0)
    assert [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(bounds, bounds[1:])] == ["question 1", "question 2"]
