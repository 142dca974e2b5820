"""The replacement rule case by case, and pools on a source small enough to check by eye."""

from types import SimpleNamespace

import numpy as np
import pytest

from conan_engine.config import Negatives
from conan_engine.errors import UserError
from conan_engine.data.known import find
from conan_engine.negatives import Corpus, Pools, by_quantile, mine, should_replace

RULE = Negatives(count=2, pool=4)


def known_of(groups, given=(), queries=None):
    """Where every query is of its own, and no given negative anybody's positive; or as `queries` says."""
    groups = np.array(groups, np.int64)
    queries = np.arange(len(groups)) if queries is None else np.array(queries, np.int64)
    return find(queries, 10**6 + groups, groups, np.full(int(np.sum(given)), -5))


@pytest.mark.parametrize(
    ("first", "now", "replaced"),
    [
        (0.39, 0.90, True),  # S_0 < 0.4: too easy from the start, whatever it is now
        (0.40, 0.40, False),  # the bound itself is kept
        (0.80, 0.66, True),  # 1.2 * 0.66 = 0.792 < 0.80 and 0.66 < 0.7
        (0.80, 0.67, False),  # 1.2 * 0.67 = 0.804: has not fallen far enough
        (0.90, 0.70, False),  # fallen far enough, but 0.7 is still hard
        (0.90, 0.69, True),
        (0.50, 0.60, False),  # has become harder
    ],
)
def test_replacement_rule(first, now, replaced):
    assert should_replace(np.float64(first), np.float64(now), RULE) == replaced


class FakeShards:
    """The part of Shards that negatives.py reads: records of (query, positive, given negatives...) with groups."""

    def __init__(self, groups, given):
        self._groups, self._given = np.array(groups, np.int64), np.array(given, np.int32)

    def __len__(self):
        return len(self._groups)

    def groups(self, records):
        return self._groups[records]

    def field_counts(self, records):
        return self._given[records] + 2


def test_corpus_holds_each_positive_once_and_every_given_negative():
    corpus = Corpus(FakeShards(groups=[7, 8, 7, 9], given=[0, 2, 1, 0]), known_of([7, 8, 7, 9], [0, 2, 1, 0]))
    assert list(zip(corpus.record, corpus.field, corpus.group)) == [
        (0, 1, 7), (1, 1, 8), (3, 1, 9), (1, 2, -1), (1, 3, -1), (2, 2, -1),
    ]  # fmt: skip
    assert corpus.given_start.tolist() == [3, 3, 5, 6, 6]


def pools():
    corpus = SimpleNamespace(record=np.arange(100, 106), field=np.ones(6, int), group=np.arange(6))
    candidates = np.array([[0, 1, 2, 3], [5, 4, 3, 2]], dtype=np.int32)
    return Pools(corpus, np.array([10, 20]), candidates, RULE)


def test_a_replacement_is_drawn_at_the_next_use_best_first():
    p = pools()
    assert p.draw(np.array([20, 10]))[0].tolist() == [105, 104, 100, 101]
    p.update(np.array([10]), np.array([[0.9, 0.3]]))  # the second has S_0 < 0.4
    assert p.draw(np.array([10]))[0].tolist() == [100, 102]
    assert p.draw(np.array([20]))[0].tolist() == [105, 104], "another query's pool is untouched"
    p.update(np.array([10]), np.array([[0.6, 0.8]]))  # the first fell from 0.9 to 0.6; the second's S_0 is 0.8
    assert p.draw(np.array([10]))[0].tolist() == [103, 102]
    assert p.first[0].tolist() == pytest.approx([np.nan, 0.8], nan_ok=True)
    assert p.replaced == 2


def test_an_exhausted_pool_keeps_what_it_has():
    p = pools()
    for _ in range(5):
        p.update(np.array([10]), np.array([[0.1, 0.1]]))
    assert p.draw(np.array([10]))[0].tolist() == [102, 103]


def test_pools_survive_a_checkpoint():
    p = pools()
    p.update(np.array([10, 20]), np.array([[0.9, 0.3], [0.5, 0.2]]))
    again = Pools.from_state(p.corpus, {key: value.copy() for key, value in p.state().items()}, RULE)
    for q in (p, again):
        q.update(np.array([10, 20]), np.array([[0.5, 0.8], [0.4, 0.9]]))
    np.testing.assert_array_equal(p.slot, again.slot)
    np.testing.assert_array_equal(p.first, again.first)
    assert p.replaced - 2 == again.replaced


