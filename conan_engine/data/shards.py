"""Token shards, mapped for reading. shard_writer.py writes them; csrc/shards/FORMAT.md has the format."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

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
