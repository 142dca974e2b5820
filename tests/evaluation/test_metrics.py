"""Retrieval metrics and rank correlation: by hand, and as scikit-learn and scipy have them."""

import math

import numpy as np
import pytest

from conan_engine.evaluation.metrics import ndcg, ranks, recall, search, spearman


def test_rank_counts_the_better_and_the_tied():
    scores = np.array([[0.9, 0.1, 0.5], [0.2, 0.2, 0.1], [0.0, 0.0, 0.0], [0.3, 0.2, 0.1]])
    assert ranks(scores, np.array([0, 0, 1, 2])).tolist() == [1, 2, 3, 3]


def test_ndcg_by_hand():
    rank = np.array([1, 3, 10, 11])
    assert ndcg(rank) == pytest.approx((1 + 1 / 2 + 1 / math.log2(11) + 0) / 4)


def test_recall_by_hand():
    assert recall(np.array([1, 20, 21, 400])) == 0.5


def test_search_is_the_textbooks_with_ties_against_the_right_one():
    scores = np.array([[0.9, 0.5, 0.5, 0.1], [0.3, 0.2, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0]])
    right = np.array([[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    first = (1 / math.log2(4) + 1 / math.log2(5)) / (1 + 1 / math.log2(3))  # at 3, for the tie, and at 4
    assert search(scores, right) == (pytest.approx((first + 1) / 2), 1.0)
    assert search(scores[2:], right[2:]) == (0.0, 0.0)
    assert search(np.full((1, 30), np.nan), np.eye(1, 30, dtype=bool)) == (0.0, 0.0)


def test_search_agrees_with_sklearn_where_nothing_ties():
    from sklearn.metrics import ndcg_score

    rng = np.random.default_rng()
    scores, right = rng.normal(size=(40, 60)), rng.random((40, 60)) < 0.1
    right[:, 0] |= ~right.any(axis=1)
    ndcg, recall = search(scores, right)
    assert ndcg == pytest.approx(ndcg_score(right, scores, k=10))
    top = np.argsort(-scores)[:, :20]
    assert recall == pytest.approx(np.mean([r[t].sum() / r.sum() for r, t in zip(right, top)]))


def test_spearman_is_scipys():
    from scipy.stats import spearmanr

    rng = np.random.default_rng()
    a, b = rng.normal(size=100).round(1), rng.integers(0, 5, 100)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman(a, np.ones(100)) == 0.0
