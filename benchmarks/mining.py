"""How long does mining hard negatives take over so many documents, how many of the nearest does it find, and what
memory does a rank need?

    python benchmarks/mining.py [--documents 1_000_000] [--queries N] [--index IVF4096,SQfp16] [--search nprobe=8]
        [--only index exact peer]

Synthetic vectors of 256 numbers around centres, of 256 documents each; a query is near the document of its number, its
positive. Three questions:

index: all queries (default: as many as documents) mined with `negatives.index`, in a process of its own. Time of each
    part, and its largest memory of its own, without the pages of the files that it maps; of 2,000 queries, the share of
    the exact 32 nearest that it finds.
exact: `negatives.index = "Flat"`, from the file of vectors slice by slice, beside faiss.knn over all of them in memory:
    4,096 queries, in turn.
peer: sentence-transformers' mine_hard_negatives with faiss, beside ours, exact: 100,000 queries and documents, 32
    negatives, a margin of 5%.

Vectors are made as they are asked for, which is not part of any time. Prints a table; writes mining.json to --out.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import measured
import numpy as np

from conan_engine.config import Negatives
from conan_engine.data.known import find
from conan_engine.negatives import mining
from conan_engine.parallel.mesh import Mesh
from conan_engine.vectors import nearest

DIM, BLOCK, OF_A_CENTRE = 256, 16_384, 256
SAMPLE, NEAREST = 2000, 32


class Vectors:
    """Of documents (field 1) and queries (field 0) by number; what the clock should not count is in `seconds`."""

    def __init__(self, documents):
        self.centres = _unit(
            np.random.default_rng(0).standard_normal((-(-documents // OF_A_CENTRE), DIM), dtype=np.float32)
        )
        self.seconds = 0.0

    def __call__(self, records, fields):
        began = time.perf_counter()
        out = np.empty((len(records), DIM), np.float32)
        for block in np.unique(records // BLOCK):
            here = np.flatnonzero(records // BLOCK == block)
            chance = np.random.default_rng([1, block])
            documents = _unit(
                self.centres[chance.integers(len(self.centres), size=BLOCK)]
                + chance.standard_normal((BLOCK, DIM), dtype=np.float32) * 1.2 / DIM**0.5
            )
            place, asked = records[here] % BLOCK, fields[here] == 0
            out[here] = documents[place]
            if asked.any():
                noise = (
                    np.random.default_rng([2, block]).standard_normal((BLOCK, DIM), dtype=np.float32) * 0.5 / DIM**0.5
                )
                out[here[asked]] = _unit(documents[place[asked]] + noise[place[asked]])
        self.seconds += time.perf_counter() - began
        return out


def _unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _source(documents):
    """As much of Shards as mining asks for: record i has the query i and the document i."""
    numbers = np.arange(documents, dtype=np.int64)
    shards = SimpleNamespace(
        groups=lambda records: numbers[records], field_counts=lambda records: np.full(len(records), 2, np.int32),
        hashes=lambda records, fields: np.asarray(records),
    )  # fmt: skip
    shards = type(
        "Source",
        (),
        {**{key: staticmethod(value) for key, value in vars(shards).items()}, "__len__": lambda self: documents},
    )()
    return shards, find(numbers, -1 - numbers, numbers, np.empty(0, np.int64))


class Timed(mining.Mining):
    """Mining that notes when its parts end."""

    def _embed(self, embed):
        self.times = [time.perf_counter()]
        super()._embed(embed)
        self.times.append(time.perf_counter())

    def _fill(self, search):
        self.times.append(time.perf_counter())
        super()._fill(search)
        self.times.append(time.perf_counter())


def mine(folder, documents, queries, rule, device="cpu"):
    """-> (the pools' file, seconds by part)"""
    shards, known = _source(documents)
    vectors = Vectors(documents)
    job = Timed(mining.Corpus(shards, known), known, np.arange(queries), rule, 0, "synthetic", folder, Mesh(device))
    job.run(vectors)
    texts, index, pools = np.diff(job.times)
    return folder / mining.POOLS, {
        "vectors written": float(texts - vectors.seconds),
        "index": float(index),
        "pools": float(pools),
    }


def index_alone(folder, documents, queries, index, search, device):
    """What the process of its own does; prints a line of JSON."""
    with measured.Memory() as memory:
        _, seconds = mine(
            folder, documents, queries, Negatives(pool=NEAREST, index=index, search=search, max_ratio=9.0), device
        )
    print(json.dumps({"seconds": seconds, "peak_bytes": memory.peak, "before_bytes": memory.before}))


def with_index(folder, documents, queries, index, search, device):
    command = [
        sys.executable,
        __file__,
        "--alone",
        str(folder / "index"),
        "--documents",
        str(documents),
        "--queries",
        str(queries),
        "--index",
        index,
        f"--search={search}",
        "--device",
        device,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    vectors = Vectors(documents)
    rows = np.sort(np.random.default_rng(3).choice(queries, min(SAMPLE, queries), replace=False))
    stored = np.memmap(folder / "all.f16", np.float16, "w+", shape=(documents, DIM))
    for start in range(0, documents, BLOCK):
        numbers = np.arange(start, min(start + BLOCK, documents))
        stored[numbers] = vectors(numbers, np.ones(len(numbers)))
    asked = vectors(rows, np.zeros(len(rows))).astype(np.float16).astype(np.float32)
    _, exact = nearest.exact(stored, Mesh(device).device)(asked, NEAREST + 1)
    found = np.load(folder / "index" / mining.POOLS, mmap_mode="r")[rows]
    # a pool leaves out the positive
    shared = [len(set(mine_) & set(theirs[theirs != row][:NEAREST])) for row, mine_, theirs in zip(rows, found, exact)]
    return {**result, "recall": sum(shared) / (NEAREST * len(rows))}


def exact(folder, documents, rounds=3):
    """Ratios of our time to that of faiss.knn, which has all vectors in memory as float32."""
    import faiss

    stored = np.memmap(folder / "all.f16", np.float16, "r").reshape(documents, DIM)
    in_memory = stored.astype(np.float32)
    asked = Vectors(documents)(np.arange(mining.QUERIES), np.zeros(mining.QUERIES))
    search, seconds = nearest.exact(stored, Mesh("cpu").device), {"ours": [], "faiss.knn": []}
    for _ in range(rounds):
        for name, work in (
            ("ours", lambda: search(asked, 2 * NEAREST)),
            ("faiss.knn", lambda: faiss.knn(asked, in_memory, 2 * NEAREST, faiss.METRIC_INNER_PRODUCT)),
        ):
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    return {"seconds": seconds, "ours_is_times": statistics.median(a / b for a, b in zip(*seconds.values()))}


def peer(folder, count):
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives, pairwise_cos_sim

    vectors = Vectors(count)
    texts = {kind: [f"{kind} {i}" for i in range(count)] for kind in ("query", "document")}
    ready = {kind: vectors(np.arange(count), np.full(count, kind == "document")) for kind in texts}

    class Model:
        """Gives what is ready."""

        device, model_card_data = "cpu", SimpleNamespace(base_model="")
        get_embedding_dimension, similarity_pairwise = lambda self: DIM, staticmethod(pairwise_cos_sim)
        encode_query = encode_document = encode = lambda self, given, **_: ready[given[0].split()[0]][
            [int(text.split()[1]) for text in given]
        ]

    data = Dataset.from_dict(texts)
    began = time.perf_counter()
    mine_hard_negatives(
        data,
        Model(),
        num_negatives=NEAREST,
        range_max=2 * NEAREST,
        relative_margin=0.05,
        use_faiss=True,
        faiss_batch_size=16384,
        output_format="n-tuple",
        verbose=False,
    )
    theirs = time.perf_counter() - began
    _, seconds = mine(folder / "peer", count, count, Negatives(pool=NEAREST))
    ours = sum(seconds.values())
    return {
        "documents": count,
        "seconds": {"ours": ours, "sentence-transformers": theirs},
        "ours_is_times": ours / theirs,
    }


def main():
    parser = measured.Parser(__doc__, quick={"documents": 20_000, "index": "IVF64,SQfp16", "peer": 2000}, device=True)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int)
    parser.add_argument("--index", default="IVF4096,SQfp16")
    parser.add_argument("--search", default="nprobe=8")
    parser.add_argument(
        "--peer", type=int, default=100_000, help="queries and documents of the comparison with sentence-transformers"
    )
    parser.add_argument("--only", nargs="+", choices=("index", "exact", "peer"), default=("index", "exact", "peer"))
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    documents, queries = arguments.documents, arguments.queries or arguments.documents
    if arguments.alone:
        return index_alone(arguments.alone, documents, queries, arguments.index, arguments.search, arguments.device)
    result = {
        "commit": measured.commit(),
        "machine": measured.processor() if arguments.device == "cpu" else measured.machine(arguments.device),
        "cores": os.cpu_count(),
        "documents": documents,
        "queries": queries,
        "index": arguments.index,
        "search": arguments.search,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=arguments.out))
    try:
        if {"index", "exact"} & set(arguments.only):
            result["with index"] = found = with_index(
                folder, documents, queries, arguments.index, arguments.search, arguments.device
            )
            parts = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in found["seconds"].items())
            print(
                f"{queries:,} queries, {documents:,} documents, {arguments.index}, {arguments.search}: "
                f"{sum(found['seconds'].values()):.0f} s ({parts})"
            )
            print(
                f"{found['recall']:.4f} of the {NEAREST} nearest; at most {found['peak_bytes'] / 2**20:.0f} MiB "
                f"of its own, {found['before_bytes'] / 2**20:.0f} of them before",
                flush=True,
            )
        if "exact" in arguments.only:
            result["exact"] = exact(folder, documents)
            print(
                f"exact, {mining.QUERIES:,} queries: {result['exact']['ours_is_times']:.2f} x the time of faiss.knn",
                flush=True,
            )
        if "peer" in arguments.only:
            result["peer"] = peer(folder, arguments.peer)
            print(
                f"{arguments.peer:,} queries and documents: {result['peer']['ours_is_times']:.2f} x the time of "
                f"mine_hard_negatives ({result['peer']['seconds']})"
            )
        (arguments.out / "mining.json").write_text(json.dumps(result, indent=1))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
