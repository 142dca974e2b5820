"""Every task is scored as it says, by every dim, and what it asks is never trained on."""

import numpy as np
import pytest

from conan_engine.data.sources import catalogues, installed
from conan_engine.data.sources.docstrings import Docstring
from conan_engine.errors import UserError
from conan_engine.evaluation import tasks
from conan_engine.evaluation.metrics import ndcg, recall

rng = np.random.default_rng()


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_scores_are_those_of_the_texts_vectors_cut_to_each_dim():
    texts = [f"text {i}" for i in range(60)]
    vectors = unit(rng.standard_normal((60, 16)).astype(np.float32))
    grades, asked = rng.random(20), []
    given = {
        "docs.ndcg@10": tasks.Search(texts[:20], texts[20:40], np.arange(20), ndcg),
        "cross_lingual.de.recall@20": tasks.Search(texts[40:60], texts[10:40], np.arange(20), recall),
        "sts.docs.spearman": tasks.Similarity(texts[:20], texts[40:60], grades),
    }

    def encode(given):
        asked.extend(given)
        return vectors[[texts.index(text) for text in given]]

    results = tasks.measure(tasks.Embedded(encode, given), given, [4, 16])
    assert sorted(asked) == sorted(texts), "each text is encoded once"
    for dim, prefix in ((16, ""), (4, "dims.4."), (16, "dims.16.")):
        cut = unit(vectors[:, :dim])
        rank = ((cut[:20] @ cut[20:40].T) >= (cut[:20] * cut[20:40]).sum(axis=1, keepdims=True) - 1e-6).sum(axis=1)
        key = f"{prefix}ndcg@10" if prefix else "docs.ndcg@10"
        assert results[key] == pytest.approx(np.where(rank <= 10, 1 / np.log2(1 + rank), 0).mean(), abs=1e-6)
        order = lambda values: np.argsort(np.argsort(values))
        cosines = (cut[:20] * cut[40:60]).sum(axis=1)
        assert results[f"{prefix}sts.docs.spearman"] == pytest.approx(
            np.corrcoef(order(cosines), order(grades))[0, 1], abs=1e-6
        )
        assert 0 <= results[f"{prefix}cross_lingual.de.recall@20"] <= 1


def test_classes_are_parts_of_packages_and_what_is_shown_is_not_asked():
    modules = {
        "sympy.geometry.line": 60,
        "networkx.algorithms.flow.maxflow": 50,
        "networkx.algorithms.tree": 20,
        "sympy.core": 48,
    }
    docs = [
        Docstring("p", module, f"{module}.f{i}", "f.py", 1, f"{module} {i}", "Text.")
        for module, count in modules.items()
        for i in range(count)
    ]
    task = tasks.classification(docs)
    assert (
        set(task.shown_labels) == set(task.asked_labels) == {"sympy.geometry", "networkx.algorithms.flow", "sympy.core"}
    )
    assert all(task.shown_labels.count(label) == tasks.SHOWN for label in set(task.shown_labels)) and not set(
        task.shown
    ) & set(task.asked)
    assert len(task.asked) == 44 + 34 + 32
    centres = {label: rng.standard_normal(8) for label in set(task.shown_labels)}
    label = dict(zip(task.shown + task.asked, task.shown_labels + task.asked_labels))
    assert (
        task.score(
            lambda texts: unit(np.stack([centres[label[text]] + 0.1 * rng.standard_normal(8) for text in texts]))
        )
        > 0.95
    )
    assert task.score(lambda texts: unit(rng.standard_normal((len(texts), 8)))) < 0.7


def test_what_is_asked_is_held_out():
    given = tasks.load()
    assert {len(search.queries) > 100 for search in given.values() if isinstance(search, tasks.Search)} == {True}
    for language in tasks.LANGUAGES:
        search = given[f"cross_lingual.{language}.recall@20"]
        assert all(catalogues.held_out(search.documents[i]) for i in search.answer)
    assert not set(installed.TRAINING_PACKAGES + installed.MORE_PACKAGES) & set(installed.HELD_OUT_PACKAGES)
    trained = {text for message in installed.messages() for text in (message.english,)}
    assert not {text for text in given["sts.messages.spearman"].second if catalogues.held_out(text)} & trained
    assert len(set(given["classification.accuracy"].asked_labels)) > 10
    assert set(given["sts.docs.spearman"].grades) == {0, 0.25, 0.5, 1}


def test_saved_tasks_score_as_they_did(tmp_path):
    texts = [f"text {i} \u4e2d" for i in range(60)]
    vectors = unit(rng.standard_normal((60, 16)).astype(np.float32))
    given = {
        "docs.ndcg@10": tasks.Search(texts[:20], texts[20:40], np.arange(20), ndcg),
        "cross_lingual.de.recall@20": tasks.Search(texts[40:60], texts[10:40], np.arange(20), recall),
        "sts.docs.spearman": tasks.Similarity(texts[:20], texts[40:60], rng.random(20)),
        "classification.accuracy": tasks.Classification(texts[:20], ["a", "b"] * 10, texts[20:60], ["b", "a"] * 20),
    }
    tasks.save(given, tmp_path / "tasks.json.xz")
    again = tasks.load(tmp_path / "tasks.json.xz")
    encode = lambda asked: vectors[[texts.index(text) for text in asked]]
    assert tasks.measure(tasks.Embedded(encode, again), again, [4]) == tasks.measure(
        tasks.Embedded(encode, given), given, [4]
    )


@pytest.mark.parametrize("content", [None, b"", b"no xz"])
def test_tasks_that_cannot_be_read_are_named(tmp_path, content):
    if content is not None:
        (tmp_path / "t.xz").write_bytes(content)
    with pytest.raises(UserError, match="t.xz: cannot read its tasks"):
        tasks.load(tmp_path / "t.xz")
