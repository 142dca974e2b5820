"""What a writer of token shards refuses, and what is left of one that did not come to its end."""

import signal
import subprocess
import sys

import pytest
from shard_records import HASH, shard_files, write

from conan_engine.data.shard_writer import ShardWriter
from conan_engine.data.shards import Shards
from conan_engine.errors import UserError


@pytest.mark.parametrize("bad", [-1, 1000, 2**40])
def test_ids_outside_the_vocabulary_are_refused_and_leave_no_trace(tmp_path, bad):
    with ShardWriter(tmp_path, kind="text", tokenizer_hash=HASH, vocab_size=1000) as writer:
        writer.add([[7, 999]])
        with pytest.raises(ValueError, match=f"0 to 999.*got {bad}"):
            writer.add([[1], [2, bad]])
        writer.add([[8]])
    assert Shards(tmp_path).gather([0, 1], 0)[0].tolist() == [7, 999, 8]


@pytest.mark.parametrize("fields", [[[1.5]], [[[1]]], [["a"]], [[]] * 65_536])
def test_fields_that_are_no_ids_are_refused(tmp_path, fields):
    with ShardWriter(tmp_path, kind="text", tokenizer_hash=HASH, vocab_size=1000) as writer:
        with pytest.raises(ValueError, match="field"):
            writer.add(fields)
        writer.add([[1]] * 65_535)
    assert Shards(tmp_path).field_counts([0]) == [65_535]


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "poem"},
        {"tokenizer_hash": "5e"},
        {"tokenizer_hash": "x" * 64},
        {"vocab_size": 0},
        {"vocab_size": 2**24 + 1},
    ],
)
def test_bad_arguments_are_value_errors(tmp_path, bad):
    with pytest.raises(ValueError):
        ShardWriter(tmp_path, **{"kind": "text", "tokenizer_hash": HASH, "vocab_size": 10, **bad})


def test_an_exception_leaves_no_manifest_and_a_second_attempt_works(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with ShardWriter(tmp_path, kind="text", tokenizer_hash=HASH, vocab_size=10, shard_bytes=1) as writer:
            writer.add([[1]])
            writer.add([[2]])
            raise ZeroDivisionError
    with pytest.raises(UserError, match="manifest.json: is missing"):
        Shards(tmp_path)
    write(tmp_path, [([[3]], 0, 0)], 10)
    assert Shards(tmp_path).gather([0], 0)[0].tolist() == [3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "shard-00000.tokens"]


WRITE_IN_ANOTHER_PROCESS = """
import os, resource, signal, sys
from conan_engine.data.shard_writer import ShardWriter
from conan_engine.command import run
def main():
    with ShardWriter(sys.argv[1], kind="text", tokenizer_hash="5e" * 32, vocab_size=10, shard_bytes=50_000) as writer:
        for i in range(100_000):
            writer.add([[i % 10] * 20])
            if i == 5000:
                {at_5000}
run(main)
"""


def test_a_killed_writer_leaves_no_manifest(tmp_path):
    code = WRITE_IN_ANOTHER_PROCESS.format(at_5000="os.kill(os.getpid(), signal.SIGKILL)")
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == -signal.SIGKILL
    assert len(shard_files(tmp_path)) > 1
    with pytest.raises(UserError, match="manifest.json: is missing"):
        Shards(tmp_path)


def test_a_disk_that_takes_no_more_is_one_line(tmp_path):
    code = WRITE_IN_ANOTHER_PROCESS.format(at_5000="resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))")
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot write it" in done.stderr
    assert not (tmp_path / "manifest.json").exists()


def test_no_records_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no records"):
        write(tmp_path, [], 10)


def test_finished_shards_are_not_written_over(tmp_path):
    write(tmp_path, [([[1]], 0, 0)], 10)
    with pytest.raises(UserError, match="already holds"):
        write(tmp_path, [([[2]], 0, 0)], 10)
    assert Shards(tmp_path).gather([0], 0)[0].tolist() == [1]
