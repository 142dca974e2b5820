"""Write token shards. shards.py maps them for reading; csrc/shards/FORMAT.md has the format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from conan_engine import _loader
from conan_engine.atomic import write_json
from conan_engine.data.shards import FIELDS, FORMAT_VERSION, MANIFEST
from conan_engine.errors import UserError


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


def _ids(field):
    """A field's tokens as int64 [n]."""
    array = np.asarray(field)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise ValueError(f"field: expected a flat sequence of int, got {array.dtype} of shape {list(array.shape)}")
    return array.astype(np.int64, copy=False)


def _name(i):
    return f"shard-{i:05d}.tokens"
