"""Narrow ids become tokens, positions, targets and mask: by the host's compiler everywhere, by the kernel on a GPU."""

import ctypes
import os
import shutil
import subprocess
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conan_engine import _loader
from conan_engine.data.loader import Loader
from conan_engine.data.shard_writer import ShardWriter
from conan_engine.data.shards import Shards
from conan_engine.data.unpack import Unpacker
from conan_engine.errors import UserError

ROOT = Path(__file__).parents[2]
VOCAB = {2: 2**16, 3: 2**24}


def random_batch(rng, width, lengths):
    """(ids, width, cu_seqlens, follow) as upload takes them, and the tokens."""
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    tokens = rng.integers(0, VOCAB[width], cu_seqlens[-1]).astype(np.int32)
    ids = np.ascontiguousarray(tokens.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :width]).reshape(-1)
    follow = np.where(rng.random(len(lengths)) < 0.5, -100, rng.integers(0, VOCAB[width], len(lengths))).astype(
        np.int32
    )
    return (ids, width, cu_seqlens, follow), tokens


def expected(batch, tokens):
    _, _, cu_seqlens, follow = batch
    positions, targets = [], []
    for s, (begin, end) in enumerate(zip(cu_seqlens, cu_seqlens[1:])):
        row = tokens[begin:end].tolist()
        positions += range(len(row))
        targets += row[1:] + [int(follow[s])] * bool(row)
    targets = np.array(targets, np.int32)
    return {
        "tokens": tokens,
        "cu_seqlens": cu_seqlens,
        "positions": np.array(positions, np.int32),
        "targets": targets,
        "mask": targets != -100,
    }


class Narrow(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("ids", "cu_seqlens", "follow")] + [
        ("width", ctypes.c_uint32),
        ("sequences", ctypes.c_int32),
    ]


class Wide(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("tokens", "positions", "targets", "mask")]


@pytest.fixture(scope="module")
def unpack_host(tmp_path_factory):
    """unpack_token.h as the host runs it: called with a batch, gives the columns; what it leaves alone is -1, or 7 in
    the mask."""
    library = tmp_path_factory.mktemp("unpack") / "unpack_host.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}"]
    subprocess.run(
        [*os.environ.get("CXX", "c++").split(), *flags, str(ROOT / "tests/csrc/unpack_host.cpp"), "-o", str(library)],
        check=True,
    )
    function = ctypes.CDLL(str(library)).unpack_host
    function.argtypes, function.restype = [Narrow, Wide], None

    def call(ids, width, cu_seqlens, follow=None):
        count, pointer = int(cu_seqlens[-1]), lambda a: None if a is None else a.ctypes.data
        out = {
            "tokens": np.full(count, -1, np.int32),
            "positions": np.full(count, -1, np.int32),
            "targets": np.full(count, -1, np.int32),
            "mask": np.full(count, 7, np.uint8),
        }
        function(
            Narrow(pointer(ids), pointer(cu_seqlens), pointer(follow), width, len(cu_seqlens) - 1),
            Wide(*map(pointer, out.values())),
        )
        return out

    return call


lengths_of_sequences = st.lists(st.sampled_from([0, 0, 1, 2]) | st.integers(0, 40), min_size=1, max_size=20)


@given(width=st.sampled_from([2, 3]), lengths=lengths_of_sequences, seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=200)
def test_each_token_is_derived_as_written_out(unpack_host, width, lengths, seed):
    batch, tokens = random_batch(np.random.default_rng(seed), width, lengths)
    found, wanted = unpack_host(*batch), expected(batch, tokens)
    for name, array in found.items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)
    without = unpack_host(*batch[:3])
    np.testing.assert_array_equal(without["tokens"], tokens)
    np.testing.assert_array_equal(without["positions"], wanted["positions"])
    assert (without["targets"] == -1).all() and (without["mask"] == 7).all()  # left alone


@pytest.mark.parametrize(("kind", "shape"), [("text", "rows"), ("pairs", "records")])
@pytest.mark.parametrize("vocab", VOCAB.values())
def test_raw_batches_hold_what_the_loader_gives_on_a_cpu(unpack_host, tmp_path, kind, shape, vocab):
    rng = np.random.default_rng()
    with ShardWriter(tmp_path, kind=kind, tokenizer_hash="ab" * 32, vocab_size=vocab) as writer:
        for _ in range(100):
            longest = 90 if kind == "text" else 10  # texts are split
            writer.add([rng.integers(0, vocab, rng.integers(1, longest)) for _ in range({"text": 1, "pairs": 2}[kind])])
    shards = Shards(tmp_path)
    group = types.SimpleNamespace(rank=1, world=2, device=torch.device("cpu"))
    plain = Loader(
        {"a": shards}, {"a": 1.0}, kind=kind, shape=shape, batch=6, max_tokens=30, seed=0, group=group, threads=1
    )
    raw = _loader.Loader(sets=[shards.mapped], weights=[1.0], step=0, state=None, **{**plain.options, "raw": True})
    for _ in range(40):
        wanted, batch = plain.next(), raw.next()
        assert batch["tokens"] is batch["positions"] is batch["targets"] is batch["mask"] is None and batch[
            "width"
        ] == (2 if vocab == 2**16 else 3)
        found = unpack_host(*(batch[name] for name in ("ids", "width", "cu_seqlens", "follow")))
        for name in ("tokens", "positions") + (("targets", "mask") if shape == "rows" else ()):
            np.testing.assert_array_equal(found[name], getattr(wanted, name).numpy(), err_msg=name)
        assert np.array_equal(batch["cu_seqlens"], wanted.cu_seqlens) and np.array_equal(batch["state"], plain.state)
    plain.close()
    raw.close()


