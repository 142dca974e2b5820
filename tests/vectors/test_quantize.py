"""Vectors in fewer bytes: those of sentence-transformers' quantize_embeddings, and near what they were."""

import numpy as np
import pytest
from sentence_transformers.util.quantization import quantize_embeddings

from conan_engine.vectors.quantize import BITS, quantize, ranges_of, restore


def unit(n, dim):
    vectors = np.random.default_rng().standard_normal((n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("dim", [1, 7, 8, 61, 256])
def test_they_are_those_of_sentence_transformers(dim):
    vectors, others = unit(150, dim), unit(150, dim)
    vectors[0], vectors[:, -1] = 0, vectors[0, -1]  # no text; a number that is the same in all
    ranges = ranges_of(vectors)
    for given in (vectors, others):  # the others leave the ranges
        for ours, theirs in (
            (quantize(given, "int8", ranges), quantize_embeddings(given, "int8", ranges=ranges)),
            (quantize(given, "binary"), quantize_embeddings(given, "binary")),
            (quantize(given, "float32"), given),
        ):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(quantize(vectors, "int8", ranges), quantize_embeddings(vectors, "int8"))


@pytest.mark.parametrize("dim", [7, 64])
@pytest.mark.parametrize("precision", BITS)
def test_what_is_restored_is_near(precision, dim):
    vectors = unit(150, dim)
    ranges = ranges_of(vectors)
    stored = quantize(vectors, precision, ranges)
    found = restore(stored, precision, dim, ranges)
    assert (
        stored.nbytes == 150 * -(-dim * BITS[precision] // 8)
        and found.dtype == np.float32
        and found.shape == vectors.shape
    )
    if precision == "binary":
        np.testing.assert_array_equal(found, np.where(vectors > 0, 1, -1))
    else:
        step = {"float32": 0, "float16": 2.0**-11, "int8": (ranges[1] - ranges[0]) / 255 * 1.01}[precision]
        assert (abs(found - vectors) <= step).all()
