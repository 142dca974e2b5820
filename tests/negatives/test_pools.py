"""The replacement rule case by case, and pools on a source small enough to check by eye."""

from types import SimpleNamespace

import numpy as np
import pytest

from conan_engine.config import Negatives
from conan_engine.negatives.pools import Pools, should_replace

RULE = Negatives(count=2, pool=4)


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


def test_a_checkpoint_holds_what_has_changed():
    p = pools()
    assert [len(array) for array in p.state().values()] == [0, 0, 0, 0, 1]
    p.update(np.array([20]), np.array([[0.9, 0.3]]))
    state = {key: value.copy() for key, value in p.state().items()}
    assert state["rows"].tolist() == [1] and sum(array.nbytes for array in state.values()) < 40
    again = pools()
    again.load_state(state)
    for q in (p, again):
        q.update(np.array([10, 20]), np.array([[0.5, 0.8], [0.4, 0.9]]))
    np.testing.assert_array_equal(p.slot, again.slot)
    np.testing.assert_array_equal(p.first, again.first)
    assert p.replaced == again.replaced > 0 and again.state()["rows"].tolist() == [0, 1]
