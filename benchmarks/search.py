"""How long does a search take, and how much of the exact result does an index find?

    python benchmarks/search.py RUN VECTORS [--indexes IVF4096,SQ8:nprobe=8:nprobe=32 ...] [--out runs/benchmarks]

VECTORS: what encode wrote, or a folder RUN/search-* of search. The queries are those of the documentation that the
evaluation holds out, with the first numbers that the vectors have. Each index is made by a process of its own, in a
temporary folder beside VECTORS: seconds, bytes on the disk and the process's own memory at its peak (what it maps from
the disk does not count); then, for each of its settings, milliseconds a query, one at a time and in batches, and how
many of the exact 10 nearest it finds. Prints a table and writes search.json, a row a setting; the same command again
goes on behind the rows that are there.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measured
import numpy as np

from conan_engine import command
from conan_engine.evaluation import tasks
from conan_engine.evaluation.encoder import Encoder
from conan_engine.parallel.mesh import Group
from conan_engine.vectors import nearest
from conan_engine.vectors.blocks import Blocks
from conan_engine.vectors.stored import Stored

NEAREST, SINGLE, BATCH = 10, 50, 1000  # results; queries one at a time; queries at once


def queries_of(run, dim):
    return Encoder.load(run).encode(tasks.load()["docs.ndcg@10"].queries[:BATCH], dim)


def alone(arguments):
    """What the process of its own does for one index: a line of JSON for each of its settings, with what it found in a
    file."""
    stored, queries = Stored(arguments.vectors, 10**6), np.load(arguments.alone / "queries.npy")
    index, *settings = arguments.indexes[0].split(":")
    with measured.Memory() as memory, tempfile.TemporaryDirectory(dir=Path(arguments.vectors).parent) as folder:
        blocks, began = Blocks(folder, index, Group(arguments.device)), time.perf_counter()
        blocks.begin()
        nearest.searcher(stored, nearest.Rule(index), Path(folder), blocks)
        made = time.perf_counter() - began
        for search in settings or [""]:
            find = nearest.searcher(stored, nearest.Rule(index, search), Path(folder), blocks)
            singles = [seconds_of(find, queries[i : i + 1]) for i in range(min(SINGLE, len(queries)))]
            start = time.perf_counter()
            _, found = find(queries, NEAREST)
            batch = (time.perf_counter() - start) / len(queries)
            np.save(arguments.alone / f"found-{search}.npy", found)
            row = {
                "index": index,
                "search": search,
                "made_s": made,
                "bytes": sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()),
                "peak_bytes": memory.peak,
                "single_ms": 1e3 * float(np.median(singles)),
                "batch_ms": 1e3 * batch,
            }
            print(json.dumps(row), flush=True)


def seconds_of(find, query):
    began = time.perf_counter()
    find(query, NEAREST)
    return time.perf_counter() - began


def main():
    parser = measured.Parser(__doc__, quick={"indexes": ["IVF64,SQ8:nprobe=8"]}, device=True)
    parser.add_argument("run", help="a run folder, such as runs/demo")
    parser.add_argument("vectors", help="of that run")
    parser.add_argument(
        "--indexes",
        nargs="+",
        default=["IVF4096,SQ8:nprobe=8:nprobe=32:nprobe=128", "IVF4096,PQ64:nprobe=32"],
        metavar="INDEX:SEARCH:...",
    )
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        return alone(arguments)
    stored = Stored(arguments.vectors, 10**6)
    about = {
        "commit": measured.commit(),
        "machine": measured.machine(arguments.device),
        "vectors": list(stored.shape),
        "precision": stored.precision,
        "versions": measured.versions("torch", "faiss-cpu", "faiss-gpu-cu12"),
    }
    rows, exact = measured.Rows(arguments.out / "search.json", about), None
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/queries.npy", queries_of(arguments.run, stored.shape[1]))
        for form in ("Flat", *arguments.indexes):
            index, *settings = form.split(":")
            if index == "Flat" or any(rows.find(index=index, search=search) is None for search in settings or [""]):
                options = ["--alone", folder, "--indexes", form, "--device", arguments.device]
                command = [sys.executable, __file__, arguments.run, arguments.vectors, *options]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                for row in (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")):
                    found = np.load(f"{folder}/found-{row['search']}.npy")
                    exact = found if exact is None else exact
                    row["recall"] = float(np.mean([len({*a} & {*b}) / NEAREST for a, b in zip(found, exact)]))
                    if rows.find(index=index, search=row["search"]) is None:
                        rows.add(row)
            for row in (row for row in rows if row["index"] == index):
                print(
                    f"{row['index']:16}{row['search']:12} made in {row['made_s']:6,.0f} s, "
                    f"{row['bytes'] / 1e9:6.2f} GB, memory {row['peak_bytes'] / 1e9:5.2f} GB; "
                    f"a query {row['single_ms']:8,.1f} ms, of {BATCH} "
                    f"{row['batch_ms']:7,.2f} ms; finds {row['recall']:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    command.run(main)
