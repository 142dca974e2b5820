"""The table and its numbers, and that what is held out was never trained on."""

import json
import subprocess
import sys

import numpy as np
import pytest

from conan_engine import evaluate
from conan_engine.data.sources import catalogues, installed
from conan_engine.data.sources.docstrings import Docstring
from conan_engine.evaluation import scores, tasks
from conan_engine.evaluation.encoder import truncate


def test_truncation_keeps_the_first_numbers_at_unit_length():
    vectors = np.array([[3.0, 4.0, 12.0], [0.0, 0.0, 1.0]]) / [[13.0], [1.0]]
    np.testing.assert_allclose(truncate(vectors, 2), [[0.6, 0.8], [0.0, 0.0]])  # no direction is left of the second


def test_no_held_out_text_is_trained_on(monkeypatch):
    messages = list(catalogues.read(("sphinx",)))
    kept, held = ({m.english for m in messages if catalogues.held_out(m.english) is out} for out in (False, True))
    assert 0.15 < len(held) / (len(held) + len(kept)) < 0.25 and not held & kept
    assert not set(installed.TRAINING_PACKAGES + installed.MORE_PACKAGES) & set(installed.HELD_OUT_PACKAGES)
    monkeypatch.setattr(installed.catalogues, "read", lambda packages: messages)
    monkeypatch.setattr(installed, "_messages", installed._messages.__wrapped__)
    trained, validated = ({m.english for m in installed.messages(validation)} for validation in (False, True))
    assert trained | validated == kept and not trained & validated and 0 < len(validated) < 0.06 * len(kept)


def test_no_text_kept_for_validation_is_trained_on(monkeypatch):
    more = "Further down it says at some length what it is about, which is {0}."
    docs = [
        Docstring(
            "p",
            "p.m",
            f"p.m.f{i}",
            "f.py",
            i,
            f"Summary {i - i % 3}.",
            f"Text {i // 2}.\n\n{more.format(i // 2)}",
            f"def f{i}():\n" + "    pass\n" * 20,
        )
        for i in range(6000)
    ]
    docs += [doc._replace(rest="", code=doc.code.replace("def ", "def g")) for doc in docs[::4]]
    monkeypatch.setattr(installed.docstrings, "read", lambda packages: docs)
    monkeypatch.setattr(installed, "_docs", installed._docs.__wrapped__)
    trained, validated = installed.docs(), installed.docs(validation=True)
    assert (
        len({doc.summary for doc in trained + validated}) == len(trained + validated) == 2000
        and 10 < len(validated) < 80
    )
    assert not {doc.rest for doc in trained} & {doc.rest for doc in validated}
    for kind in ("text", "instruction"):
        here, there = (
            {json.dumps(record) for record in installed.READERS[name, kind]()}
            for name in ("docstrings", "docstrings.validation")
        )
        assert here and there and not here & there
    for name in ("docstrings.names", "docstrings.sections", "docstrings.code"):
        used = {text for record in installed.READERS[name, "pairs"]() for text in (record["query"], *record["pos"])}
        assert (
            len(used) > 3000
            and not {doc.summary for doc in validated} & used
            and not any(doc.rest in text or text in doc.rest for doc in validated for text in used)
        )


@pytest.fixture
def few(monkeypatch):
    """Some docstrings and one package of messages, so that a test does not wait for all of them."""
    about = ["Shortest path between two nodes", "Roots of a polynomial", "Edges of a graph", "Area of a triangle"]
    docs = [
        Docstring(
            "p",
            f"p.{part}.m",
            f"p.{part}.m.f{i}",
            "f.py",
            i,
            f"{text} {i} of {part}.",
            f"It computes the {text.lower()}, number {i} of {part}.",
        )
        for part, text in zip("abcd", about)
        for i in range(tasks.SMALLEST)
    ]
    docs += [
        docs[0]._replace(rest="Another function with the same summary."),
        docs[1]._replace(summary="No more.", rest=""),
    ]
    messages = list(catalogues.read(("sphinx",)))
    monkeypatch.setattr(tasks.docstrings, "read", lambda packages: docs)
    monkeypatch.setattr(installed, "docs", lambda: docs)
    monkeypatch.setattr(tasks.catalogues, "read", lambda packages: messages)


def test_results_hold_every_number_and_the_table_shows_them(few, untrained_run, monkeypatch, capsys, tmp_path):
    beside = tmp_path / "other.json"
    beside.write_text(json.dumps({"name": "static bag", "docs.ndcg@10": 0.4321, "dims.8.ndcg@10": 0.1234}))
    monkeypatch.setattr(sys, "argv", ["evaluate", str(untrained_run), "--beside", str(beside)])
    evaluate.main()
    results = json.loads((untrained_run / "results.json").read_text())
    assert results["docs.queries"] == 4 * tasks.SMALLEST and results["docs.bm25.ndcg@10"] > 0.5
    assert (
        results["seconds.total"] == results["seconds.train"] + results["seconds.evaluate"]
        and results["seconds.train"] > 0
    )
    assert all(0 <= results[f"cross_lingual.bm25.{language}.recall@20"] <= 1 for language in tasks.LANGUAGES)
    for key in scores.NAMES:
        for dim in ("", "dims.8.", "dims.16.", "dims.32."):
            own = dim + key.removeprefix("docs.") if dim else key
            for found in (own, scores.of("random_projection", own)):
                assert -1 <= results[found] <= 1, found
        assert results[f"dims.32.{key.removeprefix('docs.')}"] == results[key]  # 32 is this model's whole width
    sizes = {
        precision: [results[f"dims.{dim}.{precision}.bytes"] for dim in (8, 16, 32)]
        for precision in ("float32", "float16", "int8", "binary")
    }
    assert sizes == {"float32": [32, 64, 128], "float16": [16, 32, 64], "int8": [8, 16, 32], "binary": [1, 2, 4]}
    assert all(
        0 <= results[f"dims.{dim}.{precision}.ndcg@10"] <= 1
        for dim in (8, 16, 32)
        for precision in ("float16", "int8", "binary")
    )
    lines = {line[:28].strip(): line[28:].split() for line in capsys.readouterr().out.splitlines()}
    shown = [f"{results[key]:.3f}" for key in ("docs.ndcg@10", "docs.bm25.ndcg@10", "docs.random_projection.ndcg@10")]
    assert lines["docs nDCG@10"][:4] == [*shown, "0.432"] and lines["static bag"] == ["0.123"]
    assert lines["random projection"] == [
        f"{results[f'dims.{dim}.random_projection.ndcg@10']:.3f}" for dim in (8, 16, 32)
    ]
    assert set(scores.NAMES.values()) <= set(lines)


@pytest.mark.parametrize("content", [None, "[1]", "{", '{"docs.ndcg@10": "high"}', '{"docs.ndcg@10": null}'])
def test_results_beside_that_cannot_be_read_are_named(untrained_run, tmp_path, content):
    if content:
        (tmp_path / "other.json").write_text(content)
    command = [
        sys.executable,
        "-m",
        "conan_engine.evaluate",
        str(untrained_run),
        "--beside",
        str(tmp_path / "other.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "other.json: cannot read results from it" in done.stderr
    )


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
    done = subprocess.run(
        [sys.executable, "-m", "conan_engine.evaluate", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "no trained run here" in done.stderr
