"""Charts as SVG: where their points lie, and that no text or number breaks them."""

import random
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from conan_engine.report import charts
from conan_engine.report.charts import Curve, Dot, bars, chart, chart_of_points, short


def parsed(figure):
    """The figure as XML; only names of attributes need quotes for that."""
    return ElementTree.fromstring(re.sub(r"<p class=keys>", '<p class="keys">', str(figure)))


def points(figure):
    """The points of each curve, in the order of the curves: (x, y) in the units of the SVG."""
    lines = [path for path in parsed(figure).iter("path") if path.get("class").startswith("line")]
    return [[tuple(map(float, part.split())) for part in line.get("d").removeprefix("M").split("L")] for line in lines]


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (-2.5, "-2.5"),
        (1234.5, "1,234"),
        (16_900_000, "16.9M"),
        (12_345, "12.3k"),
        (2e9, "2G"),
    ],
)
def test_numbers_are_short(value, text):
    assert short(value) == text


def test_a_curve_goes_through_its_values():
    y = [random.uniform(-3, 5) for _ in range(40)]
    (line,) = points(chart("loss", [Curve("a", range(40), y)]))
    at = np.array(line)
    assert at[0, 0] == charts.LEFT and at[-1, 0] == charts.RIGHT
    assert (charts.TOP - 0.1 <= at[:, 1]).all() and (at[:, 1] <= charts.BOTTOM + 0.1).all()
    # heights are the values but for scale and direction
    assert np.corrcoef(at[:, 1], y)[0, 1] == pytest.approx(-1, abs=1e-3)


def test_long_curves_are_drawn_by_means_of_neighbours():
    y = np.arange(12_000.0)
    (line,) = points(chart("loss", [Curve("a", range(12_000), y)]))
    assert len(line) == charts.BINS
    heights = np.diff([y for _, y in line])
    assert np.allclose(heights, heights.mean(), atol=0.11)  # a straight line stays one


def test_the_pointer_finds_every_curve_over_a_step():
    figure = chart("loss", [Curve("a", [0, 1, 2], [0.5, 0.25, 1]), Curve("b", [1], [7.0], dots=True)])
    titles = [title.text for title in parsed(figure).iter("title")]
    assert titles == ["0\na: 0.5", "1\na: 0.25\nb: 7", "2\na: 1"]


def test_values_that_are_not_finite_are_left_out():
    (line,) = points(chart("loss", [Curve("a", range(4), [1.0, float("nan"), float("inf"), 2.0])]))
    assert len(line) == 2
    assert chart("loss", [Curve("a", [0], [float("nan")])]) == "" == chart("loss", [])


def test_a_single_value_and_equal_values_are_drawn():
    for values in ([3.0], [0.0, 0.0, 0.0], [1e-12, 1e-12]):
        (line,) = points(chart("alpha", [Curve("a", range(len(values)), values)]))
        assert len(line) == len(values) and all(charts.TOP < y < charts.BOTTOM for _, y in line)


def test_dims_that_double_lie_at_equal_distances():
    (line,) = points(chart("dims", [Curve("a", [32, 64, 128, 256], [0.1, 0.2, 0.3, 0.4], True)], doubling=True))
    assert np.diff([x for x, _ in line]) == pytest.approx((charts.RIGHT - charts.LEFT) / 3, abs=0.11)


def test_names_and_texts_are_escaped():
    nasty = "<script>alert('&')</script>"
    dots = [Dot(i, i * i, nasty, i, bool(i % 2)) for i in range(5)]
    for figure in (
        chart(nasty, [Curve(nasty, [0, 1], [1, 2]), Curve("b", [0], [1])]),
        bars(nasty, [(nasty, [0.5, 0.25])], (nasty, "b")),
        chart_of_points(nasty, dots, [nasty]),
    ):
        assert "<script" not in figure and nasty in "".join(parsed(figure).itertext())


def test_bars_are_as_long_as_their_scores():
    figure = bars("Recall@20", [("de", [1.0, 0.5]), ("fr", [0.0, 0.25])], ("ours", "BM25"))
    lengths = [float(bar.get("width")) for bar in parsed(figure).iter("rect")]
    assert lengths == pytest.approx([lengths[0], lengths[0] / 2, 0, lengths[0] / 4], abs=0.1)


def test_a_map_keeps_the_places_and_labels_points_that_lie_apart():
    dots = [Dot(random.random(), random.random(), f"text {i}", i % 2, False) for i in range(100)]
    figure = parsed(chart_of_points("map", dots, ["a", "b"]))
    circles = list(figure.iter("circle"))
    at = np.array([(float(c.get("cx")), float(c.get("cy"))) for c in circles])
    assert np.corrcoef(at[:, 0], [dot.x for dot in dots])[0, 1] == pytest.approx(1, abs=1e-3)
    labels = [text for text in figure.iter("text") if "label" in (text.get("class") or "")]
    assert len(labels) == charts.LABELS == len({label.text for label in labels})
