"""The tasks that a run is scored on, with text that no stage has seen: networkx and sympy, and held-out messages.

docs: the summary of a docstring searches for its text among all texts. cross_lingual: a message in another language
searches for its English original among all English messages. sts: pairs graded by structure, like those of the
supervised stage. classification: the part of its package that a summary is from.
"""

from __future__ import annotations

import functools
import itertools
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from conan_engine.data.sources import catalogues, docstrings, installed
from conan_engine.errors import UserError
from conan_engine.evaluation import metrics
from conan_engine.evaluation.encoder import truncate

if TYPE_CHECKING:
    from conan_engine.data.sources.catalogues import Message
    from conan_engine.data.sources.docstrings import Docstring


CATALOGUES = ("django", "wagtail", "sphinx", "plone.app.locales")
LANGUAGES = ("de", "es", "fr", "ja", "ko", "ru", "zh")
SHOWN = 16  # texts per class that the classifier is trained on
SMALLEST = 3 * SHOWN  # the smallest class


class Search(NamedTuple):
    """Retrieval: documents[answer[i]] answers queries[i]."""

    queries: list
    documents: list
    answer: np.ndarray
    metric: Callable[[np.ndarray], float]  # of the ranks of the answers

    def texts(self) -> list[str]:
        return self.queries + self.documents

    def score(self, of: Callable) -> float:
        return self.metric(metrics.ranks(of(self.queries) @ of(self.documents).T, self.answer))


class Similarity(NamedTuple):
    """How similar first[i] and second[i] are: the rank correlation of the cosines with the grades."""

    first: list
    second: list
    grades: np.ndarray

    def texts(self) -> list[str]:
        return self.first + self.second

    def score(self, of: Callable) -> float:
        return metrics.spearman((of(self.first) * of(self.second)).sum(axis=1), self.grades)


class Classification(NamedTuple):
    """Accuracy of a logistic regression on the vectors, as in MTEB (arXiv 2210.07316), trained on SHOWN texts per
    class.
    """

    shown: list
    shown_labels: list
    asked: list
    asked_labels: list

    def texts(self) -> list[str]:
        return self.shown + self.asked

    def score(self, of: Callable) -> float:
        from sklearn.linear_model import LogisticRegression

        return float(
            LogisticRegression(max_iter=1000)
            .fit(of(self.shown), self.shown_labels)
            .score(of(self.asked), self.asked_labels)
        )


def load(path: str | Path | None = None) -> dict[str, Any]:
    """{key of results.json: task}, from the installed packages or from a file of `save`. Raises UserError if it
    cannot be read.
    """
    if path:
        return _saved(path)
    docs = held_out_docs()
    messages = list(catalogues.read(CATALOGUES))
    return {
        "docs.ndcg@10": docs_search(docs),
        **{
            f"cross_lingual.{language}.recall@20": search
            for language, search in cross_lingual_searches(messages).items()
        },
        "sts.docs.spearman": _similarity(installed.doc_sts(docs)),
        "sts.messages.spearman": _similarity(
            installed.message_sts([m for m in messages if catalogues.held_out(m.english) and m.language in LANGUAGES])
        ),
        "classification.accuracy": classification(docs),
    }


KINDS = {kind.__name__: kind for kind in (Search, Similarity, Classification)}


def save(given: dict[str, Any], path: str | Path) -> None:
    """Write tasks to a file (xz), for a machine without the packages."""
    content = {
        key: {"kind": type(task).__name__, **{name: _plain(value) for name, value in task._asdict().items()}}
        for key, task in given.items()
    }
    Path(path).write_bytes(lzma.compress(json.dumps(content, ensure_ascii=False).encode()))


def _plain(value):
    return value.tolist() if isinstance(value, np.ndarray) else value.__name__ if callable(value) else value


def _saved(path):
    try:
        content = json.loads(lzma.decompress(Path(path).read_bytes()))
        given = {key: KINDS[fields.pop("kind")](**fields) for key, fields in content.items()}
    except (OSError, lzma.LZMAError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot read its tasks ({error}); make it with benchmarks/gpu/pack.py") from None
    for key, task in given.items():
        if isinstance(task, Search):
            given[key] = task._replace(answer=np.array(task.answer), metric=getattr(metrics, task.metric))
        elif isinstance(task, Similarity):
            given[key] = task._replace(grades=np.array(task.grades))
    return given


def held_out_docs() -> list[Docstring]:
    """The held-out docstrings; of two with the same summary or text, only the first."""
    summaries, texts, kept = set(), set(), []
    for doc in docstrings.read(installed.HELD_OUT_PACKAGES):
        if doc.rest and doc.summary not in summaries and doc.rest not in texts:
            summaries.add(doc.summary)
            texts.add(doc.rest)
            kept.append(doc)
    return kept


def docs_search(docs: list[Docstring]) -> Search:
    return Search([doc.summary for doc in docs], [doc.rest for doc in docs], np.arange(len(docs)), metrics.ndcg)


def cross_lingual_searches(messages: list[Message]) -> dict[str, Search]:
    """{language: Search} for LANGUAGES."""
    english, foreign = {}, {language: {} for language in LANGUAGES}
    for message in messages:
        english.setdefault(message.english, len(english))
        if message.language in foreign and catalogues.held_out(message.english):
            foreign[message.language].setdefault(message.foreign, message.english)
    return {
        language: Search(
            list(pairs), list(english), np.array([english[text] for text in pairs.values()]), metrics.recall
        )
        for language, pairs in foreign.items()
    }


def _similarity(records):
    first, second, grades = zip(*((r["sentence1"], r["sentence2"], r["score"]) for r in records))
    return Similarity(list(first), list(second), np.array(grades))


def classification(docs: list[Docstring]) -> Classification:
    """Which sub-package a summary is from, one level deeper in networkx.algorithms; classes of at least SMALLEST
    summaries.
    """
    classes = {}
    for doc in docs:
        parts = doc.module.split(".")
        classes.setdefault(".".join(parts[: 3 if parts[1:2] == ["algorithms"] else 2]), []).append(doc.summary)
    shown, asked = [], []
    for label, summaries in classes.items():
        if len(summaries) >= SMALLEST:
            chosen = sorted(summaries, key=installed.fraction)
            shown += [(text, label) for text in chosen[:SHOWN]]
            asked += [(text, label) for text in chosen[SHOWN:]]
    return Classification(*map(list, (*zip(*shown), *zip(*asked))))


class Embedded:
    """Vectors of texts, each encoded once and looked up by its text. `encode`: texts -> unit vectors float32
    [len(texts), C].
    """

    def __init__(self, encode: Callable, tasks: dict[str, Any]) -> None:
        texts = dict.fromkeys(itertools.chain.from_iterable(task.texts() for task in tasks.values()))
        self.place = {text: i for i, text in enumerate(texts)}
        self.vectors = encode(list(texts))

    def __call__(self, texts, dim=None):
        return truncate(self.vectors[[self.place[text] for text in texts]], dim)


def measure(embedded: Embedded, tasks: dict[str, Any], dims: Sequence[int]) -> dict[str, float]:
    """{key: score} of {key: task} with whole vectors, and {"dims.<dim>.<key>": score} for each of dims."""
    results = {key: task.score(embedded) for key, task in tasks.items()}
    for dim in dims:
        of = functools.partial(embedded, dim=dim)
        results |= {f"dims.{dim}.{key.removeprefix('docs.')}": task.score(of) for key, task in tasks.items()}
    return results
