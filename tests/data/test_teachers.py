"""The demo's teacher scores a pair by its form."""

from conan_engine.data.teachers import plausible


def test_a_pair_that_can_be_a_text_and_its_counterpart_scores_one():
    assert plausible(["Return the shortest path."], ["The path is found with Dijkstra's algorithm over weighted edges."]) == [1.0]
    assert plausible(["Die Seite wurde nicht gefunden."], ["The page was not found."]) == [1.0]
    assert plausible(["找不到该页面。"], ["The page was not found, sorry."]) == [1.0]


def test_copies_and_stubs_score_nothing():
    assert plausible(["The same text.", "TODO", "A summary of it."], ["The same text. ", "A long text follows here.", "..."]) == [0.0, 1.0, 0.0]


def test_a_length_beside_all_proportion_costs_score():
    scores = plausible(["word " * 40, "ten signs!", "ten signs!"], ["tiny", "x" * 400, "x" * 200])
    assert scores == [4 / 199 * 4, 0.5, 1.0]
