"""BM25 by bm25s, the baseline of every search. Text without spaces is indexed by characters and their pairs."""

from __future__ import annotations

import os
import re
import unicodedata

import numpy as np

from conan_engine.evaluation.metrics import ranks

# on import, bm25s tries JAX, which would take three quarters of a GPU's memory
os.environ.setdefault("JAX_PLATFORMS", "cpu")
from collections.abc import Iterator
from typing import Any

import bm25s
from bm25s.stopwords import STOPWORDS_EN

# Chinese, Japanese and Korean, as in Lucene's CJK analyser; and Thai, Lao, Burmese and Khmer
_SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uffdc\U00020000-\U0003ffff"
)
_RUN = re.compile(rf"([{_SPACELESS}]+)|((?:(?![{_SPACELESS}])\w){{2,}})")
_STOP = frozenset(STOPWORDS_EN)


def bm25_scores(queries: list[str], documents: list[str]) -> Iterator[np.ndarray]:
    """The scores [M] that BM25 (bm25s with its defaults) gives all documents, for one query after another; 0 without
    a common word.
    """
    index, of_documents = bm25s.BM25(), [words(text) for text in documents]
    if any(of_documents):  # bm25s cannot index nothing
        index.index(of_documents, show_progress=False)
    vocabulary = index.vocab_dict if any(of_documents) else ()
    for query in queries:
        known = [word for word in words(query) if word in vocabulary]
        yield index.get_scores(known) if known else np.zeros(len(documents))


def bm25_ranks(search: Any) -> np.ndarray:
    """The ranks that BM25 gives the answers of a search."""
    scores = np.stack(list(bm25_scores(search.queries, search.documents)))
    own = scores[np.arange(len(search.answer)), search.answer]
    return np.where(own > 0, ranks(scores, search.answer), len(search.documents))


def words(text: str) -> list[str]:
    """The words of a text, in order, lower case, without English stop words.

    Where there are spaces, words of at least two characters; elsewhere each character, with the marks that belong to
    it, and each pair of neighbours.
    """
    found = []
    for run, word in _RUN.findall(text.lower()):
        if run:
            characters = _characters(run)
            found += characters + [a + b for a, b in zip(characters, characters[1:])]
        elif word not in _STOP:
            found.append(word)
    return found


def _characters(run):
    found = []
    for character in run:
        if found and unicodedata.category(character).startswith("M"):
            found[-1] += character
        else:
            found.append(character)
    return found
