"""Vectors in fewer bytes, as sentence-transformers' `quantize_embeddings` makes them: of documents; queries stay
float32.
"""

from __future__ import annotations

import numpy as np

BITS = {"float32": 32, "float16": 16, "int8": 8, "binary": 1}  # bits of a number, by precision


def stored_as(precision: str, dim: int) -> tuple[str, int]:
    """(dtype, columns) of vectors of so many numbers, as `quantize` gives them."""
    return ("int8", -(-dim // 8)) if precision == "binary" else (precision, dim)


def ranges_of(vectors: np.ndarray) -> np.ndarray:
    """The smallest and largest value of each number, which int8 needs: [N, E] -> float32 [2, E]."""
    return np.stack((vectors.min(axis=0), vectors.max(axis=0))).astype(np.float32)


def quantize(vectors: np.ndarray, precision: str, ranges: np.ndarray | None = None) -> np.ndarray:
    """float32 [N, E] in a precision of BITS.

    float16: [N, E]. int8: int8 [N, E], in 256 even steps from ranges[0] to ranges[1], float32 [2, E]. binary: int8 [N,
    ceil(E / 8)], one bit per number that says whether it is positive, the first in the highest bit, less 128.
    """
    if precision == "int8":
        step = _step(ranges)
        return (np.clip(np.floor((vectors - ranges[0]) / step), 0, 255) - 128).astype(np.int8)
    if precision == "binary":
        return (np.packbits(vectors > 0, axis=-1) - 128).astype(np.int8)
    return vectors.astype(precision)


def restore(stored: np.ndarray, precision: str, dim: int, ranges: np.ndarray | None = None) -> np.ndarray:
    """The float32 [N, dim] that a float32 query is multiplied with, from what `quantize` gave; 1 or -1 for binary."""
    if precision == "int8":
        return (stored.astype(np.float32) + 128) * _step(ranges) + ranges[0]
    if precision == "binary":
        return np.unpackbits(stored.astype(np.uint8) + np.uint8(128), axis=-1)[:, :dim] * np.float32(2) - 1
    return stored.astype(np.float32)


def _step(ranges):
    step = (ranges[1] - ranges[0]) / 255
    return np.where(step == 0, 1, step)  # a number with the same value in all vectors
