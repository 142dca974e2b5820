"""Mine hard negatives over as many documents as fit on disk.

The embeddings, the index and the pools are files in the run's folder, which all ranks fill block by block and map. The
blocks do not depend on the ranks, so the result does not either, and a stopped run keeps its finished blocks. For each
source:

1. Ranks with different data embed the texts by blocks, every document, then the queries: fp16, the first
  `negatives.dim` numbers.
2. Unless the search is exact, the ranks make an index together (vectors/nearest.py).
3. All ranks search the queries by blocks and write their pools.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from conan_engine.atomic import write_json
from conan_engine.data.known import ranges
from conan_engine.data.shards import order
from conan_engine.errors import UserError
from conan_engine.vectors import nearest
from conan_engine.vectors.blocks import Blocks, put, until

if TYPE_CHECKING:
    from conan_engine.config import Negatives
    from conan_engine.data.known import Known
    from conan_engine.data.shards import Shards


TEXTS = 16_384  # texts per block; 2 * TEXTS * dim bytes are whole pages of the file, which no two machines then share
QUERIES = 4096  # queries per block
POOLS, ABOUT = "candidates.npy", "pools.json"  # ABOUT is written last
KEPT = "targets-*.npy"  # files of distilling.py, which stay


class Corpus:
    """The documents that a source's queries are compared with: each distinct positive and given negative once.

    record, field, group: int64 [D], where each is found, and its group. given: int64 [G], the document of each given
    negative, those of record r at given[given_start[r] : given_start[r + 1]].
    """

    def __init__(self, shards: Shards, known: Known) -> None:
        records = np.arange(len(shards), dtype=np.int64)
        self.shards = shards
        self.group_of_record = shards.groups(records)
        self._groups, first = np.unique(self.group_of_record, return_index=True)
        self._place = np.empty(len(first), np.int64)  # group -> its document
        self._place[np.argsort(first)] = np.arange(len(first))
        first.sort()
        self.positives = len(first)
        count = np.maximum(shards.field_counts(records) - 2, 0).astype(np.int64)
        self.given_start = np.concatenate(([0], np.cumsum(count)))
        rows, fields = ranges(np.full(len(records), 2), 2 + count)
        # a text that is somebody's positive is that document; of the others, each has the place where it comes first
        new = known.negatives < 0
        _, begin, number = np.unique(known.negatives[new], return_index=True, return_inverse=True)
        self.given = np.empty(len(new), np.int64)
        self.given[~new] = self._place[np.searchsorted(self._groups, known.negatives[~new])]
        self.given[new] = len(first) + np.argsort(np.argsort(begin))[number]
        begin = np.flatnonzero(new)[np.sort(begin)]
        self.record = np.concatenate((first, rows[begin]))
        self.field = np.concatenate((np.ones(len(first), np.int64), fields[begin]))
        # a given negative that is nobody's positive is a negative for everyone: the data's author chose it
        self.group = np.concatenate((self.group_of_record[first], np.full(len(begin), -1)))

    def __len__(self):
        return len(self.record)

    def renumbered(self, documents: np.ndarray) -> np.ndarray:
        """Documents as version 0.1 numbered them, which counted a given negative once for each record that gives it,
        as numbers of this corpus.
        """
        given = self.given[np.maximum(documents - self.positives, 0)]
        return np.where(documents < self.positives, documents, given)

    def positive(self, records: np.ndarray) -> np.ndarray:
        """The document that stands for the positive of each record, int64 [n]."""
        return self._place[np.searchsorted(self._groups, self.group_of_record[records])]


def fitted(rule: Negatives, corpus: Corpus) -> Negatives:
    """The rule (a config's Negatives) for a corpus: with few documents, such as classes, a query has at most the
    others.
    """
    others = len(corpus) - 1
    return dataclasses.replace(rule, count=min(rule.count, others), pool=min(rule.pool, others))


class Mining:
    """The mining of one source. folder: of its files; mesh: the ranks, all of which call `run`."""

    def __init__(
        self,
        corpus: Corpus,
        known: Known,
        queries: np.ndarray,
        rule: Negatives,
        seed: int,
        source: str,
        folder: str | Path,
        mesh: Any,
    ) -> None:
        self.corpus = corpus
        self.known = known
        self.queries = queries
        self.rule = rule
        self.seed = seed
        self.source = source
        self.folder, self.blocks, self.mesh = Path(folder), Blocks(folder, source, mesh), mesh
        # vectors of the documents, then of the queries, then of the queries' positives where another document stands
        # for these
        self.vectors = None

    def run(self, embed: Callable | None) -> None:
        """Fill the folder, from where an earlier start stopped.

        embed(records, fields) -> unit vectors float32 [n, E], called by the ranks of one copy of the model together.
        Raises UserError for a query that every document answers, an index that faiss does not know, and a folder that
        cannot be written.
        """
        if (self.folder / ABOUT).exists():
            return
        try:
            self.blocks.begin()
            search = None
            if self.rule.index != "random":
                self._embed(embed)
                rule = nearest.Rule(self.rule.index, self.rule.search, ("negatives.index", "negatives.search"))
                search = nearest.searcher(self.documents, rule, self.folder, self.blocks)
            self._fill(search)
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot write here ({error.strerror}); make room, then run again: what is "
                "finished is kept"
            ) from None

    @property
    def documents(self) -> np.ndarray:
        return self.vectors[: len(self.corpus)]

    def _embed(self, embed):
        corpus, queries = self.corpus, self.queries
        standing = corpus.positive(queries)
        other = corpus.shards.hashes(queries, 1) != corpus.shards.hashes(
            corpus.record[standing], corpus.field[standing]
        )
        record = np.concatenate((corpus.record, queries, queries[other]))
        field = np.repeat((0, 1), (len(queries), other.sum()))
        field = np.concatenate((corpus.field, field))
        # the row of each query's positive
        self.positive = np.where(other, len(corpus) + len(queries) + other.cumsum() - 1, standing)
        path, dim, count = self.folder / "vectors.f16", self.rule.dim, -(-len(record) // TEXTS)
        for number in self.blocks.todo("texts", count, self.mesh.data, "embedding documents"):
            block = slice(number * TEXTS, (number + 1) * TEXTS)
            vectors = embed(record[block], field[block])
            if 0 < dim < vectors.shape[1]:
                vectors = vectors[:, :dim]
                vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
            if self.mesh.tensor.rank == 0:
                put(path, 2 * block.start * vectors.shape[1], vectors.astype(np.float16))
                self.blocks.finished("texts", number)
        self.blocks.wait("texts", count)
        self.vectors = np.memmap(path, np.float16, "r").reshape(len(record), -1)

    def _fill(self, search):
        """Write the pools, by blocks of queries; rank 0 completes them."""
        corpus, rule, blocks = self.corpus, self.rule, -(-len(self.queries) // QUERIES)
        path, hard = self.folder / POOLS, self.folder / "hard.f32"
        number_type = np.int32 if len(corpus) < 2**31 else np.int64
        self.blocks.made_once(
            path, lambda to: np.lib.format.open_memmap(to, "w+", number_type, (len(self.queries), rule.pool))
        )
        begin = np.load(path, mmap_mode="r").offset
        for number in self.blocks.todo("queries", blocks, self.mesh, "mining hard negatives"):
            rows = np.arange(number * QUERIES, min((number + 1) * QUERIES, len(self.queries)))
            if search:
                asked = self.vectors[len(corpus) + rows].astype(np.float32)
                positive = np.einsum("qe,qe->q", asked, self.vectors[self.positive[rows]].astype(np.float32))
                scores, found = search(asked, min(2 * rule.pool, len(corpus)))
                # below the positive also if its cosine is negative
                most = positive - (1 - rule.max_ratio) * np.abs(positive)
                good = (found >= 0) & (scores <= most[:, None])
            else:
                scores = np.empty((len(rows), 0))
                found = np.empty((len(rows), 0), np.int64)
                good = np.empty((len(rows), 0), bool)
            candidates = self._candidates(rows, found, good)
            put(path, begin + rows[0] * rule.pool * np.dtype(number_type).itemsize, candidates.astype(number_type))
            if rule.bounds == "quantile":
                first = np.full((len(rows), rule.count), np.nan, np.float32)
                some = good & (good.cumsum(axis=1) <= rule.count)
                first[np.arange(rule.count) < some.sum(axis=1, keepdims=True)] = scores[some]
                put(hard, rows[0] * rule.count * 4, first)
            self.blocks.finished("queries", number)
        self.blocks.wait("queries", blocks)
        if self.mesh.rank == 0:
            ruled = by_quantile(rule, np.fromfile(hard, np.float32)) if rule.bounds == "quantile" else rule
            write_json(
                self.folder / ABOUT,
                {"source": self.source, "documents": len(corpus), "low": ruled.low, "bound": ruled.bound},
            )
        until((self.folder / ABOUT).exists)

    def _candidates(self, rows, found, good):
        """The pools of some queries, best document first: [n, pool]."""
        corpus, pool, records = self.corpus, self.rule.pool, self.queries[rows]
        out = np.empty((len(rows), pool), np.int64)
        # most queries have one right group, no negatives of their own, and found more than enough
        fine = good & (corpus.group[found] != corpus.group_of_record[records, None])
        simple = (
            ~np.isin(records, self.known.records)
            & (corpus.given_start[records + 1] == corpus.given_start[records])
            & (fine.sum(axis=1) >= pool)
        )
        if simple.any():
            best = np.argsort(~fine[simple], axis=1, kind="stable")[:, :pool]
            out[simple] = np.take_along_axis(found[simple], best, axis=1)
        for i in np.flatnonzero(~simple):
            out[i] = self._filled(int(rows[i]), records[i], found[i, good[i]])
        return out

    def _filled(self, row, record, found):
        corpus, pool = self.corpus, self.rule.pool
        given = corpus.given[corpus.given_start[record] : corpus.given_start[record + 1]]
        right = self.known.of(record, corpus.group_of_record[record])
        best = _without(right, corpus, np.concatenate((given, found)))
        if len(best) < pool:
            spare = order(self.seed, row, len(corpus), np.arange(2 * pool) % len(corpus))
            best = np.concatenate((best, _without(right, corpus, spare)))
        if not len(best):
            raise UserError(
                f"{self.source}: record {record}: no document is a negative for its query, {len(right)} groups "
                "of documents are right for it; add data, or remove queries that every document answers"
            )
        distinct = best[np.sort(np.unique(best, return_index=True)[1])]
        return np.resize(distinct, pool)  # repeats a document only if the corpus has no others


def tidy(folder: str | Path) -> None:
    """Remove everything but the pools and their targets, for every source mined under `folder`, once all ranks are
    finished.
    """
    for about in Path(folder).glob(f"*/{ABOUT}"):
        for path in about.parent.iterdir():
            if path.name not in (ABOUT, POOLS) and not fnmatch.fnmatch(path.name, KEPT):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def by_quantile(rule: Negatives, scores: np.ndarray) -> Negatives:
    """The rule with its bounds as cosines, where they are shares of `scores`, the cosines of the first mined
    negatives; NaN does not count.
    """
    scores = scores[~np.isnan(scores)]
    if rule.bounds == "cosine" or not len(scores):
        return rule
    low, bound = np.quantile(scores, (rule.low, rule.bound)).tolist()
    return dataclasses.replace(rule, bounds="cosine", low=low, bound=bound)


def _without(groups, corpus, documents):
    return documents[~np.isin(corpus.group[documents], groups)]


def key(rule: Negatives, shards: str, weights: str, queries: np.ndarray, seed: int) -> str:
    """A name for what is mined by a rule from shards (their fingerprint) with a model (its digest) for queries."""
    bounds = (rule.count, rule.low, rule.bound) if rule.bounds == "quantile" else ()
    facts = [
        rule.index,
        rule.search,
        rule.dim,
        rule.pool,
        rule.max_ratio,
        *bounds,
        shards,
        weights,
        seed,
        TEXTS,
        QUERIES,
    ]
    return hashlib.blake2b(json.dumps(facts).encode() + queries.tobytes(), digest_size=8).hexdigest()


def digest(model: torch.nn.Module, group: Any) -> str:
    """The digest of a model's weights. group: the ranks that share a copy."""
    mine = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(model.named_parameters()):
        mine.update(name.encode())
        mine.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return bytes(group.gather(torch.tensor(list(mine.digest()), dtype=torch.uint8, device=group.device)).tolist()).hex()
