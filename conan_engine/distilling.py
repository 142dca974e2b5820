"""What a teacher says of mined pools, the targets of supervised.distil: a score of each query's positive and of each candidate, asked once and kept
beside the pools, so that a candidate that comes into use later has its own. Without a teacher they are those that the records bring.

A teacher reads what the model reads: the text of the tokens. One that has vectors is asked for each text once, others for each pair.
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from conan_engine.blocks import Blocks, put
from conan_engine.data import field_scores, teachers
from conan_engine.errors import UserError
from conan_engine.mining import QUERIES, TEXTS

SETTING = "supervised.teacher"
PAIRS = 64  # queries a block, of a teacher that is asked for pairs
AT_ONCE = 1024  # texts


def path_of(folder, shards, teacher):
    """Of the targets, in the folder of the pools."""
    facts = teacher or f"their own {shards.fingerprint}"
    return Path(folder, f"targets-{hashlib.blake2b(facts.encode(), digest_size=6).hexdigest()}.npy")


class Targets:
    """Of one source's pools. tokenizer: that the shards are written with; mesh: the ranks, all of which call `make`."""

    def __init__(self, pools, teacher, tokenizer, source, mesh):
        self.pools, self.corpus, self.teacher, self.tokenizer, self.mesh = pools, pools.corpus, teacher, tokenizer, mesh
        self.folder, self.blocks = pools.folder, Blocks(pools.folder, source, mesh)
        self.device = str(mesh.device)

    def make(self):
        """The path of the targets, float32 [Q, 1+P] as .npy: of the positive, then of the pool; NaN where nothing is said. Raises UserError for
        a teacher that is not there, and where nothing can be written."""
        path = path_of(self.folder, self.corpus.shards, self.teacher)
        if path.exists():
            return path
        partial, shape = path.with_suffix(".partial"), (len(self.pools.queries), 1 + self.pools.candidates.shape[1])
        try:
            self.blocks.begin()
            self.blocks.made_once(partial, lambda to: np.lib.format.open_memmap(to, "w+", np.float32, shape))
            size, score = self._scoring(path.stem)
            count = -(-len(self.pools.queries) // size)
            begin, row = np.load(partial, mmap_mode="r").offset, 4 * shape[1]
            for number in self.blocks.todo(path.stem, count, self.mesh, "a teacher's scores"):
                rows = np.arange(number * size, min((number + 1) * size, len(self.pools.queries)))
                put(partial, begin + number * size * row, score(rows).astype(np.float32))
                self.blocks.finished(path.stem, number)
            self.blocks.wait(path.stem, count)
            self.blocks.made_once(path, lambda to: os.rename(partial, to))
        except OSError as error:
            raise UserError(f"{self.folder}: cannot write here ({error.strerror}); make room, then run again: it goes on behind what is finished") from None
        return path

    def _scoring(self, name):
        """(queries a block, what gives the targets of some rows)."""
        if not self.teacher:
            return QUERIES, self._own
        if teachers.has_vectors(SETTING, self.teacher, self.device):
            self._embed(name)
            return QUERIES, self._cosines
        return PAIRS, self._pairs

    def _own(self, rows):
        corpus, records, candidates = self.corpus, self.pools.queries[rows, None], self.pools.candidates[rows]
        scores = field_scores.of(corpus.shards)
        if scores is None:
            return np.full((len(rows), 1 + candidates.shape[1]), np.nan)
        given, end = corpus.given_start[records], corpus.given_start[records + 1]
        first = records + given - corpus.given_start[0]  # of the record's scores
        own = (given <= candidates) & (candidates < end)
        return np.concatenate((scores[first], np.where(own, scores[np.where(own, first + 1 + candidates - given, 0)], np.nan)), axis=1)

    def _pairs(self, rows):
        candidates, records = self.pools.candidates[rows], self.pools.queries[rows]
        several = 1 + candidates.shape[1]
        documents = self._texts(self.corpus.record[candidates], self.corpus.field[candidates]).reshape(candidates.shape)
        documents = np.concatenate((self._texts(records, 1)[:, None], documents), axis=1)
        queries = np.repeat(self._texts(records, 0), several)
        found = [teachers.scores(SETTING, self.teacher, list(queries[at]), list(documents.ravel()[at]), self.device) for at in _parts(len(queries))]
        return np.concatenate(found).reshape(len(rows), several)

    def _embed(self, name):
        """The vectors of all documents that stand in a pool, by the teacher, in a file."""
        corpus, self.place = self.corpus, np.zeros(len(self.corpus), bool)
        for start in range(0, len(self.pools.queries), QUERIES):
            self.place[self.pools.candidates[start : start + QUERIES]] = True
        needed = np.flatnonzero(self.place)
        self.place = self.place.cumsum() - 1  # of a document, among those needed
        path, what, count = self.folder / f"{name}.f16", f"texts-{name}", -(-len(needed) // TEXTS)
        for number in self.blocks.todo(what, count, self.mesh, "a teacher's vectors"):
            block = needed[number * TEXTS : (number + 1) * TEXTS]
            vectors = self._vectors("documents", corpus.record[block], corpus.field[block])
            put(path, 2 * number * TEXTS * vectors.shape[1], vectors.astype(np.float16))
            self.blocks.finished(what, number)
        self.blocks.wait(what, count)
        self.vectors = np.memmap(path, np.float16, "r").reshape(len(needed), -1)

    def _cosines(self, rows):
        records, out = self.pools.queries[rows], np.empty((len(rows), 1 + self.pools.candidates.shape[1]), np.float32)
        queries, positives = self._vectors("queries", records, 0), self._vectors("documents", records, 1)
        out[:, 0] = np.einsum("qd,qd->q", queries, positives)
        for i, row in enumerate(rows):
            out[i, 1:] = self.vectors[self.place[self.pools.candidates[row]]].astype(np.float32) @ queries[i]
        return out

    def _vectors(self, kind, records, fields):
        texts = self._texts(records, fields)
        return np.concatenate([teachers.vectors(SETTING, self.teacher, list(texts[at]), self.device, kind) for at in _parts(len(texts))])

    def _texts(self, records, fields):
        """Of fields of records, as the model reads them: an array of str [n]."""
        tokens, cu_seqlens = self.corpus.shards.gather(np.ravel(records), np.broadcast_to(fields, np.shape(records)).ravel())
        before, behind = len(self.tokenizer.prefix), len(self.tokenizer.suffix)
        bounds = cu_seqlens.tolist()
        return np.array([self.tokenizer.decode(tokens[a + before : b - behind]) for a, b in zip(bounds, bounds[1:])], object)


def _parts(count):
    return [slice(start, start + AT_ONCE) for start in range(0, count, AT_ONCE)]
