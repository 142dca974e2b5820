"""mteb evaluates a run: on tasks made here, of the standard library's docstrings, with no network."""

import argparse
import inspect
import random
import shutil
import socket
import textwrap
import unittest

import mteb
import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from mteb.abstasks.classification import AbsTaskClassification
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from scipy.stats import spearmanr
from sklearn.neighbors import KNeighborsClassifier

from conan_engine.errors import UserError
from conan_engine.evaluation.encoder import truncate
from conan_engine.evaluation.metrics import ndcg, ranks
from conan_engine.evaluation.mteb_adapter import Model

DIM = 16
TEXTS = [
    inspect.getdoc(member)
    for module in (argparse, inspect, random, shutil, socket, textwrap, unittest)
    for _, member in sorted(inspect.getmembers(module, inspect.isfunction))
    if "\n\n" in (inspect.getdoc(member) or "")
]
# no ties: each once
BY_DOCUMENT = {document: query for query, document in dict(text.split("\n\n", 1) for text in TEXTS).items()}
DOCUMENTS, QUERIES = zip(*BY_DOCUMENT.items())


def metadata(name, kind, score):
    return TaskMetadata(
        name=name, type=kind, main_score=score, description="Docstrings of the standard library.",
        dataset={"path": "none", "revision": "none"},
        category="t2t", modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"],
        date=("2022-10-24", "2022-10-24"),
        domains=["Programming"], task_subtypes=[], license="not specified", annotations_creators="derived", dialect=[],
        sample_creation="found", bibtex_citation="", reference=None,
    )  # fmt: skip


class Docstrings(AbsTaskRetrieval):
    metadata = metadata("Docstrings", "Retrieval", "ndcg_at_10")

    def load_data(self, **_):
        rows = [
            [{"id": f"{kind}{i}", "text": text} for i, text in enumerate(texts)]
            for kind, texts in (("q", QUERIES), ("d", DOCUMENTS))
        ]
        relevant = {f"q{i}": {f"d{i}": 1} for i in range(len(QUERIES))}
        queries, corpus = (Dataset.from_list(part) for part in rows)
        self.dataset = {
            "default": {
                "test": RetrievalSplitData(queries=queries, corpus=corpus, relevant_docs=relevant, top_ranked=None)
            }
        }
        self.data_loaded = True


INSTRUCTION = "Find the text below this summary " * 8  # long: an untrained model takes little notice of a short one


class InstructedDocstrings(Docstrings):
    metadata = Docstrings.metadata.model_copy(update={"name": "InstructedDocstrings", "prompt": {"query": INSTRUCTION}})


class DocstringSTS(AbsTaskSTS):
    metadata = metadata("DocstringSTS", "STS", "cosine_spearman")
    min_score, max_score = 0, 1

    def load_data(self, **_):
        first, second, score = zip(*PAIRS)
        self.dataset = DatasetDict(
            {"test": Dataset.from_dict({"sentence1": first, "sentence2": second, "score": score})}
        )
        self.data_loaded = True


class DocstringKinds(AbsTaskClassification):
    """Is it a summary or the text below one? Told by the nearest of the other half."""

    metadata = metadata("DocstringKinds", "Classification", "accuracy")
    evaluator_model = KNeighborsClassifier(n_neighbors=1)
    samples_per_label, n_experiments = len(TEXTS), 1  # all there are, so that nothing is left to chance

    def load_data(self, **_):
        halves = {split: {"text": HALVES[i], "label": KINDS[i]} for i, split in enumerate(("train", "test"))}
        self.dataset = DatasetDict({split: Dataset.from_dict(columns) for split, columns in halves.items()})
        self.data_loaded = True


HALVES = [QUERIES[i::2] + DOCUMENTS[i::2] for i in range(2)]
KINDS = [[0] * len(QUERIES[i::2]) + [1] * len(DOCUMENTS[i::2]) for i in range(2)]
# A summary beside its own text, the first half of it, or another's text.
PAIRS = [
    (query, (DOCUMENTS[i], DOCUMENTS[i][: len(DOCUMENTS[i]) // 2], DOCUMENTS[i - 1])[i % 3], (1.0, 0.7, 0.0)[i % 3])
    for i, query in enumerate(QUERIES)
]


@pytest.fixture
def model(untrained_run, monkeypatch):
    asked = []

    def refuse(_, address):
        asked.append(address)  # an error alone could be passed over by a library that asks twice
        raise OSError("these tests work offline")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: refuse(None, host))
    yield Model(untrained_run, dim=DIM)
    assert not asked


def score_of(model, task):
    result = mteb.evaluate(model, task, cache=None, show_progress_bar=False, co2_tracker=False)
    return result.task_results[0].scores["test"][0]["main_score"]


def test_retrieval_scores_what_our_own_evaluation_does(model):
    assert len(QUERIES) > 40
    queries, documents = (truncate(model.encoder.encode(texts), DIM) for texts in (QUERIES, DOCUMENTS))
    ours = ndcg(ranks(queries @ documents.T, np.arange(len(QUERIES))))
    assert 0 < ours < 1
    model.instructions = False  # mteb has one for every kind of task
    assert score_of(model, Docstrings()) == pytest.approx(ours, abs=1e-4)


def test_queries_come_behind_their_tasks_instruction_and_documents_do_not(model):
    queries, documents = (
        model.encoder.encode(texts, DIM) for texts in ([f"{INSTRUCTION}\n{query}" for query in QUERIES], DOCUMENTS)
    )
    ours = ndcg(ranks(queries @ documents.T, np.arange(len(QUERIES))))
    assert score_of(model, InstructedDocstrings()) == pytest.approx(ours, abs=1e-4)
    model.instructions = False
    without = score_of(model, InstructedDocstrings())
    assert without == pytest.approx(score_of(model, Docstrings()), abs=1e-6) and abs(without - ours) > 1e-3


def test_sts_is_the_rank_correlation_of_the_cosines(model):
    first, second, score = zip(*PAIRS)
    cosine = (model.encoder.encode(first, DIM) * model.encoder.encode(second, DIM)).sum(axis=1)
    assert score_of(model, DocstringSTS()) == pytest.approx(spearmanr(cosine, score).statistic, abs=1e-4)


def test_classification_is_by_the_cosines_too(model):
    train, test = (model.encoder.encode(half, DIM) for half in HALVES)
    told = np.array(KINDS[0])[(test @ train.T).argmax(axis=1)]
    accuracy = (told == KINDS[1]).mean()
    assert 0.5 < accuracy < 1
    assert score_of(model, DocstringKinds()) == pytest.approx(accuracy, abs=1e-4)


def test_mteb_is_told_what_the_model_is(model, untrained_run):
    about = model.mteb_model_meta
    assert isinstance(model, mteb.EncoderProtocol)
    assert (about.name, about.revision, about.embed_dim) == ("conan-engine/untrained", "supervised-00000000", DIM)
    assert about.n_parameters == sum(p.numel() for p in model.encoder.model.parameters())


@pytest.mark.parametrize("dim", [0, 33])
def test_a_dim_that_the_model_lacks(untrained_run, dim):
    with pytest.raises(UserError, match=f"dim is {dim}; expected 1 to 32"):
        Model(untrained_run, dim=dim)


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(UserError, match="no trained run here"):
        Model(tmp_path)
