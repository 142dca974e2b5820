"""BM25's side of the table, and that what is held out was never trained on."""

import json
import subprocess
import sys

import numpy as np
import pytest

from conan_engine import evaluate
from conan_engine.data.sources import catalogues, installed
from conan_engine.data.sources.docstrings import Docstring
from conan_engine.encoder import truncate
from conan_engine.evaluate import Search, bm25_ranks


def test_truncation_keeps_the_first_numbers_at_unit_length():
    vectors = np.array([[3.0, 4.0, 12.0], [0.0, 0.0, 1.0]]) / [[13.0], [1.0]]
    np.testing.assert_allclose(truncate(vectors, 2), [[0.6, 0.8], [0.0, 0.0]])  # no direction is left of the second


def test_bm25_finds_words_and_nothing_where_none_is_shared():
    documents = ["a graph with weighted edges", "the roots of a polynomial", "matrix of zeros"]
    search = Search(["polynomial roots", "weighted graph", "entirely elsewhere", "été"], documents, np.array([1, 0, 2, 2]))
    assert bm25_ranks(search).tolist() == [1, 1, 3, 3]


def test_no_held_out_text_is_trained_on(monkeypatch):
    messages = list(catalogues.read(("sphinx",)))
    kept, held = ({m.english for m in messages if catalogues.held_out(m.english) is out} for out in (False, True))
    assert 0.15 < len(held) / (len(held) + len(kept)) < 0.25 and not held & kept
    assert not set(installed.TRAINING_PACKAGES) & set(installed.HELD_OUT_PACKAGES)
    monkeypatch.setattr(installed.catalogues, "read", lambda: messages)
    monkeypatch.setattr(installed, "_messages", installed._messages.__wrapped__)
    trained, validated = ({m.english for m in installed.messages(validation)} for validation in (False, True))
    assert trained | validated == kept and not trained & validated and 0 < len(validated) < 0.06 * len(kept)


def test_no_text_kept_for_validation_is_trained_on(monkeypatch):
    docs = [Docstring("p", "p.m", f"p.m.f{i}", "f.py", i, f"Summary {i - i % 3}.", f"Text {i // 2}, which another has too.", f"def f{i}():\n" + "    pass\n" * 20) for i in range(6000)]
    docs += [doc._replace(rest="", code=doc.code.replace("def ", "def g")) for doc in docs[::4]]
    monkeypatch.setattr(installed.docstrings, "read", lambda packages: docs)
    monkeypatch.setattr(installed, "_docs", installed._docs.__wrapped__)
    trained, validated = installed.docs(), installed.docs(validation=True)
    assert len({doc.summary for doc in trained + validated}) == len(trained + validated) == 2000 and 10 < len(validated) < 80
    assert not {doc.rest for doc in trained} & {doc.rest for doc in validated}
    for kind in ("text", "instruction"):
        here, there = ({json.dumps(record) for record in installed.READERS[name, kind]()} for name in ("docstrings", "docstrings.validation"))
        assert here and there and not here & there
    for name in ("docstrings.names", "docstrings.code"):
        used = {text for record in installed.READERS[name, "pairs"]() for text in (record["query"], *record["pos"])}
        assert len(used) > 3000 and not {doc.summary for doc in validated} & used and not any(doc.rest in text for doc in validated for text in used)


@pytest.fixture
def few(monkeypatch):
    """Three docstrings and one package of messages, so that a test does not wait for all of them."""
    docs = [
        Docstring("p", "p.m", "p.m.f", "f.py", 1, "Shortest path between two nodes.", "Dijkstra's algorithm over weighted edges of the path."),
        Docstring("p", "p.m", "p.m.g", "f.py", 9, "Roots of a polynomial.", "Every root of the polynomial, with multiplicity."),
        Docstring("p", "p.m", "p.m.h", "f.py", 20, "Roots of a polynomial.", "Another function with the same summary."),
    ]
    messages = list(catalogues.read(("sphinx",)))
    monkeypatch.setattr(evaluate.docstrings, "read", lambda packages: docs)
    monkeypatch.setattr(evaluate.catalogues, "read", lambda packages: messages)


def test_results_hold_every_number_and_the_table_shows_them(few, untrained_run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", str(untrained_run)])
    evaluate.main()
    results = json.loads((untrained_run / "results.json").read_text())
    assert results["docs.queries"] == 2 and results["docs.bm25.ndcg@10"] == 1.0
    assert {"docs.ndcg@10", "seconds.total", "params", "dims.8.ndcg@10", "dims.32.ndcg@10"} <= set(results)
    for language in evaluate.LANGUAGES:
        assert results[f"cross_lingual.{language}.queries"] > 5
        assert 0 <= results[f"cross_lingual.bm25.{language}.recall@20"] <= 1
        assert 0 <= results[f"cross_lingual.{language}.recall@20"] <= 1
    assert results["dims.32.ndcg@10"] == results["docs.ndcg@10"]  # 32 is this model's whole width
    sizes = {precision: [results[f"dims.{dim}.{precision}.bytes"] for dim in (8, 16, 32)] for precision in ("float32", "float16", "int8", "binary")}
    assert sizes == {"float32": [32, 64, 128], "float16": [16, 32, 64], "int8": [8, 16, 32], "binary": [1, 2, 4]}
    assert all(0 <= results[f"dims.{dim}.{precision}.ndcg@10"] <= 1 for dim in (8, 16, 32) for precision in ("float16", "int8", "binary"))
    shown = capsys.readouterr().out
    assert "docs nDCG@10" in shown and "zh -> en Recall@20" in shown and f"{results['docs.ndcg@10']:.3f}" in shown


def test_fewer_bytes_cost_what_they_lose():
    """Answers that lie beside their queries, and near each other: bits alone cannot tell these."""
    rng = np.random.default_rng()
    pairs = rng.standard_normal((300, 1, 64)) + 0.1 * rng.standard_normal((300, 2, 64))
    documents = pairs.reshape(600, 64).astype(np.float32)
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    results = evaluate.smaller(documents, documents, np.arange(600))
    scores = [results[f"dims.64.{precision}.ndcg@10"] for precision in ("float16", "int8", "binary")]
    assert scores[0] == 1 > scores[2] > 0.6 and scores[1] > 0.95


def test_a_folder_without_a_run(tmp_path):
    done = subprocess.run([sys.executable, "-m", "conan_engine.evaluate", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "no trained run here" in done.stderr
