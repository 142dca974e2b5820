"""Records for tests of token shards: random ones, written and read back."""

from pathlib import Path

import numpy as np

from conan_engine.data.shard_writer import ShardWriter

HASH = "5e" * 31 + "07"
VOCAB = {2: 60_000, 3: 150_000}  # by the bytes a token takes


def write(folder, records, vocab, **options):
    with ShardWriter(folder, kind="pairs", tokenizer_hash=HASH, vocab_size=vocab, **options) as writer:
        for fields, score, group in records:
            writer.add(fields, score, group)
    return folder


def random_records(rng, vocab, count, longest):
    return [
        (
            [rng.integers(0, vocab, rng.integers(0, longest)).tolist() for _ in range(rng.integers(0, 5))],
            rng.standard_normal(),
            int(rng.integers(2**62)),
        )
        for _ in range(count)
    ]


def every_field(shards):
    """(records, fields) that name every field of every record."""
    counts = shards.field_counts(np.arange(len(shards)))
    return np.repeat(np.arange(len(shards)), counts), np.concatenate([np.arange(n) for n in counts])


def read_all(shards):
    everyone = np.arange(len(shards))
    tokens, cu_seqlens = shards.gather_records(everyone)
    flat = iter([tokens[a:b].tolist() for a, b in zip(cu_seqlens, cu_seqlens[1:])])
    counts = shards.field_counts(everyone)
    return [
        ([next(flat) for _ in range(n)], score, group)
        for n, score, group in zip(counts, shards.scores(everyone).tolist(), shards.groups(everyone).tolist())
    ]


def assert_same(found, written):
    assert len(found) == len(written)
    for (fields, score, group), (fields_, score_, group_) in zip(found, written):
        assert fields == fields_ and group == group_
        np.testing.assert_equal(score, float(np.float32(score_)))  # NaN equals NaN


def shard_files(folder):
    return sorted(Path(folder).glob("shard-*"))
