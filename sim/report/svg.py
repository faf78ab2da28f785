"""Plots as inline SVG: no library, no script. Colours are classes, which the page's style sheet
sets for light and dark, and every plot says in words what it shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

from sim.report.scales import Scale

Floats = npt.NDArray[np.float64]

WIDTH, HEIGHT = 480, 270  # of a plot with axes
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 28, 52
_INNER_WIDTH, _INNER_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

ROW, GAP = 14, 2  # of a heat strip
_MOST_ROWS, LEVELS = 64, 8


@dataclass(frozen=True, slots=True)
class Series:
    """A line through points with ascending `xs`; NaN in `ys` interrupts it."""

    name: str
    xs: Floats
    ys: Floats


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line, such as an SLO."""

    at: float
    name: str


def lines(
    title: str, says: str, series: Sequence[Series], x: Scale, y: Scale, marks: Sequence[Mark] = ()
) -> str:
    """`says`: the plot in a sentence or two, for those who cannot see it."""
    body = [*_axes(x, y)]
    for mark in marks:
        at = _px(x, mark.at)
        body.append(f'<line class="mark" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        anchor, shift = ("end", -5) if x.place(mark.at) > 0.6 else ("start", 5)
        body.append(_text(at + shift, HEIGHT - BOTTOM - 8, mark.name, anchor, "mark-name"))
    for number, one in enumerate(series):
        body.append(f'<path class="line s{number % 4}" d="{_path(one, x, y)}"/>')
    plot = _svg(title, says, WIDTH, HEIGHT, body)
    return plot if len(series) < 2 else _legend([one.name for one in series]) + plot


def heat(title: str, says: str, names: Sequence[str], shares: Floats, x: Scale) -> str:
    """A row for each name, from left to right in time; `shares [names, times]` in 0..1, NaN where
    there was nothing. Many rows are joined, a row then shows the mean of its neighbours."""
    names, shares = _joined(names, shares)
    height = len(names) * (ROW + GAP) + BOTTOM
    width = _INNER_WIDTH / max(1, shares.shape[1])
    body = []
    levels = np.ceil(np.clip(np.nan_to_num(shares, nan=-1.0), -1, 1) * LEVELS).astype(int)
    for level in range(LEVELS + 1):
        cells = "".join(
            f"M{LEFT + column * width:.1f} {row * (ROW + GAP)}h{length * width:.1f}v{ROW}"
            f"h{-length * width:.1f}z"
            for row in range(len(names))
            for column, length in _runs(levels[row] == level)
        )
        if cells:
            body.append(f'<path class="heat" style="--level:{level / LEVELS}" d="{cells}"/>')
    for row, name in enumerate(names):
        if len(names) <= 24 or row % 4 == 0:
            body.append(_text(LEFT - 6, row * (ROW + GAP) + 12, name, "end"))
    bottom = height - BOTTOM
    for tick in x.ticks():
        body.append(_text(_px(x, tick), bottom + 18, x.text(tick), "middle"))
    body.append(_text(LEFT + _INNER_WIDTH / 2, bottom + 40, x.label, "middle", "label"))
    return _svg(title, says, WIDTH, height, body)


def _joined(names: Sequence[str], shares: Floats) -> tuple[Sequence[str], Floats]:
    if len(names) <= _MOST_ROWS:
        return names, shares
    parts = np.array_split(np.arange(len(names)), _MOST_ROWS)
    counts = np.array([(~np.isnan(shares[part])).sum(axis=0) for part in parts])
    sums = np.array([np.nansum(shares[part], axis=0) for part in parts])
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return [f"{names[part[0]]}…" for part in parts], means


def _runs(wanted: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """First column and length of each stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], wanted, [False])).astype(np.int8)))
    for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield begin, end - begin


def _axes(x: Scale, y: Scale) -> Iterator[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for tick in y.ticks(5):
        at = _py(y, tick)
        yield f'<line class="rule" x1="{LEFT}" x2="{right}" y1="{at}" y2="{at}"/>'
        yield _text(LEFT - 6, at + 4, y.text(tick), "end")
    for tick in x.ticks():
        at = _px(x, tick)
        yield f'<line class="rule" x1="{at}" x2="{at}" y1="{TOP}" y2="{bottom}"/>'
        yield _text(at, bottom + 18, x.text(tick), "end" if x.place(tick) > 0.97 else "middle")
    yield f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>'
    yield _text(LEFT + _INNER_WIDTH / 2, HEIGHT - 10, x.label, "middle", "label")
    yield _text(4, 16, y.label, "start", "label")


def _path(series: Series, x: Scale, y: Scale) -> str:
    parts, pen_down = [], False
    for at, value in zip(series.xs.tolist(), series.ys.tolist(), strict=True):
        if value != value:
            pen_down = False
            continue
        parts.append(f"{'L' if pen_down else 'M'}{_px(x, at)} {_py(y, value)}")
        pen_down = True
    return "".join(parts)


def _px(x: Scale, value: float) -> float:
    return round(LEFT + x.place(value) * _INNER_WIDTH, 1)


def _py(y: Scale, value: float) -> float:
    return round(TOP + (1 - y.place(value)) * _INNER_HEIGHT, 1)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(text)}</text>'


def _legend(names: Iterable[str]) -> str:
    items = (
        '<li><svg viewBox="0 0 28 8" aria-hidden="true">'
        f'<path class="line s{number % 4}" d="M0 4H28"/></svg>{escape(name)}</li>'
        for number, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _svg(title: str, says: str, width: int, height: int, body: Iterable[str]) -> str:
    alt = escape(f"{title}. {says}")
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{alt}">{"".join(body)}</svg>'
    )
