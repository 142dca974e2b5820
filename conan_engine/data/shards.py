"""Token shards, written once and mapped for reading. The Python side of csrc/; csrc/shards/FORMAT.md has the format."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conan_engine import _loader
from conan_engine.errors import UserError

# The meaning of a record's fields.
FIELDS = {
    "text": ("text",),
    "instruction": ("instruction", "input", "output"),
    "pairs": ("query", "positive", "negative ..."),
    "sts": ("sentence1", "sentence2"),
}
MANIFEST = "manifest.json"
FORMAT_VERSION = 1
NAME = re.compile(r"([\w-]+/)?shard-\d{5}\.tokens")  # a shard's name in a manifest


class Records(NamedTuple):
    """Records to write: R records with F fields and T tokens in all, one after another."""

    tokens: np.ndarray  # int [T]
    field_tokens: np.ndarray  # int [F], tokens of each field
    record_fields: np.ndarray  # int [R], fields of each record
    scores: np.ndarray  # float32 [R]
    groups: np.ndarray  # int64 [R]

    def after(self, records: int) -> Records:
        """All but the first so many records."""
        fields = self.record_fields[:records].sum(dtype=np.int64)
        tokens = self.field_tokens[:fields].sum(dtype=np.int64)
        return Records(
            self.tokens[tokens:],
            self.field_tokens[fields:],
            self.record_fields[records:],
            self.scores[records:],
            self.groups[records:],
        )


class ShardWriter:
    """Writes a folder of shards; `close`, or the end of a `with` block, completes it.

    After an exception the folder stays unfinished: it has no manifest, and Shards refuses it.

    Args:
        directory: created if missing; leftovers of an unfinished writer are deleted.
        kind: a key of FIELDS.
        tokenizer_hash: SHA-256 of the tokenizer's file, in hex.
        vocab_size: 1 to 2^24.
        shard_bytes: the largest size of a file, unless a single record is larger.
        may_be_empty: without records, close writes a manifest without a shard, for `join`; Shards refuses it.

    Raises:
        ValueError: for bad arguments.
        UserError: if the folder is finished already or cannot be written.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        kind: str,
        tokenizer_hash: str,
        vocab_size: int,
        shard_bytes: int = 256 * 2**20,
        may_be_empty: bool = False,
    ) -> None:
        if kind not in FIELDS:
            raise ValueError(f"kind: expected one of {', '.join(FIELDS)}, got {kind!r}")
        self.directory = Path(directory)
        self.kind, self.vocab_size, self.shard_bytes, self.may_be_empty = kind, vocab_size, shard_bytes, may_be_empty
        self._tokenizer = bytes.fromhex(tokenizer_hash)
        if (self.directory / MANIFEST).exists():
            raise UserError(f"{self.directory}: already holds finished shards; delete it or choose another folder")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob("shard-*"):
                leftover.unlink()
        except OSError as error:
            raise UserError(f"{self.directory}: cannot write here: {error.strerror}; choose another folder") from None
        self._finished = []
        self._shard = self._open()

    def add(self, fields: Sequence[Sequence[int]], score: float = float("nan"), group: int = 0) -> None:
        """Append a record.

        Args:
            fields: at most 65,535 sequences of token ids, 0 <= id < vocab_size; lists of int or integer arrays, also
                empty ones.
            score: kept as float32; NaN if there is none.
            group: int64.

        Raises:
            ValueError: for bad arguments.
        """
        arrays = [_ids(field) for field in fields]
        tokens = np.concatenate(arrays) if arrays else np.empty(0, np.int64)
        self.add_records(
            Records(
                tokens,
                np.array([len(array) for array in arrays], np.int64),
                np.array([len(arrays)]),
                np.array([score], np.float32),
                np.array([group]),
            )
        )

    def add_records(self, records: Records) -> None:
        """Append Records, with the limits of `add`. Raises ValueError; the records before the bad one are written."""
        while len(records.groups):
            written = self._shard.add(*records, self.shard_bytes)
            records = records.after(written)
            if len(records.groups):
                self._finish()
                self._shard = self._open()

    def close(self) -> None:
        """Finish the last shard, then write the manifest. Raises UserError if no record was added."""
        if self._shard is None:
            return
        if self._shard.records:
            self._finish()
        elif self.may_be_empty and not self._finished:
            Path(f"{self.directory / _name(0)}.partial").unlink()
        else:
            raise UserError(f"{self.directory}: the source gave no records, nothing was written; check the source")
        self._shard = None
        about = {
            "version": FORMAT_VERSION,
            "kind": self.kind,
            "tokenizer": self._tokenizer.hex(),
            "vocab_size": self.vocab_size,
        }
        _write_manifest(self.directory, about, self._finished)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.close()
        self._shard = None  # this closes the file

    def _open(self):
        return _loader.ShardWriter(
            str(self.directory / _name(len(self._finished))), self.kind, self._tokenizer, self.vocab_size
        )

    def _finish(self):
        bytes_, records, tokens = self._shard.bytes_with(0, 0, 0), self._shard.records, self._shard.tokens
        crc = self._shard.finish()
        self._finished.append(
            {"name": _name(len(self._finished)), "bytes": bytes_, "records": records, "tokens": tokens, "crc32c": crc}
        )


