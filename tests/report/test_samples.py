"""The texts that a run keeps, and what its report shows of them."""

import numpy as np
import pytest

from conan_engine.report import samples


class ByLetters:
    """Encodes a text as its counts of letters, at unit length: which text is near which is known by hand."""

    def encode(self, texts):
        counts = np.array([[text.count(letter) for letter in "abcdefgh"] for text in texts], np.float32)
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


def searched(held_out=True, **sources):
    return samples.Samples({"held_out": held_out, "sources": sources}, ByLetters())


def test_searches_say_where_the_right_document_is():
    found = searched(
        one={"queries": ["aab", "c", "h"], "documents": ["aab b", "aaab", "cd", "h", "hg"], "right": [[1], [2], [3, 4]]}
    )
    by_query = {search["query"]: search for search in found.searches}
    assert by_query["c"]["rank"] == 1 and by_query["c"]["found"][0] == {
        "text": "cd",
        "score": pytest.approx(0.5**0.5),
        "right": True,
    }
    assert by_query["aab"]["rank"] == 1 and by_query["aab"]["answer"] == "aaab"
    # "h" is the query's own text: it does not count as found, the other right document does
    assert by_query["h"]["rank"] == 1 and by_query["h"]["answer"] == "hg"
    assert "h" not in [document["text"] for document in by_query["h"]["found"]]
    assert found.first == 1 and found.queries == 3


def test_good_searches_come_first_then_the_worst_of_each_source_in_turn():
    letters = "abcdefgh"
    right = {"queries": list(letters), "documents": [x * 2 for x in letters], "right": [[i] for i in range(8)]}
    wrong = {**right, "right": [[(i + 1) % 8] for i in range(8)]}
    found = searched(right=right, wrong=wrong, other=wrong)
    ranks = [(search["source"], search["rank"] == 1) for search in found.searches]
    assert ranks[:5] == [("right", True)] * 5
    assert ranks[5:] == [(source, False) for source in ("wrong", "other", "wrong", "other", "wrong")]
    assert found.first == pytest.approx(1 / 3)
    assert len(found.dots) == 48 and {dot.colour for dot in found.dots} == {0, 1, 2}


def test_equal_scores_count_against_the_right_document():
    found = searched(one={"queries": ["a"], "documents": ["b", "c", "d"], "right": [[0]]})
    assert found.searches[0]["rank"] == 3


def test_a_map_is_of_texts_that_no_stage_trained_on():
    letters = {
        "queries": list("abcdef"),
        "documents": ["aa", "bb", "cc", "dd", "ee", "ff"],
        "right": [[i] for i in range(6)],
    }
    neighbours = searched(one=letters).dots
    assert len(neighbours) == 12 and all(np.isfinite([dot.x, dot.y]).all() for dot in neighbours)
    assert not searched(held_out=False, one=letters).dots
    assert not searched(one={"queries": ["a"], "documents": ["aa"], "right": [[0]]}).dots


def test_a_long_text_is_shown_on_one_line_by_its_beginning():
    assert samples.one_line(" a\n b\t\tc ") == "a b c"
    assert samples.one_line("word " * 100, 20) == "word word word word…"
