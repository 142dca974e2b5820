"""What can be a translation, asked of true ones; and shares."""

import pytest

from conan_engine import languages
from conan_engine.data.sources import catalogues
from conan_engine.errors import UserError


def test_true_translations_are_accepted():
    kept, messages = 0, [m for m in catalogues.read(("django", "wagtail", "sphinx")) if m.language in languages.NAMES]
    assert len({m.language for m in messages}) > 20
    problems = {}
    for m in messages:
        found = languages.problem(m.foreign, m.english, m.language)
        kept += found is None
        if found:
            problems.setdefault((m.language, found), []).append((m.english, m.foreign))
    assert kept > 0.99 * len(messages), {key: texts[:2] for key, texts in problems.items()}


@pytest.mark.parametrize(("text", "source", "language", "said"), [
    (" ", "what is a graph", "de", "empty"),
    ("What  is a graph ", "What is a graph", "de", "a copy of the source"),
    ("was ist ein Graph", "what is a graph", "ru", "another script"),
    ("что такое граф", "what is a graph", "de", "another script"),
    ("什么是图论中的最短路径问题以及如何高效地解决这个问题呢请说明",
     "what is the shortest path problem in graph theory and how is it solved efficiently",
     "ja", "another script"),
    ("グラフとは何ですか", "what is a graph", "ja", None),
    ("numpy.linalg.norm の使い方", "how to use numpy.linalg.norm", "ja", None),
    ("Ja", "how do I find the shortest path between two nodes of a graph", "de", "too short"),
    ("图", "how do I find the shortest path between two nodes of a graph", "zh", "too short"),
    ("Ein Graph ist eine Menge von Knoten und Kanten. " * 4, "what is a graph", "de", "too long"),
    ("42", "42 0x2A", "de", None), ("Was ist ein Graph \ud83d", "what is a graph", "de", "half a character"),
])  # fmt: skip
def test_what_cannot_be_one(text, source, language, said):
    assert languages.problem(text, source, language) == said


def test_the_papers_shares_are_of_26_languages():
    assert (
        len(languages.PAPER) == 26
        and sum(languages.PAPER.values()) == 106
        and languages.PAPER.keys() == languages.NAMES.keys()
    )
    assert languages.shares("paper")["zh"] == pytest.approx(12 / 106)


@pytest.mark.parametrize(("name", "text", "said"), [
    ("x.toml", "de = 3\nfr = 1\n", None), ("x.json", '{"de": 3, "fr": 1, "ja": 0}', None),
    ("x.toml", "xx = 1", "'xx' is not a language of the recipe"),
    ("x.toml", "de = -1", "de is -1; expected a number, 0 or more"), ("x.toml", "de = 0", "all shares are 0"),
    ("x.toml", "de: 1", "cannot read these shares"),
])  # fmt: skip
def test_shares_of_ones_own(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    if said is None:
        assert languages.shares(str(tmp_path / name)) == {"de": 0.75, "fr": 0.25}
    else:
        with pytest.raises(UserError, match=said):
            languages.shares(str(tmp_path / name))
