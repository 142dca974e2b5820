"""How well a run searches, beside BM25: `python -m conan_engine.evaluate RUN`. Writes RUN/results.json, prints a table.

docs: the summary of a held-out docstring finds its text among all held-out texts. cross_lingual: a held-out message in
a foreign language finds its English original among all English messages.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import NamedTuple

import bm25s
import numpy as np

from conan_engine import __version__, errors
from conan_engine.data.sources import catalogues, docstrings
from conan_engine.data.sources.installed import HELD_OUT_PACKAGES
from conan_engine.encoder import Encoder, truncate
from conan_engine.metrics import ndcg, ranks, recall
from conan_engine.model import Transformer
from conan_engine.quantize import BITS, quantize, ranges_of, restore

SMALLER = [precision for precision in BITS if precision != "float32"]
CATALOGUES = ("django", "wagtail", "sphinx", "plone.app.locales")  # whose messages are searched; held out in all
LANGUAGES = ("de", "es", "fr", "ja", "ko", "ru", "zh")


class Search(NamedTuple):
    """A retrieval task: the document that answers queries[i] is documents[answer[i]]."""

    queries: list
    documents: list
    answer: np.ndarray


def docs_search():
    """Held-out docstrings; of two with one summary or one text only the first is kept."""
    queries, documents = {}, {}
    for doc in docstrings.read(HELD_OUT_PACKAGES):
        if doc.rest and doc.summary not in queries and doc.rest not in documents:
            queries[doc.summary] = documents[doc.rest] = True
    return Search(list(queries), list(documents), np.arange(len(documents)))


def cross_lingual_searches():
    """language -> Search, for LANGUAGES."""
    english, foreign = {}, {language: {} for language in LANGUAGES}
    for message in catalogues.read(CATALOGUES):
        english.setdefault(message.english, len(english))
        if message.language in foreign and catalogues.held_out(message.english):
            foreign[message.language].setdefault(message.foreign, message.english)
    documents = list(english)
    return {
        language: Search(list(pairs), documents, np.array([english[text] for text in pairs.values()]))
        for language, pairs in foreign.items()
    }


def bm25_ranks(search):
    """The ranks that BM25 gives (bm25s with its defaults)."""
    index = bm25s.BM25()
    index.index(bm25s.tokenize(search.documents, show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(search.queries, return_ids=False, show_progress=False)
    known = [[word for word in query if word in index.vocab_dict] for query in tokens]
    scores = np.stack([index.get_scores(query) if query else np.zeros(len(search.documents)) for query in known])
    own = scores[np.arange(len(search.answer)), search.answer]
    return np.where(own > 0, ranks(scores, search.answer), len(search.documents))


def evaluate(encoder):
    """All the numbers of results.json but the seconds."""
    dims = encoder.dims
    results = {"params": sum(p.numel() for p in encoder.model.parameters())}
    docs = docs_search()
    results["docs.queries"] = len(docs.queries)
    results["docs.bm25.ndcg@10"] = ndcg(bm25_ranks(docs))
    fresh = Transformer(encoder.model.config, encoder.tokenizer.vocab_size, encoder.model.precision).init_weights(seed=0)
    untrained = Encoder(fresh, encoder.tokenizer, encoder.max_tokens, dims)
    for key, one, sizes in (("docs.untrained.ndcg@10", untrained, [None]), ("docs.ndcg@10", encoder, [None, *dims])):
        queries, documents = one.encode(docs.queries), one.encode(docs.documents)
        for dim in sizes:
            rank = ranks(truncate(queries, dim) @ truncate(documents, dim).T, docs.answer)
            results[f"dims.{dim}.ndcg@10" if dim else key] = ndcg(rank)
    for dim in dims:
        results |= smaller(truncate(queries, dim), truncate(documents, dim), docs.answer)
    searches = cross_lingual_searches()
    documents = encoder.encode(next(iter(searches.values())).documents)  # the same for all languages
    for language, search in searches.items():
        queries = encoder.encode(search.queries)
        results[f"cross_lingual.{language}.queries"] = len(search.queries)
        results[f"cross_lingual.bm25.{language}.recall@20"] = recall(bm25_ranks(search))
        results[f"cross_lingual.{language}.recall@20"] = recall(ranks(queries @ documents.T, search.answer))
        for dim in dims:
            rank = ranks(truncate(queries, dim) @ truncate(documents, dim).T, search.answer)
            results[f"dims.{dim}.cross_lingual.{language}.recall@20"] = recall(rank)
    return results


def smaller(queries, documents, answer):
    """nDCG@10 of documents, float32 [N, dim], that are kept in each smaller precision, and the bytes of one in every precision; the queries
    stay float32."""
    dim, ranges = documents.shape[1], ranges_of(documents)
    results = {f"dims.{dim}.{precision}.bytes": -(-dim * bits // 8) for precision, bits in BITS.items()}
    for precision in SMALLER:
        kept = restore(quantize(documents, precision, ranges), precision, dim, ranges)
        results[f"dims.{dim}.{precision}.ndcg@10"] = ndcg(ranks(queries @ kept.T, answer))
    return results


def table(results, dims):
    """The results as lines of text."""
    lines = ["", f"{'':28}{'this model':>12}{'BM25':>8}{'untrained':>11}" + "".join(f"{f'dim {d}':>10}" for d in dims)]

    def line(name, key, bm25, by_dim, untrained=None):
        cells = f"{results[key]:12.3f}{results[bm25]:8.3f}" + (f"{results[untrained]:11.3f}" if untrained else " " * 11)
        lines.append(f"{name:28}{cells}" + "".join(f"{results[by_dim.format(d)]:10.3f}" for d in dims))

    line("docs nDCG@10", "docs.ndcg@10", "docs.bm25.ndcg@10", "dims.{}.ndcg@10", "docs.untrained.ndcg@10")
    for precision in SMALLER:
        name = f"  documents {precision}, 1/{BITS['float32'] // BITS[precision]}"
        lines.append(f"{name:59}" + "".join(f"{results[f'dims.{d}.{precision}.ndcg@10']:10.3f}" for d in dims))
    for language in LANGUAGES:
        key = f"cross_lingual.{language}.recall@20"
        line(f"{language} -> en Recall@20", key, f"cross_lingual.bm25.{language}.recall@20", f"dims.{{}}.{key}")
    lines.append(f"\n{results['params'] / 1e6:.1f}M parameters, {results['docs.queries']:,} held-out docs, {results['seconds.total']:.0f} s")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"conan-engine {__version__}")
    parser.add_argument("run", help="a run folder, such as runs/demo")
    run = parser.parse_args().run
    started = time.perf_counter()
    encoder = Encoder.load(run)
    results = evaluate(encoder)
    results["seconds.total"] = time.perf_counter() - started
    path = Path(run, "results.json")
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1))
    os.replace(partial, path)
    print(table(results, encoder.dims))


if __name__ == "__main__":
    errors.run(main)
