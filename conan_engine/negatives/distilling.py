"""A teacher's answers, asked once and kept in the run's folder.

Its vectors of texts are the targets of weak.distil. Its scores of each query's positive and of each candidate of the
pool are the targets of supervised.distil, so a candidate that comes into use later has its own score. Without a
teacher, the scores of the records count.

A teacher reads what the model reads: the text of the tokens. Ranks share out the work, block by block; a stopped run
continues behind the finished blocks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conan_engine.data import field_scores, teachers
from conan_engine.errors import UserError
from conan_engine.negatives.mining import QUERIES, TEXTS
from conan_engine.vectors.blocks import Blocks, put

if TYPE_CHECKING:
    from conan_engine.data.shards import Shards
    from conan_engine.negatives.pools import Pools


SCORES, VECTORS = "supervised.teacher", "weak.distil_teacher"  # the settings that name a teacher
PAIRS = 64  # queries per block, for a teacher that scores pairs
AT_ONCE = 1024  # texts per call


def key(*facts) -> str:
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=6).hexdigest()


def parts(count: int) -> list[slice]:
    return [slice(start, start + AT_ONCE) for start in range(0, count, AT_ONCE)]


class Teacher:
    """name: of the teacher; setting: the setting that names it; tokenizer: that of the shards; device: for a model."""

    def __init__(self, name: str, setting: str, tokenizer: Any, device: Any) -> None:
        self.name, self.setting, self.tokenizer, self.device = name, setting, tokenizer, str(device)

    def texts(self, shards: Shards, records: np.ndarray, fields: np.ndarray | int) -> np.ndarray:
        """The texts of fields of records, as the model reads them: an array of str [n]."""
        tokens, cu_seqlens = shards.gather(np.ravel(records), np.broadcast_to(fields, np.shape(records)).ravel())
        before, behind = len(self.tokenizer.prefix), len(self.tokenizer.suffix)
        bounds = cu_seqlens.tolist()
        return np.array(
            [self.tokenizer.decode(tokens[a + before : b - behind]) for a, b in zip(bounds, bounds[1:])], object
        )

    def has_vectors(self) -> bool:
        return teachers.has_vectors(self.setting, self.name, self.device)

    def vectors(self, kind: str, shards: Shards, records: np.ndarray, fields: np.ndarray | int) -> np.ndarray:
        """The vectors of texts, as "queries" or "documents": unit vectors float32 [n, D]."""
        texts = self.texts(shards, records, fields)
        return np.concatenate(
            [teachers.vectors(self.setting, self.name, list(texts[at]), self.device, kind) for at in parts(len(texts))]
        )

    def scores(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """The scores of pairs of texts: float64 [n]."""
        return np.concatenate(
            [
                teachers.scores(self.setting, self.name, list(queries[at]), list(documents[at]), self.device)
                for at in parts(len(queries))
            ]
        )

    def vectors_in(
        self, path: str | Path, blocks: Blocks, shards: Shards, records: np.ndarray, fields: np.ndarray
    ) -> np.ndarray:
        """The vectors of documents, in a file that all ranks fill and map: float16 [n, D]."""
        count, what = -(-len(records) // TEXTS), f"texts-{path.stem}"
        for number in blocks.todo(what, count, blocks.mesh, "a teacher's vectors"):
            block = slice(number * TEXTS, (number + 1) * TEXTS)
            vectors = self.vectors("documents", shards, records[block], fields[block])
            put(path, 2 * block.start * vectors.shape[1], vectors.astype(np.float16))
            blocks.finished(what, number)
        blocks.wait(what, count)
        return np.memmap(path, np.float16, "r").reshape(len(records), -1)


def on_disk(work: Callable) -> np.ndarray:
    """Call work(); an error of the disk becomes a UserError."""
    try:
        return work()
    except OSError as error:
        raise UserError(
            f"{error.filename}: cannot write here ({error.strerror}); make room, then run again: what is finished "
            "is kept"
        ) from None
    finally:
        teachers.forget()


class Texts:
    """A teacher's vectors of some records of a source, int64 [n], sorted. width: the length of a vector, once made."""

    def __init__(
        self, shards: Shards, records: np.ndarray, teacher: str, tokenizer: Any, source: str, mesh: Any
    ) -> None:
        self.shards, self.records, self.source, self.mesh = shards, records, source, mesh
        self.teacher = Teacher(teacher, VECTORS, tokenizer, mesh.device)

    def make(self, folder: str | Path) -> Texts:
        """Write the vectors under `folder`, or use those that are there. Returns self."""
        records = hashlib.blake2b(self.records.tobytes(), digest_size=8).hexdigest()
        folder = Path(folder, key(self.teacher.name, self.shards.fingerprint, records))
        blocks = Blocks(folder, self.source, self.mesh)

        def work():
            blocks.begin()
            return self.teacher.vectors_in(
                folder / "vectors.f16", blocks, self.shards, self.records, np.zeros_like(self.records)
            )

        self.vectors = on_disk(work)
        self.width = self.vectors.shape[1]
        return self

    def of(self, records: np.ndarray) -> np.ndarray:
        """The vectors of records int64 [n]: float32 [n, width]."""
        return self.vectors[np.searchsorted(self.records, records)].astype(np.float32)


