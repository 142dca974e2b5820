"""The nearest of vectors that need not fit in memory: by an exact search, or by an index of faiss in a folder.

    trained.faiss       the index, trained and empty
    part-000012.faiss   the same with some of the vectors: ranks share the parts out
    index.faiss         the whole index, which every rank maps
    lists.ivfdata       its inverted lists

An index without lists to merge is made by rank 0 alone, in memory. A stopped start keeps its finished parts.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from conan_engine.errors import UserError
from conan_engine.parallel.cpu_linear import product

if TYPE_CHECKING:
    from torch import Tensor

    from conan_engine.vectors.blocks import Blocks

    # search(queries float32 [Q, E], count) -> (inner products float32 [Q, count], rows int64 [Q, count]), best first;
    # row -1 where there are fewer
    Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


SLICE = 2**26  # numbers of vectors in memory as float32 at a time, at most
FEW = 2**22  # the same, where few queries ask: what a processor's caches hold
SCORES = 2**26  # products of queries and documents in memory at a time
SAMPLE = 2**18  # an index is trained on at most so many vectors
INDEX, LISTS = "index.faiss", "lists.ivfdata"


class Rule(NamedTuple):
    """index: a string of faiss' index factory; "Flat" is the exact search, without an index. search: its parameters,
    such as "nprobe=32". named: how messages call these two settings.
    """

    index: str = "Flat"
    search: str = ""
    named: tuple[str, str] = ("--index", "--search")


def searcher(documents: Any, rule: Rule, folder: Path, blocks: Blocks) -> Search:
    """Search `documents`, making the index first if it is not there. All ranks of blocks.mesh call this.

    documents: [N, E] with len, shape, and rows by slice or sorted numbers. Raises UserError for an index or parameters
    that faiss does not know.
    """
    if rule.index == "Flat":
        return exact(documents, blocks.mesh.device)
    import faiss

    path, trained = folder / INDEX, folder / "trained.faiss"
    if not path.exists():
        blocks.made_once(trained, lambda to: _write(faiss, _trained(faiss, rule, documents), to))
        index = faiss.read_index(str(trained))
        merging = _lists(faiss, index) is not None
        if merging:
            _parts(faiss, index, documents, folder, blocks)
        fill = _merged if merging else _filled_whole
        blocks.made_once(path, lambda to: _write(faiss, fill(faiss, index, documents, folder), to))
    if blocks.mesh.rank == 0:
        for part in folder.glob("part-*.faiss"):
            part.unlink()
    return _ready(faiss, _mapped(faiss, path), rule, blocks.mesh).search


def exact(documents: Any, device: torch.device, bar: bool = False) -> Search:
    """Search all of `documents`, slice by slice. On a GPU the products are of float16, summed in float32.

    bar: show one while it searches, if that takes a second.
    """

    def search(asked, count):
        queries = torch.from_numpy(asked).to(device, torch.float16 if device.type == "cuda" else torch.float32)
        scores = torch.empty(len(asked), 0, device=device)
        found = torch.empty(len(asked), 0, dtype=torch.int64, device=device)
        numbers = min(SLICE, max(FEW, len(asked) << 14))
        buffer = torch.empty(numbers // documents.shape[1] or 1, documents.shape[1], dtype=queries.dtype, device=device)
        progress = tqdm(
            desc="searching",
            total=len(documents),
            unit=" texts",
            unit_scale=True,
            leave=False,
            delay=1,
            disable=not bar,
        )
        for start, part in _slices(documents, numbers):
            progress.update(len(part))
            part = buffer[: len(part)].copy_(torch.from_numpy(part))
            near, at = of_part(queries, part, count)
            scores, found = best((scores, near), (found, start + at), count)
        progress.close()
        scores, found = scores.cpu().numpy(), found.cpu().numpy()
        missing = ((0, 0), (0, count - scores.shape[1]))
        return np.pad(scores, missing, constant_values=-np.inf), np.pad(found, missing, constant_values=-1)

    return search


def of_part(asked: Tensor, part: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest products of each of asked [n, E] with part [m, E], at most `count`: float32 [n, k], and their rows in
    `part`, int64 [n, k].
    """

    def products(rows):
        if rows.dtype == torch.float16:
            return torch.mm(rows, part.T, out_dtype=torch.float32)
        return rows @ part.T if rows.is_cuda else product(rows, part)

    count = min(count, len(part))
    found = [products(rows).topk(count) for rows in asked.split(max(1, SCORES // len(part)))]
    scores, rows = zip(*found)
    return torch.cat(scores), torch.cat(rows)


def best(scores: Sequence[Tensor], found: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The best `count` of several results, (scores [n, k], numbers [n, k]) each; among equals, an earlier result's."""
    ordered, places = torch.cat(tuple(scores), 1).sort(dim=1, descending=True, stable=True)
    return ordered[:, :count], torch.cat(tuple(found), 1).gather(1, places[:, :count])


def _write(faiss, index, path):
    """Write an index. Raises OSError, which faiss' own files notice too late."""
    with open(path, "wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
        file.flush()
        os.fsync(file.fileno())


def _trained(faiss, rule, documents):
    """The index that the rule names, trained and empty."""
    try:
        index = faiss.index_factory(documents.shape[1], rule.index, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            count = min(SAMPLE, len(documents))
            print(f"training {rule.index} on {count:,} vectors ...", flush=True)
            index.train(documents[np.arange(count) * len(documents) // count].astype(np.float32, copy=False))
    except RuntimeError as error:
        raise UserError(
            f"{rule.named[0]}: faiss cannot make {rule.index!r} of {len(documents)} vectors of "
            f"{documents.shape[1]} numbers ({_said(error)}); see its index factory"
        ) from None
    return index


def _lists(faiss, index):
    """The inverted lists of an index, as faiss can merge them on disk; None for an index without."""
    if isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    lists = faiss.downcast_InvertedLists(index.invlists) if isinstance(index, faiss.IndexIVF) else None
    return lists if isinstance(lists, faiss.ArrayInvertedLists) and not isinstance(index, faiss.IndexIVFPQR) else None


def _parts(faiss, index, documents, folder, blocks):
    """Add this rank's parts of the documents, each to its own copy of the trained index."""
    size = max(1, SLICE // documents.shape[1])
    count = -(-len(documents) // size)
    for number in blocks.todo("parts", count, blocks.mesh, "indexing documents"):
        index.reset()
        end = min(len(documents), (number + 1) * size)
        for start, part in _slices(documents, SLICE // 16, number * size, end):
            index.add_with_ids(_single(part), np.arange(start, start + len(part)))
        _write(faiss, index, folder / f"part-{number:06d}.faiss")
        blocks.finished("parts", number)
    index.reset()
    blocks.wait("parts", count)


def _merged(faiss, index, _, folder):
    """The index with the contents of all parts, its lists in a file of their own."""
    from faiss.contrib.ondisk import merge_ondisk

    lists = folder / LISTS
    lists.unlink(missing_ok=True)  # an unfinished one
    with _stdout_to_stderr():  # faiss says how large the file becomes
        merge_ondisk(index, sorted(map(str, folder.glob("part-*.faiss"))), str(lists))
    return index


@contextlib.contextmanager
def _stdout_to_stderr():
    """For what a C library prints, too."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _filled_whole(faiss, index, documents, _):
    for _, part in _slices(documents, SLICE // 16):  # small, since the index itself is large
        index.add(_single(part))
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
            print(f"{rule.named[0]}: no GPU takes it ({_said(error)}); searching on the CPU", flush=True)
    if rule.search:
        try:
            space.set_index_parameters(index, rule.search)
        except RuntimeError as error:
            raise UserError(
                f"{rule.named[1]}: {rule.search!r} does not fit the index {rule.index!r} ({_said(error)}); "
                'expected parameters such as "nprobe=32"'
            ) from None
    return index


def _slices(documents: Any, numbers: int, start: int = 0, end: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first one, some documents) from `start` to `end`, at most `numbers` numbers at a time."""
    count, end = max(1, numbers // documents.shape[1]), len(documents) if end is None else end
    for at in range(start, end, count):
        part = documents[at : min(end, at + count)]
        yield at, np.array(part) if isinstance(part, np.memmap) else part  # read from disk once


def _single(vectors):
    return torch.from_numpy(vectors).float().numpy()  # uses all cores


def _said(error):
    return str(error).strip().splitlines()[-1]
