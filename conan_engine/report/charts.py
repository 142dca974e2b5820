"""Charts as SVG, for a page without script. page.html has their colours: class c0 to c7, light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

COLOURS = 8
WIDTH, HEIGHT = 360, 190  # of a chart, in the units of its viewBox; a phone shows one chart in a row
LEFT, RIGHT, TOP, BOTTOM = 46, 344, 8, 168  # of the area inside the axes
BINS = 120  # a curve of more points is drawn by its means
MAP = 480  # width and height of a map
LABELS = 12  # texts that a map shows beside their points


class Curve(NamedTuple):
    """Values y over x, of equal length. dots: mark each value, as for a few measurements."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dots: bool = False


class Dot(NamedTuple):
    """A point of a map, with its text, the number of its colour, and whether it is drawn hollow."""

    x: float
    y: float
    text: str
    colour: int
    hollow: bool


def short(value: float) -> str:
    """A number in few characters: 0.0123, 1.5, 1,234, 12.3k, 4.5M."""
    size = abs(value)
    for least, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= least:
            return f"{value / {'G': 1e9, 'M': 1e6, 'k': 1e3}[unit]:.3g}{unit}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def chart(title: str, curves: Sequence[Curve], doubling: bool = False) -> Markup:
    """A line chart, as an HTML figure: its title with the last value of a single curve, the curves, their names.

    doubling: the x axis is logarithmic, with a tick at each x, as for Matryoshka dims. Values that are not finite are
    left out. Empty if nothing is left.
    """
    curves = [_finite(curve) for curve in curves]
    curves = [curve for curve in curves if len(curve.x)]
    if not curves:
        return Markup("")
    xs = np.unique(np.concatenate([curve.x for curve in curves]))
    over = np.log2 if doubling else np.asarray
    low, high = over(xs[0]), over(xs[-1])
    bottom, top, y_ticks = _axis(np.concatenate([curve.y for curve in curves]))
    x_ticks = xs if doubling else [tick for tick in _ticks(xs[0], xs[-1]) if xs[0] <= tick <= xs[-1]]

    def across(x):
        return LEFT + ((over(x) - low) / (high - low) if high > low else 0.5 * np.ones_like(x)) * (RIGHT - LEFT)

    def up(y):
        return BOTTOM - (np.asarray(y) - bottom) / (top - bottom) * (BOTTOM - TOP)

    parts = [
        f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/><text x="{LEFT - 5}" y="{y + 3.5:.1f}" class="end">'
        f"{short(tick)}</text>"
        for tick, y in zip(y_ticks, up(y_ticks))
    ]
    parts += [f'<text x="{across(tick):.1f}" y="{HEIGHT - 7}" class="middle">{short(tick)}</text>' for tick in x_ticks]
    columns: dict[float, list[str]] = {}  # what the pointer finds over each x
    for number, curve in enumerate(curves):
        curve = curve if curve.dots else _thinned(curve, xs)
        at = list(zip(across(np.asarray(curve.x)), up(curve.y)))
        colour = f"c{number % COLOURS}"
        parts.append(f'<path class="line {colour}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in at)}"/>')
        if curve.dots or len(at) == 1:
            parts += [f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in at]
        for (x, _), step, value in zip(at, curve.x, curve.y):
            columns.setdefault(round(x, 1), [f"{step:,.0f}"]).append(f"{curve.name}: {value:.5g}")
    parts += _hover(columns)
    last = short(curves[0].y[-1]) if len(curves) == 1 else ""
    names = [curve.name for curve in curves] if len(curves) > 1 else []
    return _figure(title, last, f"0 0 {WIDTH} {HEIGHT}", parts, names)


def bars(title: str, rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str]) -> Markup:
    """Horizontal bars of scores between 0 and 1, as an HTML figure: for each (label, values), one bar a name."""
    thick = 9
    each = thick * len(names) + 7
    parts = []
    for row, (label, values) in enumerate(rows):
        y = row * each + 4
        parts.append(
            f'<text x="{LEFT - 5}" y="{y + thick * len(names) / 2 + 3.5:.1f}" class="end">{escape(label)}</text>'
        )
        for number, (name, value) in enumerate(zip(names, values)):
            length = max(0.0, min(1.0, value)) * (RIGHT - LEFT - 36)
            top = y + number * thick
            parts.append(
                f'<rect class="c{number}" x="{LEFT}" y="{top}" width="{length:.1f}" height="{thick - 1}">'
                f"<title>{escape(f'{label}, {name}: {value:.4f}')}</title></rect>"
                f'<text x="{LEFT + length + 4:.1f}" y="{top + 7.5:.1f}">{value:.3f}</text>'
            )
    return _figure(title, "", f"0 0 {WIDTH} {len(rows) * each + 4}", parts, names)


