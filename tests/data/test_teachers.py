"""The demo's teacher scores a pair by its form; models score as they do by themselves."""

import numpy as np
import pytest
import torch
from encoders import TEXTS, sharp
from runs import small_tokenizer, write_lines

from conan_engine.config import Weak
from conan_engine.data import build, teachers
from conan_engine.data.sources import paths
from conan_engine.data.teachers import plausible
from conan_engine.errors import UserError


def test_a_pair_that_can_be_a_text_and_its_counterpart_scores_one():
    assert plausible(
        ["Return the shortest path."], ["The path is found with Dijkstra's algorithm over weighted edges."]
    ) == [1.0]
    assert plausible(["Die Seite wurde nicht gefunden."], ["The page was not found."]) == [1.0]
    assert plausible(["找不到该页面。"], ["The page was not found, sorry."]) == [1.0]


def test_copies_and_stubs_score_nothing():
    assert plausible(
        ["The same text.", "TODO", "A summary of it."], ["The same text. ", "A long text follows here.", "..."]
    ) == [0.0, 1.0, 0.0]


def test_a_length_beside_all_proportion_costs_score():
    scores = plausible(["word " * 40, "ten signs!", "ten signs!"], ["tiny", "x" * 400, "x" * 200])
    assert scores == [4 / 199 * 4, 0.5, 1.0]


@pytest.fixture(scope="module")
def models(untrained_run, tmp_path_factory):
    """Folders of a model of each kind, by random weights, and what each gives pairs by itself."""
    from sentence_transformers import CrossEncoder, SentenceTransformer
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    from conan_engine.export.sentence_transformers import write

    folder = tmp_path_factory.mktemp("models")
    for name in ("bi", "cross", "two"):
        (folder / name).mkdir()
    write(folder / "bi", untrained_run, sharp(untrained_run), "float32")
    tokenizer = AutoTokenizer.from_pretrained(folder / "bi")
    for name, labels in (("cross", 1), ("two", 2)):
        shape = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=labels,
            pad_token_id=0,
        )
        torch.manual_seed(0)
        model = BertForSequenceClassification(shape)
        torch.nn.init.normal_(model.classifier.weight, std=3.0)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    bi, cross = SentenceTransformer(str(folder / "bi"), device="cpu"), CrossEncoder(str(folder / "cross"), device="cpu")
    return folder, {
        f"sentence-transformers:{folder}/bi": lambda queries, documents: bi.similarity_pairwise(
            bi.encode_query(queries), bi.encode_document(documents)
        ).numpy(),
        f"cross-encoder:{folder}/cross": lambda queries, documents: (
            1 / (1 + np.exp(-cross.predict(list(zip(queries, documents)), activation_fn=torch.nn.Identity())))
        ),
    }


@pytest.mark.parametrize("kind", [0, 1], ids=["bi", "cross"])
def test_a_model_scores_as_it_does_by_itself(models, tmp_path, kind):
    name, theirs = list(models[1].items())[kind]
    texts = [text for text in TEXTS if text.strip()]
    pairs = [(query, document) for query in texts for document in texts]
    wanted = theirs(*map(list, zip(*pairs)))
    assert np.ptp(wanted) > 0.1
    np.testing.assert_allclose(teachers.load("weak.teacher", name)(*map(list, zip(*pairs))), wanted, atol=1e-5)
    least = float(np.median(wanted)) + 1e-4
    path = write_lines(tmp_path / "pairs.jsonl", [{"query": query, "pos": document} for query, document in pairs])
    job = build.make_job(
        str(path), "weak", Weak(teacher=name, min_score=least), small_tokenizer(tmp_path), tmp_path / "data"
    )
    shards = build.make_shards([job], small_tokenizer(tmp_path), 1)[job.folder]
    np.testing.assert_allclose(shards.scores(np.arange(len(shards))), wanted[wanted >= least], atol=1e-5)


@pytest.mark.slow
def test_processes_share_a_models_work(models, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "UNIT", (2000, 2000))
    name, theirs = list(models[1].items())[1]
    pairs = [(f"question {i}", f"answer {i * i}") for i in range(200)]
    path = write_lines(tmp_path / "pairs.jsonl", [{"query": query, "pos": document} for query, document in pairs])
    job = build.make_job(
        str(path), "weak", Weak(teacher=name, min_score=0), small_tokenizer(tmp_path), tmp_path / "data"
    )
    assert len(job.units()) > 3
    shards = build.make_shards([job], small_tokenizer(tmp_path), 2)[job.folder]
    np.testing.assert_allclose(shards.scores(np.arange(200)), theirs(*map(list, zip(*pairs))), atol=1e-5)


def test_a_model_that_cannot_judge_is_named(models):
    for name, said in (
        ("cross-encoder:/no/such", "weak.teacher: /no/such: no such folder"),
        (f"cross-encoder:{models[0]}/two", "it has 2 outputs"),
        (f"sentence-transformers:{models[0]}", "cannot load"),
    ):
        with pytest.raises(UserError, match=said) as error:
            teachers.load("weak.teacher", name)
        assert "\n" not in str(error.value)


def test_each_process_has_a_gpu_to_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert [teachers.own_device(tmp_path / "x", 3) for _ in range(3)] == ["cuda:0", "cuda:1", None]
    assert teachers.own_device(tmp_path / "another machine's", 1) == "cuda:0"
