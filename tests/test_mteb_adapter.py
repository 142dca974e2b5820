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
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from scipy.stats import spearmanr

from conan_engine.encoder import truncate
from conan_engine.errors import UserError
from conan_engine.evaluate import ndcg, ranks
from conan_engine.mteb_adapter import Model

DIM = 16
TEXTS = [
    inspect.getdoc(member)
    for module in (argparse, inspect, random, shutil, socket, textwrap, unittest)
    for _, member in sorted(inspect.getmembers(module, inspect.isfunction))
    if "\n\n" in (inspect.getdoc(member) or "")
]
BY_DOCUMENT = {document: query for query, document in dict(text.split("\n\n", 1) for text in TEXTS).items()}  # no ties: each once
DOCUMENTS, QUERIES = zip(*BY_DOCUMENT.items())


def metadata(name, kind, score):
    return TaskMetadata(
        name=name, type=kind, main_score=score, description="Docstrings of the standard library.", dataset={"path": "none", "revision": "none"},
        category="t2t", modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"], date=("2022-10-24", "2022-10-24"),
        domains=["Programming"], task_subtypes=[], license="not specified", annotations_creators="derived", dialect=[],
        sample_creation="found", bibtex_citation="", reference=None,
    )  # fmt: skip


class Docstrings(AbsTaskRetrieval):
    metadata = metadata("Docstrings", "Retrieval", "ndcg_at_10")

    def load_data(self, **_):
        rows = [[{"id": f"{kind}{i}", "text": text} for i, text in enumerate(texts)] for kind, texts in (("q", QUERIES), ("d", DOCUMENTS))]
        relevant = {f"q{i}": {f"d{i}": 1} for i in range(len(QUERIES))}
        queries, corpus = (Dataset.from_list(part) for part in rows)
        self.dataset = {"default": {"test": RetrievalSplitData(queries=queries, corpus=corpus, relevant_docs=relevant, top_ranked=None)}}
        self.data_loaded = True


class DocstringSTS(AbsTaskSTS):
    metadata = metadata("DocstringSTS", "STS", "cosine_spearman")
    min_score, max_score = 0, 1

    def load_data(self, **_):
        first, second, score = zip(*PAIRS)
        self.dataset = DatasetDict({"test": Dataset.from_dict({"sentence1": first, "sentence2": second, "score": score})})
        self.data_loaded = True


# A summary beside its own text, the first half of it, or another's text.
PAIRS = [
    (query, (DOCUMENTS[i], DOCUMENTS[i][: len(DOCUMENTS[i]) // 2], DOCUMENTS[i - 1])[i % 3], (1.0, 0.7, 0.0)[i % 3])
    for i, query in enumerate(QUERIES)
]


@pytest.fixture
def model(untrained_run, monkeypatch):
    def refuse(*_):
        raise OSError("these tests work offline")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return Model(untrained_run, dim=DIM)


def score_of(model, task):
    result = mteb.evaluate(model, task, cache=None, show_progress_bar=False, co2_tracker=False)
    return result.task_results[0].scores["test"][0]["main_score"]


def test_retrieval_scores_what_our_own_evaluation_does(model):
    assert len(QUERIES) > 40
    queries, documents = (truncate(model.encoder.encode(texts), DIM) for texts in (QUERIES, DOCUMENTS))
    ours = ndcg(ranks(queries @ documents.T, np.arange(len(QUERIES))))
    assert 0 < ours < 1
    assert score_of(model, Docstrings()) == pytest.approx(ours, abs=1e-4)


def test_sts_is_the_rank_correlation_of_the_cosines(model):
    first, second, score = zip(*PAIRS)
    cosine = (model.encoder.encode(first, DIM) * model.encoder.encode(second, DIM)).sum(axis=1)
    assert score_of(model, DocstringSTS()) == pytest.approx(spearmanr(cosine, score).statistic, abs=1e-4)


def test_mteb_is_told_what_the_model_is(model, untrained_run):
    about = model.mteb_model_meta
    assert isinstance(model, mteb.EncoderProtocol)
    assert (about.name, about.revision, about.embed_dim) == ("conan-engine/untrained", "supervised-00000000", DIM)
    assert about.n_parameters == sum(p.numel() for p in model.encoder.model.parameters())


@pytest.mark.parametrize("dim", [0, 33])
def test_a_dim_that_the_model_lacks(untrained_run, dim):
    with pytest.raises(UserError, match=f"dim is {dim}; this model has 1 to 32"):
        Model(untrained_run, dim=dim)


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(UserError, match="no trained run here"):
        Model(tmp_path)
