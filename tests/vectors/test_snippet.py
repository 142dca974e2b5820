"""A snippet holds the words that were asked for, where they stand together, within its room."""

import numpy as np
import pytest

from conan_engine.vectors.snippet import snippet


def test_a_short_text_is_whole_on_one_line():
    assert snippet("a  few\nwords\t", ["few"], 20) == "a few words"


def test_the_place_with_most_of_the_words_is_shown():
    chance = np.random.default_rng()
    for _ in range(50):
        other = [f"other{i}" for i in chance.integers(0, 100, 400)]
        at = int(chance.integers(0, 390))
        text = " ".join(other[:at] + ["Green", "and", "ripe", "apples"] + other[at:])
        found = snippet(f"green {text} ripe", ["green", "ripe", "apples"], 120)
        assert "Green and ripe apples" in found and len(found) <= 124


def test_without_a_word_it_begins_at_the_beginning():
    text = "part " * 100
    assert snippet(text, ["art"], 50).startswith("part part") and snippet(text, ["art"], 50).endswith("part …")


@pytest.mark.parametrize("text", ["中文" * 300 + "苹果" + "中文" * 300, "x" * 500])
def test_text_without_spaces_is_cut_within_its_room(text):
    found = snippet(text, ["苹果"], 60)
    assert 30 < len(found) <= 64 and ("苹果" in found) == ("苹果" in text)