def test_mined_pools_leave_out_the_own_group_and_likely_false_negatives():
    generator = np.random.default_rng()
    groups = np.repeat(np.arange(40), 2)  # every positive text stands in two records
    shards = FakeShards(groups, given=np.zeros(80))
    text = generator.normal(size=(40, 16)).astype(np.float32)
    text[1] = text[0] * 1.0001  # another text that says the same: a false negative
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    rule = Negatives(count=3, pool=8)
    found = mine(shards, known_of(groups), np.arange(80), lambda records, fields: text[groups[records]], rule, seed=1, source="test")
    own = found.corpus.group[found.candidates]
    assert not (own == groups[:, None]).any()
    assert not (own[groups == 0] == 1).any() and not (own[groups == 1] == 0).any()
    assert all(len(set(row)) == 8 for row in found.candidates)
    cosine = (text[groups][:, None] * text[own]).sum(-1)
    assert (np.diff(cosine[:, :4], axis=1) <= 1e-6).all(), "best first"


def test_bounds_by_quantile_are_cosines_of_what_was_mined_first():
    vectors = np.random.default_rng().normal(size=(60, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    groups = np.arange(60)
    rule = Negatives(count=3, pool=8, bounds="quantile", low=0.25, bound=0.75, max_ratio=2.0)
    found = mine(FakeShards(groups, np.zeros(60)), known_of(groups), groups, lambda r, f: vectors[r], rule, seed=1, source="test")
    first = np.einsum("qe,qke->qk", vectors, vectors[found.corpus.group[found.candidates[:, :3]]])
    # the search finds the query's own document first, which no pool has: of the three that count, two are in use
    assert found.rule.low == pytest.approx(np.quantile(np.c_[np.ones(60), first[:, :2]], 0.25), abs=1e-5)
    assert 0.2 < (first[:, :2] < found.rule.low).mean() < 0.5 and found.rule.low < found.rule.bound <= 1.00001
    again = Pools.from_state(found.corpus, found.state(), rule)
    assert (again.rule.low, again.rule.bound) == (found.rule.low, found.rule.bound)
    assert by_quantile(Negatives(), first.ravel()) == Negatives()


def test_random_negatives_are_no_ones_neighbours_and_never_the_querys_own():
    groups = np.arange(200)
    found = mine(FakeShards(groups, np.zeros(200)), known_of(groups), groups, None, Negatives(count=7, pool=8, index="random"), seed=1, source="test")
    documents = found.corpus.group[found.candidates]
    assert all(len(set(row)) == 8 for row in documents) and not (documents == groups[:, None]).any()
    assert len(np.unique(documents)) > 190


def test_given_negatives_come_first():
    groups = np.arange(30)
    shards = FakeShards(groups, given=[2] + [0] * 29)
    vectors = np.eye(30, dtype=np.float32)
    found = mine(shards, known_of(groups, [2]), np.arange(30), lambda r, f: vectors[r], Negatives(count=2, pool=6), seed=1, source="test")
    assert found.draw(np.array([0]))[1].tolist() == [2, 3]


def test_too_few_documents_for_a_pool_is_a_clear_error():
    with pytest.raises(UserError, match="5 distinct documents cannot fill pools of negatives.pool = 32"):
        mine(FakeShards(np.arange(5), np.zeros(5)), known_of(np.arange(5)), np.arange(5), None, Negatives(), seed=1, source="x.jsonl")


def test_no_positive_of_the_query_is_mined_or_taken_from_those_given():
    groups = np.arange(30)
    queries = np.arange(30) // 3  # three positives each
    vectors = np.random.default_rng().normal(size=(10, 8)).astype(np.float32)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True))[queries]  # what is right for a query is nearest
    shards = FakeShards(groups, given=[1] + [0] * 29)
    known = find(queries, 10**6 + groups, groups, np.array([10**6 + 1]))  # record 0's given negative is record 1's positive
    for pool in (4, 25):  # found by the search alone, and filled up
        found = mine(shards, known, np.arange(30), lambda r, f: vectors[r], Negatives(count=2, pool=pool, max_ratio=2.0), seed=1, source="test")
        assert (found.corpus.group[found.candidates] // 3 != queries[:, None]).all()


def test_a_query_that_everything_answers_is_named():
    shards = FakeShards(np.arange(9), np.zeros(9))
    known = find(np.zeros(9, np.int64), 10**6 + np.arange(9), np.arange(9), np.empty(0, np.int64))
    with pytest.raises(UserError, match="x.jsonl: record 0: no negative to be found for its query, 9 "):
        mine(shards, known, np.arange(9), lambda r, f: np.eye(9, dtype=np.float32)[r], Negatives(count=2, pool=4), seed=1, source="x.jsonl")
