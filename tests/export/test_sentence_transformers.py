"""An exported folder in sentence-transformers, transformers and mteb: what they compute is what we compute."""

import mteb
import numpy as np
import pytest
import torch
from encoders import OTHER, TEXTS, sharp
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer
from test_mteb_adapter import Docstrings, InstructedDocstrings, score_of
from transformers import AutoModel, AutoTokenizer

from conan_engine.evaluation.encoder import Encoder
from conan_engine.export.sentence_transformers import write


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def exported(folder, run, encoder, dtype="float32", **extra):
    folder.mkdir()
    write(folder, run, encoder, dtype, **extra)
    return str(folder)


@pytest.mark.parametrize(("pooling", "other"), [("mean", {}), ("last", OTHER)], ids=["mean", "last"])
def test_every_dim_is_ours(untrained_run, tmp_path, pooling, other):
    encoder = sharp(untrained_run, pooling, **other)
    theirs = SentenceTransformer(exported(tmp_path / "out", untrained_run, encoder), device="cpu")
    for dim in (None, *encoder.dims, 5):
        found = theirs.encode(TEXTS, truncate_dim=dim, normalize_embeddings=True)
        np.testing.assert_allclose(found, encoder.encode(TEXTS, dim), atol=1e-5)
    one_by_one = [theirs.encode(text) for text in TEXTS]  # without padding, and so without a mask
    np.testing.assert_allclose(one_by_one, encoder.encode(TEXTS), atol=1e-5)
    causal = encoder.model.embed(*_packed(encoder, TEXTS[0]), alpha=0.0)
    assert torch.nn.functional.cosine_similarity(causal, torch.from_numpy(encoder.encode(TEXTS[:1]))).item() < 0.99, (
        "else nothing is shown of the mask"
    )
    assert theirs.max_seq_length == encoder.max_tokens


def _packed(encoder, text):
    ids = torch.tensor(encoder.tokenizer.encode(text), dtype=torch.int32)
    return ids, torch.tensor([0, len(ids)], dtype=torch.int32)


def test_an_empty_text_among_others_is_zero(untrained_run, tmp_path):
    encoder = sharp(untrained_run)
    theirs = SentenceTransformer(exported(tmp_path / "out", untrained_run, encoder), device="cpu").encode(["", *TEXTS])
    np.testing.assert_allclose(theirs, encoder.encode(["", *TEXTS]), atol=1e-5)


def test_transformers_alone(untrained_run, tmp_path):
    encoder = sharp(untrained_run)
    folder = exported(tmp_path / "out", untrained_run, encoder)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    given = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    assert [ids[: sum(mask)] for ids, mask in zip(given["input_ids"].tolist(), given["attention_mask"].tolist())] == [
        ids[: encoder.max_tokens] for ids in encoder.tokenizer.encode_batch(TEXTS)
    ]
    mask = given["attention_mask"][:, :, None]
    with torch.no_grad():
        mean = (model(**given).last_hidden_state * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(torch.nn.functional.normalize(mean, dim=-1), encoder.encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize(("dtype", "near"), [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_smaller_weights_are_near(untrained_run, tmp_path, dtype, near):
    encoder = sharp(untrained_run)
    folder = exported(tmp_path / "out", untrained_run, encoder, dtype)
    assert AutoModel.from_pretrained(folder).dtype == getattr(torch, dtype)
    theirs = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": "float32"}).encode(TEXTS)
    assert ((theirs * encoder.encode(TEXTS)).sum(1) > 1 - near).all()


def test_mteb_gives_it_the_scores_of_our_adapter(untrained_run, tmp_path):
    from conan_engine.evaluation.mteb_adapter import Model

    encoder = Encoder.load(untrained_run)
    folder = exported(tmp_path / "out", untrained_run, encoder)
    theirs = mteb.models.SentenceTransformerEncoderWrapper(SentenceTransformer(folder, device="cpu"))
    ours = score_of(Model(untrained_run, instructions=False), Docstrings())
    assert 0 < ours < 1 and score_of(theirs, Docstrings()) == pytest.approx(ours, abs=1e-4)


def test_an_instruction_reaches_queries_here_and_in_mteb(untrained_run, tmp_path):
    from conan_engine.evaluation.mteb_adapter import Model

    encoder, instruction = Encoder.load(untrained_run), InstructedDocstrings.metadata.prompt["query"]
    folder = exported(tmp_path / "out", untrained_run, encoder, instruction=instruction)
    theirs = SentenceTransformer(folder, device="cpu")
    np.testing.assert_allclose(
        theirs.encode_query(TEXTS), encoder.encode([f"{instruction}\n{text}" for text in TEXTS]), atol=1e-5
    )
    np.testing.assert_allclose(theirs.encode_document(TEXTS), encoder.encode(TEXTS), atol=1e-5)
    assert f'encode_query([...])  # puts "{instruction}" and a new line' in (tmp_path / "out/README.md").read_text()
    ours = score_of(Model(untrained_run), InstructedDocstrings())
    assert score_of(mteb.models.SentenceTransformerEncoderWrapper(theirs), InstructedDocstrings()) == pytest.approx(
        ours, abs=1e-4
    )


def test_the_card_is_one_that_the_hub_reads(whole, tmp_path):
    card = ModelCard.load(exported(tmp_path / "out", whole, Encoder.load(whole)) + "/README.md")
    assert (
        card.data.library_name == "sentence-transformers"
        and card.data.pipeline_tag == "sentence-similarity"
        and card.data.license is None
    )
    assert "| supervised | 6 | pairs.jsonl (2), label.jsonl (1), sts.jsonl (1) | 8 queries | 32 tokens |" in card.text
    assert "its first 8, 16, 32 are embeddings too" in card.text
