"""Records to ids, in batches that bound memory."""

from conan_engine.data import encoding


def test_a_batch_is_bounded_in_records_and_in_characters():
    records = [{"query": "x" * n, "pos": ["y" * n] * 3, "score": 1.0} for n in (1, 1, 2**19, 1, 2**21, 5)]
    assert [len(batch) for batch in encoding.batches(records)] == [3, 2, 1]
    assert [len(batch) for batch in encoding.batches([{"text": ""}] * 2500)] == [1024, 1024, 452]
    assert list(encoding.batches([])) == []
