"""Score a run, beside BM25 and an untrained random projection.

Without --queries: on the text that the demo holds out (search, cross-lingual
search, STS, classification). Prints a table and writes RUN/results.json.
With --queries and --corpus: on your own data, in the files of BEIR or TREC.
Prints nDCG@10 and Recall, by language, and writes RUN/retrieval-QUERIES.json;
under torchrun, ranks share the corpus.

Examples:
    python -m conan_engine.evaluate runs/demo
    python -m conan_engine.evaluate runs/demo --queries queries.jsonl \\
        --corpus corpus.jsonl --qrels qrels/test.tsv --dim 256
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conan_engine import command
from conan_engine.data.sources import installed
from conan_engine.errors import UserError
from conan_engine.evaluation import retrieval, tasks
from conan_engine.evaluation.baselines import RandomProjection
from conan_engine.evaluation.bm25 import bm25_ranks
from conan_engine.evaluation.encoder import Encoder
from conan_engine.evaluation.metrics import ndcg, ranks
from conan_engine.evaluation.scores import SMALLER, of, table
from conan_engine.parallel.mesh import Mesh
from conan_engine.report import page
from conan_engine.run import checkpoint
from conan_engine.vectors.quantize import BITS, quantize, ranges_of, restore

if TYPE_CHECKING:
    import numpy as np


def evaluate(encoder: Encoder) -> dict[str, float]:
    """All the numbers of results.json except the seconds."""
    dims, given = encoder.dims, tasks.load()
    searches = {key: task for key, task in given.items() if isinstance(task, tasks.Search)}
    results: dict[str, float] = {"params": sum(p.numel() for p in encoder.model.parameters())}
    results |= {f"{key.rpartition('.')[0]}.queries": len(search.queries) for key, search in searches.items()}
    results |= {of("bm25", key): search.metric(bm25_ranks(search)) for key, search in searches.items()}
    projection = RandomProjection(
        encoder.tokenizer, [f"{doc.summary}\n{doc.rest}" for doc in installed.docs()], encoder.model.config.width
    )
    scores = tasks.measure(tasks.Embedded(projection.encode, given), given, dims)
    results |= {of("random_projection", key): score for key, score in scores.items()}
    embedded, docs = tasks.Embedded(encoder.encode, given), given["docs.ndcg@10"]
    results |= tasks.measure(embedded, given, dims)
    for dim in dims:
        results |= smaller(embedded(docs.queries, dim), embedded(docs.documents, dim), docs.answer)
    return results


def smaller(queries: np.ndarray, documents: np.ndarray, answer: list[int]) -> dict[str, Any]:
    """nDCG@10 with documents, float32 [N, dim], in each smaller precision, and the bytes of a document in every
    precision. The queries stay float32.
    """
    dim, ranges = documents.shape[1], ranges_of(documents)
    results = {f"dims.{dim}.{precision}.bytes": -(-dim * bits // 8) for precision, bits in BITS.items()}
    for precision in SMALLER:
        kept = restore(quantize(documents, precision, ranges), precision, dim, ranges)
        results[f"dims.{dim}.{precision}.ndcg@10"] = ndcg(ranks(queries @ kept.T, answer))
    return results


def main() -> None:
    parser = command.Parser("evaluate", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, such as runs/demo, or a checkpoint's")
    parser.add_argument("--beside", metavar="FILE", help="the results.json of another model, for a column of its own")
    own = parser.add_argument_group("your own data")
    own.add_argument("--queries", metavar="FILE", help='JSON Lines of {"_id", "text"}, with or without "language"')
    own.add_argument(
        "--corpus",
        metavar="CORPUS",
        help='records {"_id", "text"}, with or without "title": a file, or any other source',
    )
    own.add_argument(
        "--qrels",
        metavar="FILE",
        help="judgments: BEIR's three columns or TREC's four (default: qrels/test.tsv beside the corpus)",
    )
    own.add_argument(
        "--ignore_identical_ids",
        choices=("true", "false"),
        help="whether a query never finds the document of its own id, as in BEIR (default: true for queries whose own "
        "document is not right for them)",
    )
    own.add_argument("--dim", type=int, metavar="N", help="keep the first N numbers of each vector (default: all)")
    own.add_argument("--instruction", default="", metavar="TEXT", help="put TEXT and a new line before each query")
    arguments = parser.parse_args()
    if any(
        (
            arguments.queries,
            arguments.corpus,
            arguments.qrels,
            arguments.dim is not None,
            arguments.instruction,
            arguments.ignore_identical_ids,
        )
    ):
        return own_search(arguments)
    other = arguments.beside and _read(arguments.beside)
    started = time.perf_counter()
    encoder = Encoder.load(arguments.run)
    results = evaluate(encoder)
    _, state = checkpoint.newest(arguments.run)
    results["seconds.train"] = state.get("seconds", 0.0)
    results["seconds.evaluate"] = time.perf_counter() - started
    results["seconds.total"] = results["seconds.train"] + results["seconds.evaluate"]
    _write(Path(arguments.run, "results.json"), results)
    print(table(results, encoder.dims, other))
    _report(arguments.run, encoder)


def own_search(arguments: argparse.Namespace) -> None:
    """Evaluate on --queries and --corpus, and write the results."""
    if not (arguments.queries and arguments.corpus):
        raise UserError(
            f"--{'corpus' if arguments.queries else 'queries'} is missing; your own data needs both --queries and "
            "--corpus"
        )
    if arguments.beside:
        raise UserError("--beside is for the demo's held-out text; leave it out with --queries")
    mesh, encoder = Mesh(), Encoder.load(arguments.run)
    encoder.checked(arguments.dim)
    ignore = arguments.ignore_identical_ids and arguments.ignore_identical_ids == "true"
    started = time.perf_counter()
    results = retrieval.evaluate(
        encoder,
        arguments.queries,
        arguments.corpus,
        arguments.qrels,
        arguments.dim,
        arguments.instruction,
        ignore,
        mesh,
    )
    mesh.close()
    if results is None:  # rank 0 has them
        return
    results["seconds.evaluate"] = time.perf_counter() - started
    path = Path(arguments.run, f"retrieval-{Path(arguments.queries).name.partition('.')[0]}.json")
    _write(path, results)
    print(
        retrieval.table(results),
        f"\n{results['queries']:,} queries, {results['documents']:,} documents; written to {path}",
        sep="\n",
    )
    _report(arguments.run, encoder)


def _report(run, encoder):
    """Write the run's report again, which shows the results. A checkpoint's folder has none."""
    if Path(run, "metrics.jsonl").exists() and Path(run, "config.json").exists():
        print(f"\nreport: {page.write(run, encoder)}")


def _write(path, results):
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1))
    os.replace(partial, path)


def _read(path):
    """(name, results) of a results.json."""
    try:
        results = json.loads(Path(path).read_text())
        scores = {key: value for key, value in results.items() if isinstance(value, (int, float))}
        if not scores:
            raise ValueError("it holds no scores")
        return str(results.get("name") or Path(path).resolve().parent.name), scores
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: cannot read results from it ({error}); give a results.json that evaluate wrote"
        ) from None


if __name__ == "__main__":
    command.run(main)