def join(directory: str | Path, parts: list[str], **facts) -> int:
    """Join finished folders within a folder, of one kind and tokenizer, into one data set. Returns its number of
    records.

    parts: their names, in order. facts: added to the manifest, and so to the fingerprint. Without records there is no
    manifest. Raises UserError if it cannot be written.
    """
    directory, shards = Path(directory), []
    for part in parts:
        about = json.loads((directory / part / MANIFEST).read_text(encoding="utf-8"))
        shards += [{**shard, "name": f"{part}/{shard['name']}"} for shard in about["shards"]]
    if shards:
        _write_manifest(
            directory, {key: about[key] for key in ("version", "kind", "tokenizer", "vocab_size")} | facts, shards
        )
    return sum(shard["records"] for shard in shards)


def _write_manifest(directory, about, shards):
    totals = {key: sum(shard[key] for shard in shards) for key in ("records", "tokens")}
    write_json(directory / MANIFEST, {**about, **totals, "shards": shards})


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON beside its place and rename it. The other names of the folder are on disk first. Raises UserError
    if it cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync(path.parent)
        partial.rename(path)
        _sync(path.parent)
    except OSError as error:
        raise UserError(
            f"{partial}: cannot write it: {error.strerror}; make room or choose another folder, then run again"
        ) from None


