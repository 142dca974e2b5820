"""Records to ids: by one process as by several, in batches that bound memory."""

import itertools

import numpy as np
import pytest
from runs import small_tokenizer

from conan_engine.data import encoding
from conan_engine.data.encoding import Encoders

MANY = [{"query": f"question {i}", "pos": [f"answer {i} {'label ' * (i % 9)}"] * (1 + i % 3), "neg": ["wrong"] * (i % 2)} for i in range(3000)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("processes", [1, 3])
def test_several_processes_give_what_one_gives(tokenizer, processes, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH", (100, 10_000))
    here = [encoding.encode(tokenizer, "pairs", batch, 5) for batch in encoding.batches(MANY)]
    assert len(here) >= 30
    with Encoders(tokenizer, processes) as encoders:
        there = list(encoders.encode("pairs", encoding.batches(MANY), 5))
        again = list(itertools.islice(encoders.encode("pairs", encoding.batches(MANY), 5), 7))  # and is then left
    for mine, theirs in zip((*here, *here[:7]), (*there, *again), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_batch_is_bounded_in_records_and_in_characters():
    records = [{"query": "x" * n, "pos": ["y" * n] * 3, "score": 1.0} for n in (1, 1, 2**19, 1, 2**21, 5)]
    assert [len(batch) for batch in encoding.batches(records)] == [3, 2, 1]
    assert [len(batch) for batch in encoding.batches([{"text": ""}] * 2500)] == [1024, 1024, 452]
    assert list(encoding.batches([])) == []


def test_what_is_done_is_passed_over():
    batches = [[{"pos": ["a"] * n}] for n in (2, 3, 4)]
    for done, left in ((0, (0, batches)), (1, (1, batches)), (2, (0, batches[1:])), (4, (2, batches[1:])), (9, (0, []))):
        start, rest = encoding.behind(iter(batches), "pairs", done)
        assert (start, list(rest)) == left
    assert encoding.behind(iter([[{}] * 5]), "text", 3)[0] == 3
