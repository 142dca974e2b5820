"""Which documents are right for a query: against sets worked out record by record, and from files as people have
them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import shards_of, small_tokenizer, write_lines

from conan_engine.config import Supervised
from conan_engine.data import known
from conan_engine.errors import UserError

HASH = st.sampled_from([-(2**63), -7, 0, 3, 4, 5, 2**63 - 1])  # few, so that queries meet
GROUP = st.integers(0, 6)


@settings(deadline=None)
@given(
    st.lists(st.tuples(HASH, HASH, GROUP), min_size=1, max_size=12),
    st.lists(HASH, max_size=8),
    st.lists(st.integers(0, 11), min_size=1, max_size=6),
    st.lists(GROUP, max_size=4),
)
def test_equals_sets_worked_out_record_by_record(records, negatives, batch, others):
    queries, documents, groups = (np.array(column, np.int64) for column in zip(*records))
    found = known.find(queries, documents, groups, np.array(negatives, np.int64))

    def groups_of(texts):
        return {group for _, document, group in records if document in texts}

    right = [
        groups_of({query} | {document for other, document, _ in records if other == query}) for query, _, _ in records
    ]
    for record, own in enumerate(groups):
        assert set(found.of(record, own)) == right[record]
    assert len(found.negatives) == len(negatives)
    numbers = {}
    for negative, group in zip(negatives, found.negatives):
        if groups_of({negative}):
            assert group in groups_of({negative})
        else:
            assert group < 0 and numbers.setdefault(negative, group) == group
    assert len(set(numbers.values())) == len(numbers)

    batch = np.array(batch) % len(records)
    present = np.append(groups[batch], others).astype(np.int64)
    bounds = found.among(batch, present)
    several = [right[record] & set(present) if len(right[record] & set(present)) > 1 else set() for record in batch]
    if not any(several):
        assert bounds is None
    else:
        first, last, ids = bounds
        assert [set(ids[a:b]) for a, b in zip(first, last)] == several
        assert len(ids) == sum(map(len, {queries[record]: s for record, s in zip(batch, several)}.values())), (
            "queries share a list"
        )


@pytest.fixture
def shards(tmp_path):
    tokenizer = small_tokenizer(tmp_path)
    records = [
        {"query": "question 1", "pos": ["answer 1", "another answer"]},
        {"query": "question 2", "pos": ["answer 2"], "neg": ["answer 3", "wrong 2"]},
        {"query": "question 1", "pos": ["answer 3"], "neg": ["another answer"]},
        {"query": "question 4", "pos": ["good"]},
        {"query": "good", "pos": ["bad"]},  # its own text is a document
    ]
    path = write_lines(tmp_path / "pairs.jsonl", records)

    def make():
        return shards_of(path, "supervised", Supervised(), tokenizer, tmp_path / "data")

    return make


def test_positives_of_several_records_and_given_negatives_that_are_right_elsewhere(shards):
    shards = shards()
    group = shards.groups(np.arange(6))
    found = known.of(shards)
    assert [set(found.of(record, own)) for record, own in enumerate(group)] == [
        set(group[[0, 1, 3]]), set(group[[0, 1, 3]]), set(group[[2]]), set(group[[0, 1, 3]]), set(group[[4]]),
        set(group[[4, 5]]),
    ]  # fmt: skip
    assert found.negatives[1] < 0 and found.negatives[[0, 2]].tolist() == group[[3, 1]].tolist()


def test_it_is_worked_out_once_and_anew_where_it_is_missing(shards):
    path = shards().directory / known.FILE
    made = path.read_bytes()
    path.unlink()
    assert shards().directory / known.FILE == path
    assert path.stat().st_size == len(made)


def test_a_damaged_file_is_named_or_says_what_it_said(shards):
    shards = shards()
    path = shards.directory / known.FILE
    whole, arrays = path.read_bytes(), vars(known.of(shards))
    named = 0
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            for name, array in vars(known.of(shards)).items():  # a byte that says nothing, such as a file's time
                np.testing.assert_array_equal(array, arrays[name])
        except UserError as error:
            assert f"{known.FILE}: damaged" in str(error) and "delete it and run again" in str(error)
            named += 1
    assert named > len(whole) / 7 / 3
    for rest in (b"", whole[: len(whole) // 2]):
        path.write_bytes(rest)
        with pytest.raises(UserError, match=f"{known.FILE}: damaged"):
            known.of(shards)