class Shards:
    """The records of a finished folder, mapped; len() is their number. Any thread may call any method.

    Attributes are kind (a key of FIELDS), vocab_size, tokens (their number), mapped (the C++ object) and fingerprint (a
    hash of all contents, in hex).

    Sizes, headers and footers are checked on opening, a file's index on its first use, each 16 KiB block of tokens on
    its first use.

    Args:
        directory: a finished folder.
        tokenizer_hash: of the tokenizer that will read the ids; None accepts any.

    Raises:
        UserError: for a folder that is damaged, unfinished, of another tokenizer, or changed while in use.
    """

    def __init__(self, directory: str | Path, tokenizer_hash: str | None = None) -> None:
        self.directory = Path(directory)
        manifest = self._manifest()
        if tokenizer_hash is not None and manifest["tokenizer"] != tokenizer_hash.lower():
            raise UserError(
                f"{self.directory}: written with tokenizer {manifest['tokenizer'][:12]}, but the one in use "
                f"is {tokenizer_hash[:12].lower()}; "
                "use that tokenizer, or delete the folder and run again: it is rebuilt from the source"
            )
        self.mapped = _loader.ShardSet([str(self.directory / shard["name"]) for shard in manifest["shards"]])
        self._compare(manifest, self.mapped.describe())
        self.kind, self.vocab_size, self.tokens = manifest["kind"], manifest["vocab_size"], manifest["tokens"]
        facts = json.dumps(manifest, sort_keys=True).encode()  # they include each shard's checksum
        self.fingerprint = hashlib.blake2b(facts, digest_size=16).hexdigest()

    def __len__(self):
        return len(self.mapped)

    def gather(
        self, records: np.ndarray, fields: np.ndarray | int, limit: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of field fields[i] of record records[i], end to end: (tokens int32 [T], cu_seqlens int32
        [n+1]).

        Args:
            records: int64 [n].
            fields: int64 [n], or one int for all.
            limit: cut each field to its first `limit` tokens.

        Raises:
            IndexError: for a record or field that does not exist.
            ValueError: for more than 2^31 - 1 tokens in all.
        """
        return self.mapped.gather(records, np.broadcast_to(fields, np.shape(records)), limit)

    def gather_records(self, records: np.ndarray, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of every field of records int64 [n], end to end; the rest as for `gather`."""
        counts = self.field_counts(records)
        fields = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.gather(np.repeat(records, counts), fields, limit)

    def lengths(self, records: np.ndarray, fields: np.ndarray | int) -> np.ndarray:
        """The tokens of each field, int32 [n]; arguments and errors as for `gather`."""
        return self.mapped.lengths(records, np.broadcast_to(fields, np.shape(records)))

    def hashes(self, records: np.ndarray, fields: np.ndarray | int) -> np.ndarray:
        """A 64-bit hash of each field's tokens, int64 [n]; arguments and errors as for `gather`."""
        return self.mapped.hashes(records, np.broadcast_to(fields, np.shape(records)))

    def field_counts(self, records: np.ndarray) -> np.ndarray:
        """The fields of each record, int32 [n]. records: int64 [n]. Raises IndexError."""
        return self.mapped.field_counts(records)

    def scores(self, records: np.ndarray) -> np.ndarray:
        """The score of each record, float32 [n], NaN if it has none. records: int64 [n]. Raises IndexError."""
        return self.mapped.scores(records)

    def groups(self, records: np.ndarray) -> np.ndarray:
        """The group of each record, int64 [n]. records: int64 [n]. Raises IndexError."""
        return self.mapped.groups(records)

    def _manifest(self):
        """The manifest, its keys and names checked, but its facts not yet compared with the shards."""
        path = self.directory / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if manifest["version"] != FORMAT_VERSION:
                self._rebuild(
                    path, f"is of format version {manifest['version']!r}, this program reads {FORMAT_VERSION}"
                )
            names = [shard["name"] for shard in manifest["shards"]]
            if (
                manifest["kind"] not in FIELDS
                or not isinstance(manifest["tokenizer"], str)
                or names != sorted(set(names))
                or not all(map(NAME.fullmatch, names))
            ):
                raise ValueError
        except FileNotFoundError:
            self._rebuild(path, "is missing, so the shards are unfinished")
        except OSError as error:
            self._rebuild(path, f"cannot be read ({error.strerror})")
        except (ValueError, KeyError, TypeError, RecursionError):
            self._rebuild(path, "is damaged")
        return manifest

    def _compare(self, manifest, shards):
        """Check that the shards say the same as the manifest, and belong to one data set."""
        for listed, shard in zip(manifest["shards"], shards):
            shared = {
                "kind": shard.pop("kind").decode("latin-1"),
                "tokenizer": shard.pop("tokenizer").hex(),
                "vocab_size": shard.pop("vocab_size"),
            }
            if {**shard, "name": listed["name"]} != listed or any(
                manifest.get(key) != value for key, value in shared.items()
            ):
                self._rebuild(self.directory / listed["name"], f"is not the shard that {MANIFEST} describes")
        totals = {key: sum(shard[key] for shard in shards) for key in ("records", "tokens")}
        if not shards or any(manifest.get(key) != value for key, value in totals.items()):
            self._rebuild(self.directory / MANIFEST, "is damaged: its totals are not those of its shards")

    def _rebuild(self, path, what):
        raise UserError(
            f"{path}: {what}; delete {self.directory} and run again: it is rebuilt from the source"
        ) from None


def order(seed: int, epoch: int, count: int, positions: np.ndarray) -> np.ndarray:
    """Where a seeded permutation of [0, count) takes these positions, computed one by one, without an array of
    `count`.

    seed, epoch: any int. count: 1 to 2^62. positions: int64 [n], each in [0, count). Returns int64 [n]. Raises
    IndexError for a position outside, ValueError for such a count.
    """
    return _loader.order(seed % 2**64, epoch % 2**64, count, positions)


def _ids(field):
    """A field's tokens as int64 [n]."""
    array = np.asarray(field)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise ValueError(f"field: expected a flat sequence of int, got {array.dtype} of shape {list(array.shape)}")
    return array.astype(np.int64, copy=False)


def _name(i):
    return f"shard-{i:05d}.tokens"


def _sync(directory):
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
