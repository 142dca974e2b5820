"""Shards give back what was written or say that they cannot; the order is a permutation."""

import json
import math
import struct
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_records import HASH, VOCAB, assert_same, every_field, random_records, read_all, shard_files, write

from conan_engine import _loader
from conan_engine.data.shards import Shards, order


@st.composite
def data_sets(draw):
    """(vocab_size, records); a record is (fields, score, group)."""
    vocab = draw(st.sampled_from([1, 300, 65_536, 65_537, 150_000, 2**24]))
    field = st.lists(st.integers(0, vocab - 1) | st.just(vocab - 1), max_size=12)
    score = st.floats(width=32)
    group = st.integers(-(2**63), 2**63 - 1)
    record = st.tuples(st.lists(field, max_size=6) | st.lists(st.just([0]), min_size=200, max_size=200), score, group)
    return vocab, draw(st.lists(record, min_size=1, max_size=30))


def test_a_hash_stands_for_the_tokens(tmp_path):
    rng = np.random.default_rng()
    records = random_records(rng, 2, 400, 6)  # two ids and short fields: many are equal
    shards = Shards(write(tmp_path / "a", records + [([[], [0], [0, 0]], 0.0, 0)], 2))
    rows, fields = every_field(shards)
    tokens, cu_seqlens = shards.gather(rows, fields)
    texts = [tuple(tokens[a:b]) for a, b in zip(cu_seqlens, cu_seqlens[1:])]
    hashes = shards.hashes(rows, fields).tolist()
    assert len(set(texts)) == len(set(hashes)) == len(set(zip(texts, hashes))) < len(texts)


def test_the_fingerprint_stands_for_all_that_is_in_them(tmp_path):
    records = random_records(np.random.default_rng(), 300, 40, 30)
    fields, score, group = records[7]
    others = {
        "same": records,
        "shorter": records[:-1],
        "order": records[::-1],
        "score": [*records[:7], (fields, 0.5, group), *records[8:]],
    }
    write(tmp_path / "first", records, 300)
    first = Shards(tmp_path / "first").fingerprint
    for name, other in others.items():
        write(tmp_path / name, other, 300)
        assert (Shards(tmp_path / name).fingerprint == first) == (name == "same"), name


@given(data=data_sets(), shard_bytes=st.sampled_from([1, 400, 1000, 2**20]))
@settings(deadline=None, max_examples=60)
def test_records_come_back_as_written(tmp_path_factory, data, shard_bytes):
    vocab, records = data
    folder = write(tmp_path_factory.mktemp("shards"), records, vocab, shard_bytes=shard_bytes)
    shards = Shards(folder, HASH)
    assert (shards.kind, shards.vocab_size, shards.tokens) == (
        "pairs",
        vocab,
        sum(len(f) for r in records for f in r[0]),
    )
    assert_same(read_all(shards), records)
    for file in shard_files(folder):
        alone = json.loads((folder / "manifest.json").read_text())["shards"][int(file.name[6:11])]
        assert file.stat().st_size == alone["bytes"] and (alone["bytes"] <= shard_bytes or alone["records"] == 1)


@pytest.mark.parametrize("width", VOCAB)
def test_tokens_that_cross_blocks_and_shards_come_back(tmp_path, width):
    rng = np.random.default_rng()
    records = random_records(rng, VOCAB[width], 60, 20_000)
    shards = Shards(write(tmp_path, records, VOCAB[width], shard_bytes=300_000))
    assert len(shard_files(tmp_path)) > 3
    assert_same(read_all(shards), records)


def test_gather_takes_any_order_repeats_and_a_limit(tmp_path):
    rng = np.random.default_rng()
    records = [r for r in random_records(rng, 150_000, 200, 40) if r[0]]
    shards = Shards(write(tmp_path, records, 150_000, shard_bytes=5000))
    rows = rng.integers(0, len(records), 500)
    fields = np.array([rng.integers(len(records[r][0])) for r in rows])
    limit = int(rng.integers(1, 40))
    wanted = [records[r][0][f][:limit] for r, f in zip(rows, fields)]
    tokens, cu_seqlens = shards.gather(rows, fields, limit)
    assert tokens.dtype == cu_seqlens.dtype == np.int32
    assert [tokens[a:b].tolist() for a, b in zip(cu_seqlens, cu_seqlens[1:])] == wanted
    assert shards.lengths(rows, fields).tolist() == [len(records[r][0][f]) for r, f in zip(rows, fields)]
    assert shards.gather(rows, 0)[0].tolist() == [t for r in rows for t in records[r][0][0]]
    assert [len(part) for part in shards.gather([], [])] == [0, 1]


def test_what_does_not_exist_is_an_index_error(tmp_path):
    shards = Shards(write(tmp_path, [([[1], [2, 3]], 0.5, 1), ([], 0.5, 2)], 10))
    for row, field in ((2, 0), (-1, 0), (0, 2), (0, -1), (1, 0), (2**62, 0)):
        with pytest.raises(IndexError):
            shards.gather([0, row], [1, field])
        with pytest.raises(IndexError):
            shards.lengths([row], field)
    for read in (shards.field_counts, shards.scores, shards.groups):
        with pytest.raises(IndexError):
            read([0, 2])


def test_a_reader_written_from_the_format_description_agrees(tmp_path):
    rng = np.random.default_rng()
    for width, vocab in VOCAB.items():
        records = random_records(rng, vocab, 100, 1000)
        folder = write(tmp_path / str(width), records, vocab, shard_bytes=100_000)
        assert_same(
            [record for file in shard_files(folder) for record in read_as_described(file.read_bytes())], records
        )


