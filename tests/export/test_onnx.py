"""The exported graph in onnxruntime: our vectors, for any number of texts of any length."""

import numpy as np
import onnxruntime
import pytest
from encoders import OTHER, TEXTS, sharp
from tokenizers import Tokenizer

from conan_engine.export.onnx import write


@pytest.mark.parametrize(("pooling", "other"), [("mean", OTHER), ("last", {})], ids=["mean", "last"])
def test_unit_vectors_from_ids_and_mask(untrained_run, tmp_path, pooling, other):
    encoder = sharp(untrained_run, pooling, **other)
    write(tmp_path, untrained_run, encoder, "float32")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))

    def encode(texts):
        ids = [found.ids[: encoder.max_tokens] for found in tokenizer.encode_batch(texts)]
        mask = np.array([[i < len(row) for i in range(max(map(len, ids)))] for row in ids], np.int64)
        padded = np.array([row + [7] * (mask.shape[1] - len(row)) for row in ids], np.int64)
        return session.run(["sentence_embedding"], {"input_ids": padded, "attention_mask": mask})[0]

    expected = encoder.encode(TEXTS)
    assert ((encode(TEXTS) * expected).sum(1) > 0.99999).all()
    assert all((encode([text])[0] * row).sum() > 0.99999 for text, row in zip(TEXTS, expected))
    assert not encode(["", "x"])[0].any()  # as ours: of no text there is no direction
