"""Evaluate search on queries, of one language or many, in one corpus: nDCG@10, Recall@20 and Recall@100, as in
trec_eval.

The files are BEIR's (arXiv 2104.08663), each also as .gz: queries.jsonl {"_id", "text"}, with our addition
{"language"}; corpus.jsonl {"_id", "text"}, with or without {"title"}, or any other source of such records; judgments
with one line per right document, query-id, corpus-id and score, or TREC's four columns.

Ranks share the units of the corpus, and each finds the nearest of its own; rank 0 compares these, and has BM25.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from conan_engine.data.encoding import join
from conan_engine.data.sources import files
from conan_engine.errors import UserError
from conan_engine.evaluation.bm25 import bm25_scores
from conan_engine.evaluation.metrics import gain
from conan_engine.parallel.mesh import Mesh
from conan_engine.vectors import nearest, windows
from conan_engine.vectors.corpus import Corpus
from conan_engine.vectors.making import Share
from conan_engine.vectors.windows import Task

if TYPE_CHECKING:
    from conan_engine.evaluation.encoder import Encoder


BLOCK = 8192  # documents that are searched at a time
UNIT = 2**40  # more documents than a unit of a corpus has
DEPTH = 100  # documents kept per query
METRICS = ("ndcg@10", "recall@20", "recall@100")


class Query(NamedTuple):
    id: str
    text: str
    language: str  # "none" if the file names no language


def read_queries(path: str | Path) -> list[Query]:
    """Read the Queries of a file. Raises UserError, naming file and line, for a bad record."""
    seen = set()
    return [
        Query(_new(_id(row, path, place), seen, path, place), _text(row, path, place), _language(row))
        for place, row in files.rows(path)
    ]


def read_corpus(corpus: Corpus) -> list[list[tuple[str, str]]]:
    """Read (id, text) of each document, unit by unit of the corpus. Raises as read_queries."""
    seen, units = set(), []
    for pieces in corpus.units():
        reader = corpus.reader(pieces)
        units.append([])
        for found in reader:
            document = corpus.document(found)
            if document.id is None or document.id in seen:
                path, place = reader.where
                _new(_id({"_id": document.id}, path, place), seen, path, place)
            seen.add(document.id)
            units[-1].append((document.id, document.text))
    return units


def _id(row, path, place):
    found = row.get("_id")
    if not isinstance(found, str | int):
        raise UserError(f"{path}: {place}: _id is {found!r}; expected the name of the line, as in BEIR's files")
    return str(found)


def _new(name, seen, path, place):
    if name in seen:
        raise UserError(f"{path}: {place}: _id {name!r} occurs a second time; remove one of the lines, or rename it")
    seen.add(name)
    return name


def _text(row, path, place):
    if not isinstance(row.get("text"), str):
        raise UserError(f"{path}: {place}: text is {row.get('text')!r}; expected a text")
    return row["text"]


def _language(row):
    about = row.get("metadata")
    return str(row.get("language") or (about.get("language") if isinstance(about, dict) else None) or "none")


def read_qrels(path: str | Path) -> dict[str, dict[str, float]]:
    """Read judgments with scores above 0: {query id: {document id: score}}. Raises as read_queries.

    BEIR's three columns or TREC's four, separated by tabs or blanks. A first line whose score is no number is a header.
    """
    found = {}
    for place, row in files.rows(path, ".txt"):
        line = row["text"].strip()
        if not line:
            continue
        cells = line.split("\t") if "\t" in line else line.split()
        try:
            query, *_, document, score = cells
            score = float(score)
            if len(cells) not in (3, 4) or not math.isfinite(score):
                raise ValueError
        except ValueError:
            if place == "line 1" and len(cells) in (3, 4) and not re.match(r"[-+.\d]", cells[-1]):
                continue
            raise UserError(
                f"{path}: {place}: found {line[:80]!r}; expected query-id, corpus-id and a score, or TREC's "
                "query-id, 0, corpus-id and score"
            ) from None
        if score > 0:
            found.setdefault(query.strip(), {})[document.strip()] = int(score) if score == int(score) else score
    if not found:
        raise UserError(
            f"{path}: no document is right for any query; expected lines of query-id, corpus-id and a score above 0"
        )
    return found


def search(vectors: np.ndarray, blocks: Any, device: str | torch.device = "cpu") -> tuple[np.ndarray, np.ndarray]:
    """The DEPTH + 1 nearest documents of each query, best first: (scores float32 [N, n], numbers int64 [N, n]).

    One more than DEPTH, since one may be the query itself. vectors: float32 [N, E]; blocks: (numbers int64 [M], float32
    [M, E]) each, of which one is held at a time.
    """
    queries = torch.from_numpy(vectors).to(device)
    scores = torch.empty(len(queries), 0, device=device)
    found = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    for numbers, documents in blocks:
        numbers, documents = (torch.from_numpy(array).to(device) for array in (numbers, documents))
        fresh, rows = nearest.of_part(queries, documents, DEPTH + 1)
        scores, found = nearest.best((scores, fresh), (found, numbers[rows]), DEPTH + 1)
    return scores.cpu().numpy(), found.cpu().numpy()


def search_corpus(
    encoder: Encoder, vectors: np.ndarray, corpus: Corpus, dim: int, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """`search` of a corpus by all ranks, which share its units; every rank has all results. The number of a document
    is its unit * UNIT + its place in that.
    """
    share, units = Share.here(encoder.device), corpus.units()
    embed, tasks = encoder.windows(dim), [Task(unit, units[unit], 0) for unit in share.mine(len(units))]

    def blocks():
        held = []
        with tqdm(
            desc="embedding documents", unit=" texts", unit_scale=True, leave=False, delay=1, disable=share.rank
        ) as bar:
            for window in windows.read(encoder.reading(corpus), tasks, share.processes):
                embedded = embed(window.tokens, window.cu_seqlens)
                held.append((window.unit * UNIT + window.first + np.arange(len(embedded)), embedded))
                bar.update(len(embedded))
                if sum(len(numbers) for numbers, _ in held) >= BLOCK:
                    yield map(np.concatenate, zip(*held))
                    held = []
        if held:
            yield map(np.concatenate, zip(*held))

    every = mesh.of_all(lambda: search(vectors, blocks(), encoder.device))
    of_scores, of_found = ([torch.from_numpy(part) for part in parts] for parts in zip(*every))
    scores, found = nearest.best(of_scores, of_found, DEPTH + 1)
    return scores.numpy(), found.numpy()


def bm25(queries: Any, documents: Any) -> Any:
    """The DEPTH + 1 best documents of each query by BM25, a list of (id, score) each. queries: texts; documents: (id,
    text) each. A document without a word of the query is not found.
    """
    ids, texts = zip(*documents)
    found = []
    for scores in bm25_scores(queries, list(texts)):
        first = np.argpartition(-scores, min(DEPTH, len(ids) - 1))[: DEPTH + 1]
        found.append(_in_order((ids[i], float(scores[i])) for i in first if scores[i] > 0))
    return found


def _in_order(found):
    """Of (id, score) each, the best first; among equal scores the id that sorts last, as in trec_eval."""
    return sorted(found, key=lambda one: (one[1], one[0]), reverse=True)


def measure(found: Any, right: Any) -> dict[str, float]:
    """{metric: score} of one query. found: (id, score) each, best first; right: {document id: score above 0}.

    Recall counts the right documents. A document gains its score, discounted by log2(1 + rank).
    """
    discount = gain(np.arange(1, 11))
    gains = np.array([right.get(document, 0) for document, _ in found[:10]], float)
    ideal = np.sort(np.array(list(right.values()), float))[::-1][:10]
    hits = np.array([document in right for document, _ in found], bool)
    return dict(
        zip(
            METRICS,
            (
                (gains @ discount[: len(gains)]) / (ideal @ discount[: len(ideal)]),
                hits[:20].sum() / len(right),
                hits[:100].sum() / len(right),
            ),
        )
    )


def by_language(queries: Any, found: Any, qrels: Any) -> dict[str, dict[str, float]]:
    """{"de": {metric: mean}, ...}, and the mean of the languages under "average". Queries without a right document
    do not count.
    """
    each = {}
    for query, documents in zip(queries, found):
        if query.id in qrels:
            each.setdefault(query.language, []).append(measure(documents, qrels[query.id]))
    results = {
        language: {metric: float(np.mean([one[metric] for one in ones])) for metric in METRICS}
        for language, ones in sorted(each.items())
    }
    return results | {
        "average": {metric: float(np.mean([of[metric] for of in results.values()])) for metric in METRICS}
    }


def evaluate(
    encoder: Encoder,
    queries_path: str | Path,
    corpus_path: str | Path,
    qrels_path: str | Path | None = None,
    dim: int | None = None,
    instruction: str = "",
    ignore_identical_ids: bool | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any] | None:
    """Evaluate an Encoder on files, beside BM25, and print a line for each thing that a person should know.

    Returns {"queries": count, "documents": count, "ndcg@10": mean of the languages, ..., "bm25.ndcg@10", "de.ndcg@10",
    "de.bm25.ndcg@10", ...}, and "missing_documents" and "missing_queries" if judgments name some; on other ranks than
    the first None. qrels_path: None means qrels/test.tsv beside the corpus. ignore_identical_ids: whether a query never
    finds the document of its own id (BEIR's rule); None means only if that document is not right for it. mesh: the
    ranks, which all call this. Raises UserError for files that cannot be read or do not belong together.
    """
    mesh = mesh or Mesh()
    qrels_path = qrels_path or Path(corpus_path).parent / "qrels" / "test.tsv"
    qrels, queries = read_qrels(qrels_path), read_queries(queries_path)
    asked = [query for query in queries if query.id in qrels]
    if not asked:
        raise UserError(
            f"{qrels_path}: names none of the {len(queries):,} queries of {queries_path}; do they belong together?"
        )
    corpus = Corpus(str(corpus_path), str(corpus_path))
    with mesh.together():
        if mesh.rank == 0:
            units = read_corpus(corpus)
            known = {name for unit in units for name, _ in unit}
            results = {"queries": len(asked), "documents": len(known)}
            results |= _missing(qrels, {query.id for query in queries}, known, (qrels_path, queries_path, corpus_path))
    vectors = encoder.encode([join(instruction, query.text) for query in asked], dim)
    scores, found = search_corpus(encoder, vectors, corpus, vectors.shape[1], mesh)
    with mesh.together():  # others wait for rank 0, which has more to do
        if mesh.rank:
            return None
        by_model = [
            _in_order((units[number // UNIT][number % UNIT][0], score) for score, number in zip(*one))
            for one in zip(scores.tolist(), found.tolist())
        ]
        by_bm25 = bm25([query.text for query in asked], [document for unit in units for document in unit])
        left_out = _identical(asked, known, qrels, ignore_identical_ids)
        for name, documents in (("", by_model), ("bm25.", by_bm25)):
            documents = [
                [one for one in best if one[0] != query.id or query.id not in left_out][:DEPTH]
                for query, best in zip(asked, documents)
            ]
            for language, measured in by_language(asked, documents, qrels).items():
                prefix = "" if language == "average" else f"{language}."
                results |= {f"{prefix}{name}{metric}": score for metric, score in measured.items()}
        return results


def _missing(qrels, names, known, where):
    """What the judgments name and the files lack, as counts. Raises UserError if no right document is known."""
    qrels_path, queries_path, corpus_path = where
    right = {document for query in qrels.keys() & names for document in qrels[query]}
    if not right & known:
        raise UserError(
            f"{qrels_path}: names none of the {len(known):,} documents of {corpus_path}; do they belong together?"
        )
    counts = {}
    for what, missing, of, path in (
        ("documents", right - known, right, corpus_path),
        ("queries", qrels.keys() - names, qrels.keys(), queries_path),
    ):
        counts[f"missing_{what}"] = len(missing)
        if missing:
            print(
                f"{qrels_path}: {len(missing):,} of the {len(of):,} {what} that it judges are not in {path}, "
                f"such as {min(missing)!r}" + "; they count as not found" * (what == "documents")
            )
    return counts


def _identical(asked, known, qrels, ignore):
    """The queries that must not find the document of their own id."""
    shared = {query.id for query in asked if query.id in known}
    if ignore is not None:
        return shared if ignore else set()
    left_out = {name for name in shared if name not in qrels[name]}
    if left_out:
        print(
            f"{len(left_out):,} queries have the id of a document, such as {min(left_out)!r}: it is left out "
            "for them, as BEIR does; --ignore_identical_ids=false counts it"
        )
    return left_out


def table(results: dict[str, Any]) -> str:
    """The results as text, a line per language."""
    languages = [
        key.removesuffix(METRICS[0]).rstrip(".") for key in results if key.endswith(METRICS[0]) and "bm25" not in key
    ]
    lines = [f"{'':12}" + "".join(f"{metric:>12}{'BM25':>8}" for metric in METRICS)]
    for language in sorted(languages, key=lambda language: (not language, language)):  # the average comes last
        prefix = f"{language}." if language else ""
        lines.append(
            f"{language or 'average':12}"
            + "".join(f"{results[prefix + metric]:12.3f}{results[f'{prefix}bm25.{metric}']:8.3f}" for metric in METRICS)
        )
    return "\n".join(lines)