def read_as_described(data):
    """csrc/shards/FORMAT.md in Python."""
    magic, version, width, vocab, tokenizer, kind, crc = struct.unpack_from("<8sIIQ32s36sI", data)
    assert (magic, version, tokenizer.hex(), kind.rstrip(b"\0")) == (
        b"CONANTOK",
        1,
        HASH,
        b"pairs",
    ) and crc == _loader.crc32c(data[:92])
    at, records, fields, tokens, index_crc, crc, magic = struct.unpack("<QQQQII8s", data[-48:])
    assert (
        magic == b"CONANEND"
        and crc == _loader.crc32c(data[:96] + data[-48:-12])
        and index_crc == _loader.crc32c(data[at:-48])
    )
    ids = [int.from_bytes(data[i : i + width], "little") for i in range(96, at, width)]
    assert len(ids) == tokens and all(i < vocab for i in ids)
    arrays = []
    for letter, count in (
        ("q", records),
        ("f", records),
        ("I", records + 1),
        ("I", fields + 1),
        ("I", -(-tokens * width // 16384)),
    ):
        arrays.append(struct.unpack_from(f"<{count}{letter}", data, at))
        at += struct.calcsize(f"<{count}{letter}")
    assert at == len(data) - 48
    groups, scores, first_field, first_token, block_crc = arrays
    assert list(block_crc) == [
        _loader.crc32c(data[i : min(i + 16384, 96 + tokens * width)]) for i in range(96, 96 + tokens * width, 16384)
    ]
    for r in range(records):
        yield (
            [ids[first_token[f] : first_token[f + 1]] for f in range(first_field[r], first_field[r + 1])],
            scores[r],
            groups[r],
        )


@given(data=st.binary(max_size=200))
def test_crc32c_is_castagnolis_on_every_path(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    assert _loader.crc32c(data) == _loader.crc32c_portable(data) == crc ^ 0xFFFFFFFF
    assert _loader.crc32c(b"123456789") == 0xE3069283


# ---- threads


def test_many_threads_read_at_once(tmp_path):
    rng = np.random.default_rng()
    records = [([rng.integers(0, 150_000, 500).tolist()], 0, 0) for _ in range(300)]
    write(tmp_path, records, 150_000, shard_bytes=100_000)
    wrong = []

    def reader(shards, seed):
        rows = np.random.default_rng(seed).permutation(300)
        for part in np.split(rows, 10):
            if shards.gather(part, 0)[0].tolist() != [t for r in part for t in records[r][0][0]]:
                wrong.append(seed)

    for _ in range(5):
        shards = Shards(tmp_path)  # fresh: its blocks are checked by whoever comes first
        threads = [threading.Thread(target=reader, args=(shards, seed)) for seed in rng.integers(2**32, size=4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# ---- order


@given(
    seed=st.integers(-(2**70), 2**70),
    epoch=st.integers(0, 2**40),
    count=st.integers(1, 3000) | st.integers(1, 40).map(lambda n: n * n),
)
@settings(deadline=None)
def test_order_is_a_permutation(seed, epoch, count):
    assert sorted(order(seed, epoch, count, np.arange(count)).tolist()) == list(range(count))


@given(count=st.integers(1, 2**62), draw=st.data())
def test_order_of_a_large_count_stays_in_range_and_distinct(count, draw):
    positions = draw.draw(st.lists(st.integers(0, count - 1), unique=True, max_size=50))
    places = order(1, 2, count, np.array(positions, dtype=np.int64))
    assert len(set(places.tolist())) == len(positions) and all(0 <= p < count for p in places)


def test_order_does_not_depend_on_what_else_is_asked():
    seed, count = np.random.default_rng().integers(1, 10**6, 2).tolist()
    positions = np.random.default_rng().integers(0, count, 100)
    assert order(seed, 3, count, positions).tolist() == [order(seed, 3, count, [p])[0] for p in positions]


def test_order_differs_by_seed_and_epoch():
    rng = np.random.default_rng()
    seed, epoch, count = int(rng.integers(2**60)), int(rng.integers(2**30)), int(rng.integers(5000, 10**9))
    base = order(seed, epoch, count, np.arange(5000))
    assert (base == np.arange(5000)).sum() < 20
    for other in (
        order(seed + 1, epoch, count, np.arange(5000)),
        order(seed, epoch + 1, count, np.arange(5000)),
        order(epoch, seed, count, np.arange(5000)),
    ):
        assert (base == other).sum() < 20  # about one would agree by chance


@pytest.mark.parametrize("count", [2, 4, 5])
def test_every_permutation_is_as_likely_as_any(count):
    first = int(np.random.default_rng().integers(2**60))
    trials, cells = 20_000, math.factorial(count)
    seen = Counter(tuple(order(first + i, i % 3, count, np.arange(count)).tolist()) for i in range(trials))
    chi_squared = (
        sum((n - trials / cells) ** 2 for n in seen.values()) * cells / trials + (cells - len(seen)) * trials / cells
    )
    assert chi_squared < cells + 20 + 7 * math.sqrt(2 * cells)  # by chance less often than once in 1e7 runs


def test_order_refuses_what_is_outside():
    for position in (-1, 10):
        with pytest.raises(IndexError):
            order(1, 1, 10, [0, position])
    with pytest.raises(ValueError):
        order(1, 1, 0, [])
