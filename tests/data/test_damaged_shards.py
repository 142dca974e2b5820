"""Shards that are damaged, swapped, missing or of another tokenizer are refused in one line."""

import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_records import HASH, VOCAB, every_field, read_all, shard_files, write

from conan_engine import _loader
from conan_engine.data.shards import Shards
from conan_engine.errors import UserError


@pytest.fixture(scope="module", params=VOCAB, ids=lambda width: f"{width}-byte tokens")
def pristine(request, tmp_path_factory):
    """(folder, the bytes of each of its files): two shards of several token blocks each."""
    rng = np.random.default_rng()
    records = [([rng.integers(1, VOCAB[request.param], 3000).tolist() for _ in range(3)], 0.5, 1) for _ in range(8)]
    folder = write(tmp_path_factory.mktemp("pristine"), records, VOCAB[request.param], shard_bytes=100_000)
    return folder, {path: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def damage(pristine):
    """damage(path, data): write `data` there; what stood there returns after the test."""
    _, files = pristine
    yield lambda path, data: path.write_bytes(data)
    for path, data in files.items():
        path.write_bytes(data)


def bytes_of(files):
    """A byte anywhere, or (small parts would seldom be hit) in a shard's header, index or footer."""
    return st.sampled_from(sorted(files)).flatmap(
        lambda path: st.tuples(
            st.just(path), st.integers(0, len(files[path]) - 1) | st.integers(0, 95) | st.integers(-400, -1)
        )
    )


@given(draw=st.data(), flip=st.integers(1, 255))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_flipped_byte_goes_unnoticed(pristine, draw, flip, damage):
    folder, files = pristine
    path, at = draw.draw(bytes_of({p: d for p, d in files.items() if p.suffix == ".tokens"}))
    data = bytearray(files[path])
    data[at] ^= flip
    damage(path, data)
    with pytest.raises(UserError) as error:
        read_all(Shards(folder, HASH))
    damage(path, files[path])
    message = str(error.value)
    assert str(path) in message and f"delete {folder} and run again" in message and "\n" not in message


@given(draw=st.data(), flip=st.integers(1, 255))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_manifest_never_gives_other_data(pristine, draw, flip, damage):
    folder, files = pristine
    path = folder / "manifest.json"
    data = bytearray(files[path])
    data[draw.draw(st.integers(0, len(data) - 1))] ^= flip
    whole = read_all(Shards(folder, HASH))
    damage(path, data)
    try:
        assert read_all(Shards(folder, HASH)) == whole  # white space, or 1 written as 1.0
    except UserError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
    damage(path, files[path])


@given(draw=st.data())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_shard_cut_short_or_too_long_is_refused(pristine, draw, damage):
    folder, files = pristine
    path = draw.draw(st.sampled_from(shard_files(folder)))
    size = len(files[path])
    cut = draw.draw(st.integers(0, size - 1) | st.integers(0, 200) | st.integers(size - 200, size - 1))
    for data in (files[path][:cut], files[path] + files[path][cut : cut + 100], files[path][cut + 1 :]):
        damage(path, data)
        with pytest.raises(UserError, match=path.name):
            Shards(folder, HASH)
    damage(path, files[path])


def sign(data):
    """The shard with every checksum made right again, as far as its footer says where they are."""
    data = bytearray(data)
    data[92:96] = struct.pack("<I", _loader.crc32c(bytes(data[:92])))
    width, (at, _, _, tokens) = struct.unpack_from("<I", data, 12)[0], struct.unpack_from("<QQQQ", data, len(data) - 48)
    end = 96 + tokens * width
    if at == end < len(data):
        blocks = [_loader.crc32c(bytes(data[i : min(i + 16384, end)])) for i in range(96, end, 16384)]
        data[len(data) - 48 - 4 * len(blocks) : len(data) - 48] = struct.pack(f"<{len(blocks)}I", *blocks)
        data[-16:-12] = struct.pack("<I", _loader.crc32c(bytes(data[at:-48])))
    data[-12:-8] = struct.pack("<I", _loader.crc32c(bytes(data[:96] + data[-48:-12])))
    return data


@given(draw=st.data(), flip=st.integers(1, 255))
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nonsense_under_right_checksums_cannot_lead_outside_the_file(pristine, draw, flip, damage):
    folder, files = pristine
    path, at = draw.draw(bytes_of({p: d for p, d in files.items() if p.suffix == ".tokens"}))
    assert sign(files[path]) == files[path]
    data = bytearray(files[path])
    data[at] ^= flip
    damage(path, sign(data))
    try:
        shards = _loader.ShardSet([str(path)])  # without the manifest, which would notice
        rows, fields = every_field(shards)
        tokens, _ = shards.gather(rows, fields, None)
        assert 0 <= tokens.min() and tokens.max() < shards.describe()[0]["vocab_size"]
        assert len(tokens) <= shards.describe()[0]["tokens"]
    except UserError as error:
        assert str(path) in str(error)
    damage(path, files[path])


@pytest.mark.parametrize("more", [1, 2**20, 2**32 - 1, 2**61, 2**64 - 1])
def test_a_footer_that_counts_more_than_the_file_holds_is_refused(pristine, damage, more):
    folder, files = pristine
    path = shard_files(folder)[0]
    width = struct.unpack_from("<I", files[path], 12)[0]
    for added in ((0, 1, 0, 0), (0, 0, 1, 0), (width, 0, 0, 1), (0, 0, 0, 1), (1, 0, 0, 0)):
        data = bytearray(files[path])
        counts = struct.unpack_from("<QQQQ", data, len(data) - 48)
        struct.pack_into("<QQQQ", data, len(data) - 48, *((n + a * more) % 2**64 for n, a in zip(counts, added)))
        damage(path, sign(data))
        with pytest.raises(UserError, match="footer's counts"):
            _loader.ShardSet([str(path)])


def test_swapped_shards_are_refused(pristine, damage):
    folder, files = pristine
    first, second = shard_files(folder)[:2]
    damage(first, files[second])
    damage(second, files[first])
    with pytest.raises(UserError, match="is not the shard that manifest.json describes"):
        Shards(folder, HASH)


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path, [([[1]], 0, 0)], 10)
    (tmp_path / "shard-00000.tokens").unlink()
    with pytest.raises(UserError, match="shard-00000.tokens: cannot be opened"):
        Shards(tmp_path)


def test_shards_of_another_tokenizer_are_refused_by_both_names(tmp_path):
    write(tmp_path, [([[1]], 0, 0)], 10)
    with pytest.raises(UserError, match=f"{HASH[:12]}.*{'ab' * 6}.*delete"):
        Shards(tmp_path, "ab" * 32)
