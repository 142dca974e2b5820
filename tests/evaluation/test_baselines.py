"""What the table compares with."""

import numpy as np
import pytest

from conan_engine.data.tokenizer import Tokenizer
from conan_engine.evaluation.baselines import RandomProjection


def test_a_projection_keeps_the_cosines_of_counted_and_weighed_tokens(untrained_run):
    tokenizer = Tokenizer.load(Tokenizer.of(untrained_run))
    texts = [
        "the path of the file is the name of the file",
        "the shortest path in a graph",
        "a list of names",
        "",
        "the",
    ]
    wide = RandomProjection(tokenizer, texts, 20_000)
    counts = np.zeros((len(texts), tokenizer.vocab_size))
    for row, text in zip(counts, texts):
        for i in tokenizer.encode(text):
            row[i] += 1
    idf = np.log((1 + len(texts)) / (1 + (counts > 0).sum(axis=0)))
    expected = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * idf
    expected /= np.maximum(np.linalg.norm(expected, axis=1, keepdims=True), 1e-12)
    vectors = wide.encode(texts)
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=0.05)
    assert not vectors[3].any() and np.linalg.norm(vectors[0]) == pytest.approx(1, abs=1e-5)
