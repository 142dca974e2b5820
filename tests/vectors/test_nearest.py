"""The nearest are faiss' own, however many ask; an index on the disk is opened again."""

from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch

from conan_engine.vectors import nearest
from conan_engine.vectors.blocks import Blocks

ONE = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"))


def unit(count, dim=32):
    vectors = np.random.default_rng().standard_normal((count, dim), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def compared(device, asked, documents, count, monkeypatch):
    monkeypatch.setattr(nearest, "SLICE", 128 * 32)
    monkeypatch.setattr(nearest, "FEW", 64 * 32)
    monkeypatch.setattr(nearest, "SCORES", 1000)
    scores, found = nearest.exact(documents, torch.device(device))(asked, count)
    expected, at = faiss.knn(asked, documents.astype(np.float32), count, faiss.METRIC_INNER_PRODUCT)
    assert scores.shape == found.shape == (len(asked), count)
    there = min(count, len(documents))
    np.testing.assert_allclose(scores[:, :there], expected[:, :there], rtol=1e-5, atol=1e-6)
    assert (found[:, :there] == at[:, :there]).mean() > 0.99  # but for near equals
    assert (found[:, there:] == -1).all() and (scores[:, there:] == -np.inf).all()


SIZES = [(1, 300, 20), (9, 300, 20), (300, 301, 1), (3, 1, 1), (4, 7, 10)]


@pytest.mark.parametrize(("queries", "documents", "count"), SIZES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_exact_search_finds_what_faiss_does(queries, documents, count, dtype, monkeypatch):
    compared("cpu", unit(queries), unit(documents).astype(dtype), count, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize(("queries", "documents", "count"), SIZES)
def test_a_gpu_finds_what_faiss_does(queries, documents, count, monkeypatch):
    asked = unit(queries).astype(np.float16).astype(np.float32)
    compared("cuda", asked, unit(documents).astype(np.float16), count, monkeypatch)


@pytest.mark.parametrize("index", ["IVF8,SQfp16", "PCA16,IVF8,Flat", "HNSW16", "SQ8"])
def test_an_index_is_kept_and_opened_again(tmp_path, index, monkeypatch, capfd):
    monkeypatch.setattr(nearest, "SLICE", 100 * 32)
    documents, asked = unit(1000), unit(20)
    rule = nearest.Rule(index, "nprobe=8" * index.count("IVF"))
    blocks = Blocks(tmp_path, "x", ONE)
    blocks.begin()
    first = nearest.searcher(documents, rule, tmp_path, blocks)(asked, 10)
    assert not list(tmp_path.glob("part-*")) and (tmp_path / nearest.LISTS).exists() == ("IVF" in index)
    again = nearest.searcher(np.empty((0, 32)), rule, tmp_path, blocks)(asked, 10)  # what is kept needs no vectors
    assert "resizing" not in capfd.readouterr().out, "faiss prints to stderr"
    for one, two in zip(first, again):
        np.testing.assert_array_equal(one, two)
    exact = nearest.exact(documents, ONE.device)(asked, 10)[1]
    assert np.mean([len({*a} & {*b}) / 10 for a, b in zip(first[1], exact)]) > {"P": 0.15, "H": 0.6}.get(index[0], 0.9)
