"""Metrics of search and similarity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ranks(scores: np.ndarray, answer: Sequence[int] | np.ndarray) -> np.ndarray:
    """The rank of each query's answer, 1 first: scores [N, M], answer int [N] -> int [N].

    A document with the same score as the answer, or with NaN, ranks before it, so a search that finds nothing (all
    scores 0) earns nothing.
    """
    own = scores[np.arange(len(answer)), answer]
    return (~(scores < own[:, None])).sum(axis=1)


def gain(rank: np.ndarray, at: int = 10) -> np.ndarray:
    """What a right document adds to the discounted cumulative gain: 1 / log2(1 + rank), for ranks up to `at`."""
    return np.where(rank <= at, 1 / np.log2(1 + rank), 0)


def ndcg(rank: np.ndarray, at: int = 10) -> float:
    """Mean normalised discounted cumulative gain, with one right document per query."""
    return float(gain(rank, at).mean())


def recall(rank: np.ndarray, at: int = 20) -> float:
    return float((rank <= at).mean())


def search(scores: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """(mean nDCG@10, mean Recall@20) of the queries that have a right document. scores, right (bool): [N, M]."""
    some = right.any(axis=1)
    scores, right = scores[some], right[some]
    if not len(right):
        return 0.0, 0.0
    query, document = np.nonzero(right)
    rank = np.concatenate([ranks(scores[[q]], [int(d)]) for q, d in zip(query, document)])
    have = right.sum(axis=1)
    ideal = np.cumsum(gain(np.arange(1, 11)))[np.minimum(have, 10) - 1]
    return float((np.bincount(query, gain(rank)) / ideal).mean()), float((np.bincount(query, rank <= 20) / have).mean())


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation, ties at their mean rank; 0 if either is constant."""
    a, b = (_mean_ranks(x) for x in (a, b))
    a, b = a - a.mean(), b - b.mean()
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / scale) if scale else 0.0


def _mean_ranks(x):
    _, which, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[which]