def test_the_cuda_part_is_built_and_linked_where_nvcc_is_found():
    nvcc = os.environ.get("NVCC", shutil.which("nvcc") or "")
    assert _loader.has_cuda == hasattr(_loader, "Unpacker") == bool(nvcc)


def test_the_kernel_is_compiled_for_each_named_architecture(tmp_path):
    nvcc = os.environ.get("NVCC", shutil.which("nvcc") or "")
    if not nvcc:
        pytest.skip("needs nvcc")
    for arch in ("sm_80", "sm_90"):
        cubin = tmp_path / f"{arch}.cubin"
        subprocess.run(
            [
                nvcc,
                "-std=c++17",
                f"-I{ROOT / 'csrc'}",
                "-cubin",
                f"-arch={arch}",
                "-Werror",
                "all-warnings",
                str(ROOT / "csrc/unpack/unpack.cu"),
                "-o",
                str(cubin),
            ],
            check=True,
        )
        assert b"unpack" in cubin.read_bytes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_error_says_so():
    with pytest.raises(RuntimeError if _loader.has_cuda else UserError, match="CUDA"):
        Unpacker("cuda")


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("width", VOCAB)
def test_the_kernel_gives_what_is_written_out(width):
    rng, unpacker = np.random.default_rng(), Unpacker("cuda")
    for lengths in ([0], [1], [0, 3, 0, 0, 1], rng.integers(0, 700, 300), [1_000_001]):
        batch, tokens = random_batch(rng, width, lengths)
        wanted = expected(batch, tokens)
        found = unpacker.upload(*batch)
        assert set(found) == set(wanted) and set(unpacker.upload(*batch[:3])) == {"tokens", "cu_seqlens", "positions"}
        for name, tensor in found.items():
            assert tensor.is_cuda and tensor.dtype == (torch.bool if name == "mask" else torch.int32)
            np.testing.assert_array_equal(tensor.cpu().numpy(), wanted[name], err_msg=name)


@pytest.mark.gpu
def test_memory_in_use_by_a_slow_stream_is_not_overwritten():
    rng, unpacker, stream = np.random.default_rng(), Unpacker("cuda", slots=2), torch.cuda.Stream()
    copies = []
    with torch.cuda.stream(stream):
        for _ in range(40):  # dropped while the GPU has not begun to read it: the host is far ahead
            batch, tokens = random_batch(rng, 3, rng.integers(0, 2000, 50))
            found = unpacker.upload(*batch)
            torch.cuda._sleep(2_000_000)
            copies.append((found["tokens"].clone(), found["targets"].clone(), expected(batch, tokens)))
            del found
    stream.synchronize()
    for tokens, targets, wanted in copies:
        np.testing.assert_array_equal(tokens.cpu().numpy(), wanted["tokens"])
        np.testing.assert_array_equal(targets.cpu().numpy(), wanted["targets"])


@pytest.mark.gpu
def test_holding_every_slot_is_an_error_and_letting_go_mends_it():
    rng, unpacker = np.random.default_rng(), Unpacker("cuda", slots=2)
    batch, _ = random_batch(rng, 2, [5, 6])
    held = [unpacker.upload(*batch)["tokens"] for _ in range(2)]
    with pytest.raises(RuntimeError, match="all 2 batches"):
        unpacker.upload(*batch)
    held.pop()
    unpacker.upload(*batch)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "change",
    [
        {"width": 4},
        {"cu_seqlens": np.array([0, 5, 3, 11], np.int32)},
        {"cu_seqlens": np.array([0, 12], np.int32)},
        {"follow": np.zeros(1, np.int32)},
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(change):
    batch, _ = random_batch(np.random.default_rng(), 2, [5, 6])
    with pytest.raises(ValueError, match="expected"):
        Unpacker("cuda").upload(**{**dict(zip(("ids", "width", "cu_seqlens", "follow"), batch)), **change})


@pytest.mark.gpu
def test_a_loader_for_a_gpu_gives_the_batches_of_one_for_a_cpu(tmp_path):
    rng = np.random.default_rng()
    with ShardWriter(tmp_path, kind="text", tokenizer_hash="ab" * 32, vocab_size=150_000) as writer:
        for _ in range(500):
            writer.add([rng.integers(0, 150_000, rng.integers(1, 3000))])
    shards = Shards(tmp_path)
    here, there = (
        Loader(
            {"a": shards},
            {"a": 1.0},
            kind="text",
            shape="rows",
            batch=8,
            max_tokens=1024,
            seed=0,
            group=types.SimpleNamespace(rank=0, world=1, device=torch.device(d)),
            threads=2,
        )
        for d in ("cpu", "cuda")
    )
    for _ in range(100):
        wanted, found = here.next(), there.next()
        for name in ("tokens", "cu_seqlens", "positions", "targets", "mask"):
            assert torch.equal(getattr(found, name).cpu(), getattr(wanted, name)), name
    here.close()
    there.close()
