"""Mine hard negatives over as many documents as fit on disk.

The embeddings, the index and the pools are files in the run's folder, which all ranks fill block by block and map. The
blocks do not depend on the ranks, so the result does not either, and a stopped run keeps its finished blocks. For each
source:

1. Ranks with different data embed the texts by blocks, every document, then the queries: fp16, the first
  `negatives.dim` numbers.
2. Unless the search is exact, rank 0 trains an index on a sample. All ranks add parts of the documents to it, one file
  each; rank 0 merges these, and all map the result. An index without lists to merge is made by rank 0 alone, in memory.
3. All ranks search the queries by blocks and write their pools.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from conan_engine.data.known import ranges
from conan_engine.data.shards import order, write_json
from conan_engine.errors import UserError
from conan_engine.vectors.blocks import Blocks, put, until

if TYPE_CHECKING:
    from conan_engine.config import Negatives
    from conan_engine.data.known import Known
    from conan_engine.data.shards import Shards


TEXTS = 16_384  # texts per block; 2 * TEXTS * dim bytes are whole pages of the file, which no two machines then share
QUERIES = 4096  # queries per block
SLICE = 2**26  # numbers of document vectors in memory as float32 at a time
SAMPLE = 2**18  # an index is trained on at most so many documents
POOLS, ABOUT = "candidates.npy", "pools.json"  # ABOUT is written last
KEPT = "targets-*.npy"  # files of distilling.py, which stay
LISTS = "lists.ivfdata"  # beside the index that they belong to


class Corpus:
    """The documents that a source's queries are compared with: each distinct positive once, and every given
    negative.
    """

    def __init__(self, shards: Shards, known: Known) -> None:
        records = np.arange(len(shards), dtype=np.int64)
        self.shards = shards
        self.group_of_record = shards.groups(records)
        self._groups, first = np.unique(self.group_of_record, return_index=True)
        self._place = np.empty(len(first), np.int64)  # group -> its document
        self._place[np.argsort(first)] = np.arange(len(first))
        first.sort()
        given = np.maximum(shards.field_counts(records) - 2, 0).astype(np.int64)
        # where the given negatives of a record are in the corpus
        self.given_start = len(first) + np.concatenate(([0], np.cumsum(given)))
        rows, fields = ranges(np.full(len(records), 2), 2 + given)
        self.record = np.concatenate((first, rows))
        self.field = np.concatenate((np.ones(len(first), np.int64), fields))
        # a given negative that is nobody's positive is a negative for everyone: the data's author chose it
        self.group = np.concatenate((self.group_of_record[first], known.negatives))

    def __len__(self):
        return len(self.record)

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
                search = _exact(self.documents, self.mesh.device) if self.rule.index == "Flat" else self._indexed()
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

    def _indexed(self):
        """Search by the index that negatives.index names: one file, which all ranks map."""
        import faiss

        path, trained = self.folder / "index.faiss", self.folder / "trained.faiss"
        self.blocks.made_once(trained, lambda to: faiss.write_index(_trained(faiss, self.rule, self.documents), to))
        if not path.exists():
            index = faiss.read_index(str(trained))
            if _lists(faiss, index):
                self._parts(faiss, index)
            fill = _merged if _lists(faiss, index) else _filled_whole
            self.blocks.made_once(
                path, lambda to: faiss.write_index(fill(faiss, index, self.documents, self.folder), to)
            )
            if self.mesh.rank == 0:
                for part in self.folder.glob("part-*.faiss"):
                    part.unlink()
        return _ready(faiss, _mapped(faiss, path), self.rule, self.mesh).search

    def _parts(self, faiss, index):
        """Add this rank's parts of the documents, each to its own copy of the trained index."""
        size = max(1, SLICE // self.documents.shape[1])
        count = -(-len(self.documents) // size)
        for number in self.blocks.todo("parts", count, self.mesh, "indexing documents"):
            index.reset()
            for start, part in _slices(self.documents[number * size : (number + 1) * size], SLICE // 16):
                index.add_with_ids(_single(part), np.arange(number * size + start, number * size + start + len(part)))
            faiss.write_index(index, str(self.folder / f"part-{number:06d}.faiss"))
            self.blocks.finished("parts", number)
        index.reset()
        self.blocks.wait("parts", count)

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
        given = np.arange(corpus.given_start[record], corpus.given_start[record + 1])
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


def _exact(documents, device):
    """Exact search of the nearest documents, slice by slice, without an index.

    On a GPU it uses torch, which is there whether or not faiss has a build for this CUDA.
    """
    nearest = functools.partial(_nearest_by_torch, device) if device.type == "cuda" else _nearest_by_faiss

    def search(asked, count):
        scores, found = np.full((len(asked), count), -np.inf, np.float32), np.full((len(asked), count), -1)
        for start, part in _slices(documents):
            near, at = nearest(asked, part, min(count, len(part)))
            scores, found = np.concatenate((scores, near), axis=1), np.concatenate((found, start + at), axis=1)
            best = np.argsort(-scores, axis=1, kind="stable")[:, :count]  # among equals, the first in the corpus
            scores, found = np.take_along_axis(scores, best, axis=1), np.take_along_axis(found, best, axis=1)
        return scores, found

    return search


def _nearest_by_faiss(asked, part, count):
    """The largest products of each of asked [n, E] with part [m, E]: float32 [n, count], and their rows in `part`."""
    import faiss

    return faiss.knn(asked, _single(part), count, faiss.METRIC_INNER_PRODUCT)


def _nearest_by_torch(device, asked, part, count):
    """The same on a device; on a GPU with products of float16, summed in float32."""
    dtype, options = (torch.float16, {"out_dtype": torch.float32}) if device.type == "cuda" else (torch.float32, {})
    asked, part = (torch.from_numpy(vectors).to(device, dtype) for vectors in (asked, part))
    return tuple(found.cpu().numpy() for found in torch.mm(asked, part.T, **options).topk(count))


def _trained(faiss, rule, documents):
    """The index that negatives.index names, trained and empty."""
    try:
        index = faiss.index_factory(documents.shape[1], rule.index, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            count = min(SAMPLE, len(documents))
            index.train(documents[np.arange(count) * len(documents) // count].astype(np.float32))
    except RuntimeError as error:
        raise UserError(
            f"negatives.index: faiss cannot make {rule.index!r} of {len(documents)} vectors of "
            f"{documents.shape[1]} numbers ({_said(error)}); see its index factory"
        ) from None
    return index


def _lists(faiss, index):
    """The inverted lists of an index, as faiss can merge them on disk; None for an index without."""
    if isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    lists = faiss.downcast_InvertedLists(index.invlists) if isinstance(index, faiss.IndexIVF) else None
    return lists if isinstance(lists, faiss.ArrayInvertedLists) and not isinstance(index, faiss.IndexIVFPQR) else None


def _merged(faiss, index, _, folder):
    """The index with the contents of all parts, its lists in a file of their own."""
    from faiss.contrib.ondisk import merge_ondisk

    lists = folder / LISTS
    lists.unlink(missing_ok=True)  # an unfinished one
    merge_ondisk(index, sorted(map(str, folder.glob("part-*.faiss"))), str(lists))
    return index


def _mapped(faiss, path):
    """A written index, of which only what is used is read."""
    if not (path.parent / LISTS).exists():
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    index = faiss.read_index(str(path), faiss.IO_FLAG_SKIP_IVF_DATA)
    lists = faiss.downcast_InvertedLists(faiss.extract_index_ivf(index).invlists)
    lists.filename, lists.read_only = str(path.parent / LISTS), True
    lists.do_mmap()
    return index


def _filled_whole(faiss, index, documents, _):
    for _, part in _slices(documents, SLICE // 16):  # small, since the index itself is large
        index.add(_single(part))
    return index


def _slices(documents, numbers=None):
    """(number of the first one, some documents) until all have come, at most `numbers` numbers at a time (None:
    SLICE).
    """
    count = max(1, (numbers or SLICE) // documents.shape[1])
    for start in range(0, len(documents), count):
        yield start, np.array(documents[start : start + count])  # read from disk once


def _single(vectors):
    return torch.from_numpy(vectors).float().numpy()  # uses all cores


def _ready(faiss, index, rule, mesh):
    """The index as it is searched: on this rank's GPU, or with a single rank split over all GPUs; on the CPU if no
    GPU is there or none supports it.
    """
    space = faiss.ParameterSpace()
    if mesh.device.type == "cuda" and getattr(faiss, "get_num_gpus", int)():
        options = faiss.GpuMultipleClonerOptions()
        options.useFloat16, options.shard = True, mesh.world == 1
        try:
            index = faiss.index_cpu_to_gpus_list(
                index, options, list(range(faiss.get_num_gpus())) if mesh.world == 1 else [mesh.device.index]
            )
            space = faiss.GpuParameterSpace()
        except RuntimeError as error:
            print(f"negatives.index: no GPU takes it ({_said(error)}); searching on the CPU", flush=True)
    if rule.search:
        try:
            space.set_index_parameters(index, rule.search)
        except RuntimeError as error:
            raise UserError(
                f"negatives.search: {rule.search!r} does not fit the index {rule.index!r} ({_said(error)}); "
                'expected parameters such as "nprobe=32"'
            ) from None
    return index


def _said(error):
    return str(error).strip().splitlines()[-1]


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