def chart_of_points(title: str, dots: Sequence[Dot], names: Sequence[str]) -> Markup:
    """A map without axes, as an HTML figure. The pointer shows a point's text; some points have theirs beside them.

    names: what each colour stands for.
    """
    places = np.array([(dot.x, dot.y) for dot in dots])
    low, high = places.min(axis=0), places.max(axis=0)
    places = 12 + (places - low) / np.maximum(high - low, 1e-9) * (MAP - 24)
    parts = [
        f'<circle class="c{dot.colour % COLOURS}{" hollow" * dot.hollow}" cx="{x:.1f}" cy="{y:.1f}" r="3.2">'
        f"<title>{escape(dot.text)}</title></circle>"
        for dot, (x, y) in zip(dots, places)
    ]
    for i in _apart(places, LABELS):
        x, y = places[i]
        side, away = ("end", -6) if x > MAP / 2 else ("start", 6)
        text = dots[i].text if len(dots[i].text) <= 28 else f"{dots[i].text[:27]}…"
        parts.append(f'<text class="label {side}" x="{x + away:.1f}" y="{y + 3:.1f}">{escape(text)}</text>')
    return _figure(title, "", f"0 0 {MAP} {MAP}", parts, names)


def _figure(title, last, box, parts, names):
    """names: what each colour stands for; empty where that is plain."""
    keys = "".join(f'<span class="c{number % COLOURS}">{escape(name)}</span>' for number, name in enumerate(names))
    return Markup(
        f"<figure><figcaption>{escape(title)}{f' <b>{last}</b>' if last else ''}</figcaption>"
        f'<svg viewBox="{box}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f"{f'<p class=keys>{keys}</p>' if keys else ''}</figure>"
    )


def _finite(curve):
    kept = [(x, y) for x, y in zip(curve.x, curve.y) if math.isfinite(y)]
    x, y = zip(*kept) if kept else ((), ())
    return curve._replace(x=np.array(x, float), y=np.array(y, float))


def _thinned(curve, xs):
    """The means of a curve within BINS equal parts of all x, if there are more values than that."""
    if len(xs) <= BINS:
        return curve
    which = np.minimum(((curve.x - xs[0]) / (xs[-1] - xs[0]) * BINS).astype(int), BINS - 1)
    used = np.unique(which)
    count = np.bincount(which)[used]
    return curve._replace(x=xs[0] + (used + 0.5) / BINS * (xs[-1] - xs[0]), y=np.bincount(which, curve.y)[used] / count)


def _axis(y):
    """(bottom, top, ticks) of the y axis."""
    low, high = float(y.min()), float(y.max())
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    ticks = _ticks(low, high)
    return ticks[0], ticks[-1], ticks


def _ticks(low, high):
    """Some round numbers from at most `low` to at least `high`."""
    if low == high:
        return np.array([low])
    rough = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough)
    return np.arange(math.floor(low / step), math.ceil(high / step) + 1) * step


def _hover(columns):
    """An unseen rectangle over each x, whose title a browser shows under the pointer."""
    xs = sorted(columns)
    edges = [LEFT, *((a + b) / 2 for a, b in zip(xs, xs[1:])), RIGHT]
    return [
        f'<rect class="hover" x="{left:.1f}" y="{TOP}" width="{max(0.1, right - left):.1f}" height="{BOTTOM - TOP}">'
        f"<title>{escape(chr(10).join(columns[x]))}</title></rect>"
        for x, left, right in zip(xs, edges, edges[1:])
    ]


def _apart(places, count):
    """The numbers of points that lie far from each other: each the farthest from those before it."""
    chosen = [int(np.argmin(((places - MAP / 2) ** 2).sum(axis=1)))]
    distance = np.full(len(places), np.inf)
    while len(chosen) < min(count, len(places)):
        distance = np.minimum(distance, ((places - places[chosen[-1]]) ** 2).sum(axis=1))
        chosen.append(int(np.argmax(distance)))
    return chosen