class Targets:
    """A teacher's scores of the pools of one source. teacher: its name, or "" for the scores of the records."""

    def __init__(self, pools: Pools, teacher: str, tokenizer: Any, source: str, mesh: Any) -> None:
        self.pools, self.corpus, self.mesh = pools, pools.corpus, mesh
        self.blocks = Blocks(pools.folder, source, mesh)
        self.path = pools.folder / f"targets-{key(teacher or self.corpus.shards.fingerprint)}.npy"
        self.teacher = Teacher(teacher, SCORES, tokenizer, mesh.device) if teacher else None

    def make(self) -> np.ndarray:
        """The scores, float32 [Q, 1+P], mapped: of the positive, then of the pool; NaN where there is none.

        Raises UserError if the teacher cannot be loaded, and if the folder cannot be written.
        """
        if not self.path.exists():
            on_disk(self._fill)
        return np.load(self.path, mmap_mode="r")

    def _fill(self):
        path, what, queries = self.path.with_suffix(".partial"), self.path.stem, self.pools.queries
        shape = len(queries), 1 + self.pools.candidates.shape[1]
        self.blocks.begin()
        self.blocks.made_once(path, lambda to: np.lib.format.open_memmap(to, "w+", np.float32, shape))
        begin, (size, score) = np.load(path, mmap_mode="r").offset, self._scoring()
        count = -(-len(queries) // size)
        for number in self.blocks.todo(what, count, self.mesh, "a teacher's scores"):
            rows = np.arange(number * size, min((number + 1) * size, len(queries)))
            put(path, begin + 4 * rows[0] * shape[1], score(rows).astype(np.float32))
            self.blocks.finished(what, number)
        self.blocks.wait(what, count)
        self.blocks.made_once(self.path, lambda to: os.rename(path, to))

    def _scoring(self):
        """(queries per block, function that gives the targets of some rows). A teacher with vectors reads each text
        once; any other scores each pair.
        """
        if self.teacher is None:
            return QUERIES, self._own
        if not self.teacher.has_vectors():
            return PAIRS, self._pairs
        corpus, in_pool = self.corpus, np.zeros(len(self.corpus), bool)
        for start in range(0, len(self.pools.queries), QUERIES):
            in_pool[self.pools.candidates[start : start + QUERIES]] = True
        self.place = in_pool.cumsum() - 1  # a document's row among those in pools
        path = self.path.with_suffix(".f16")
        self.vectors = self.teacher.vectors_in(
            path, self.blocks, corpus.shards, corpus.record[in_pool], corpus.field[in_pool]
        )
        return QUERIES, self._cosines

    def _own(self, rows):
        corpus, records, candidates = self.corpus, self.pools.queries[rows, None], self.pools.candidates[rows]
        scores = field_scores.of(corpus.shards)
        if scores is None:
            return np.full((len(rows), 1 + candidates.shape[1]), np.nan)
        begin, end = corpus.given_start[records], corpus.given_start[records + 1]
        # the place of a given negative among its record's scores, or 0: the first of equal texts
        place = np.zeros(candidates.shape, np.int64)
        for number in range(int((end - begin).max())):
            given = corpus.given[np.minimum(begin + number, end - 1)]
            place = np.where((place == 0) & (begin + number < end) & (candidates == given), 1 + number, place)
        first = records + begin  # each record before has a score for its positive and its given negatives
        return np.concatenate((scores[first], np.where(place > 0, scores[first + place], np.nan)), axis=1)

    def _pairs(self, rows):
        corpus, candidates, records = self.corpus, self.pools.candidates[rows], self.pools.queries[rows]
        documents = self.teacher.texts(corpus.shards, corpus.record[candidates], corpus.field[candidates]).reshape(
            candidates.shape
        )
        documents = np.concatenate((self.teacher.texts(corpus.shards, records, 1)[:, None], documents), axis=1)
        queries = np.repeat(self.teacher.texts(corpus.shards, records, 0), documents.shape[1])
        return self.teacher.scores(queries, documents.ravel()).reshape(documents.shape)

    def _cosines(self, rows):
        shards, records = self.corpus.shards, self.pools.queries[rows]
        queries = self.teacher.vectors("queries", shards, records, 0)
        positives = self.teacher.vectors("documents", shards, records, 1)
        out = np.empty((len(rows), 1 + self.pools.candidates.shape[1]), np.float32)
        out[:, 0] = np.einsum("qd,qd->q", queries, positives)
        for i, row in enumerate(rows):
            out[i, 1:] = self.vectors[self.place[self.pools.candidates[row]]].astype(np.float32) @ queries[i]
        return out
