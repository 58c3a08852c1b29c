"""Figures as SVG, each with its data as JSON: curves, rows of values, matrices of counts.

A figure is 340 units wide, so that its text is readable on a phone. The script of the page reads
the JSON, and shows values under the pointer or as the arrow keys move.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from jaxrobust.report.markup import parts

_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 330, 8, 158  # of curves
_NAMES, _ROW = 118, 17  # rows: start of their axis, and height of one
_COLOURS = 6  # of the style sheet; lines after the sixth are dashed
_MARKS = 40  # maximum number drawn in a figure
CLASSES = 15  # maximum number in a matrix that is readable on a phone
_CELLS_LEFT, _CELLS_TOP, _SIDE = 78, 6, 254  # of a matrix
_NUMBERS = 11  # maximum number of classes for counts to fit in cells
_LEVELS = 6  # of color
_LETTER = 6.2  # average width


class Line(NamedTuple):
    """A curve, interrupted where y is not finite."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None  # ends of intervals
    high: Sequence[float] | None = None


class Bar(NamedTuple):
    """A value with its interval, and perhaps a second value next to it."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    second: float | None = None
    strong: bool = False  # highlighted, such as a significant difference


class Mark(NamedTuple):
    """An event at a position on the x axis."""

    at: float
    text: str
    harmless: bool = False  # drawn in gray


class Axis(NamedTuple):
    """The settings of an axis; percentages are given as fractions."""

    label: str
    percent: bool = False
    log: bool = False
    low: float | None = None  # ends, if they are fixed
    high: float | None = None


def spelled(value: float | None, percent: bool = False) -> str:
    """Format a value for people."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if percent:
        return f"{100 * value:.4g}%"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def lines(
    identity: str,
    title: str,
    curves: Sequence[Line],
    x: Axis,
    y: Axis,
    *,
    marks: Sequence[Mark] = (),
    note: str = "",
) -> Markup:
    """Return a figure of curves, with events as dashed lines."""
    if not any(_drawable(b, y) for c in curves for b in c.y):
        return parts.empty(title, "positive and finite" if y.log else "finite", note)
    xs = [v for c in curves for v in c.x if math.isfinite(v)]
    ys = [v for c in curves for part in (c.y, c.low or (), c.high or ()) for v in part]
    fx, fy = _frame(x, xs, _LEFT, _RIGHT), _frame(y, ys, _BOTTOM, _TOP)
    data = {"kind": "lines", "title": title, "x": x.label, "y": y.label, "percent": y.percent}
    data |= {"frame": {"x": fx, "y": fy, "top": _TOP, "bottom": _BOTTOM}}
    data |= {"series": [c._asdict() for c in curves], "marks": [[m.at, m.text] for m in marks]}
    alt = []
    for curve in curves[:8]:
        if finite := [v for v in curve.y if math.isfinite(v)]:
            values = (finite[0], finite[-1], min(finite), max(finite))
            first, last, low, high = (spelled(v, y.percent) for v in values)
            at = f"begins at {first}, ends at {last}, lowest {low}, highest {high}"
            alt.append(f"{curve.name} {at}")
    drawn = []
    for number, curve in enumerate(curves):
        style = f"line c{number % _COLOURS + 1}{' dashed' if number >= _COLOURS else ''}"
        drawn.append({"name": curve.name, "style": style} | _paths(curve, fx, fy))
    return parts.lines(
        *(identity, title, _numbers(fx, x), _numbers(fy, y), x.label),
        *([(fx(mark.at), mark.harmless) for mark in marks[:_MARKS]], drawn),
        *("; ".join(alt) + _more(len(curves) - 8), data, note),
    )


def rows(
    identity: str,
    title: str,
    values: Sequence[Bar],
    x: Axis,
    *,
    names: tuple[str, str] = ("", ""),
    note: str = "",
) -> Markup:
    """Return a figure with a line for each value, its interval, and a second value as a ring."""
    if not any(_drawable(v, x) for r in values for v in (r.value, r.second)):
        return parts.empty(title, "known" if values else "there", note)
    fx = _frame(x, [v for r in values for v in r[1:5] if v is not None], _NAMES, _RIGHT)
    top, bottom = 6, 6 + _ROW * len(values)
    data = {"kind": "rows", "title": title, "x": x.label, "percent": x.percent, "names": names}
    data |= {"frame": {"x": fx, "top": top, "row": _ROW, "bottom": bottom}}
    data |= {"rows": [r._asdict() for r in values]}
    alt = "; ".join(f"{r.name} {spelled(r.value, x.percent)}" for r in values[:12])
    bars = []
    for row in values:
        finite = row.value is not None and math.isfinite(row.value)
        ends = [f"{fx(end):.1f}" for end in (row.low, row.high) if end is not None]
        bars.append({
            "name": row.name if len(row.name) <= 18 else f"{row.name[:17]}…",
            "strong": row.strong,
            "ends": ends if len(ends) == 2 else None,
            "second": None if row.second is None else f"{fx(row.second):.1f}",
            "value": f"{fx(row.value or 0):.1f}" if finite else None,
        })  # fmt: skip
    about = (alt + _more(len(values) - 12), data, note)
    return parts.rows(identity, title, _numbers(fx, x), x.label, bars, bottom, names, *about)


def cells(
    identity: str, title: str, names: Sequence[str], counts: np.ndarray, *, alt: str, note: str
) -> Markup:
    """Return a figure of counts i[K, K] of K <= `CLASSES` classes, rows over columns."""
    size = _SIDE / len(names)
    levels = -(-_LEVELS * counts // max(counts.max(initial=0), 1))
    shades, numbers = [], []
    for level in range(1, _LEVELS + 1):
        path = "".join(
            f"M{_CELLS_LEFT + size * column:.1f} {_CELLS_TOP + size * row:.1f}"
            f"h{size:.1f}v{size:.1f}h{-size:.1f}z"
            for row, column in np.argwhere(levels == level).tolist()
        )
        if path:
            shades.append((path, f"{0.5 * level / _LEVELS:.2f}"))  # keeps the number readable
    if len(names) <= _NUMBERS:
        for row, column in np.argwhere(counts > 0).tolist():
            x, y = _CELLS_LEFT + size * (column + 0.5), _CELLS_TOP + size * (row + 0.5)
            count = f"{counts[row, column]}" if counts[row, column] < 1000 else "1k+"
            numbers.append((f"{x:.1f}", f"{y:.1f}", count))
    short = [name if len(name) <= 11 else f"{name[:10]}…" for name in names]
    places = [(size * (at + 0.5), name) for at, name in enumerate(short)]
    grid = "".join(
        f"M{_CELLS_LEFT} {_CELLS_TOP + size * at:.1f}h{_SIDE}"
        f"M{_CELLS_LEFT + size * at:.1f} {_CELLS_TOP}v{_SIDE}"
        for at in range(len(names) + 1)
    )
    frame = {"left": _CELLS_LEFT, "top": _CELLS_TOP, "cell": size}
    data = {"kind": "cells", "title": title, "names": names, "counts": counts, "frame": frame}
    below = math.ceil(_CELLS_TOP + _SIDE + 10 + _LETTER * max(map(len, short)))
    return parts.cells(identity, title, shades, places, numbers, grid, below, alt, data, note)


class _Frame(NamedTuple):
    """The mapping from an axis's values to positions in the picture."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        a, b, v = (math.log10(q) if self.log else q for q in (self.low, self.high, value))
        return self.start + (v - a) / (b - a) * (self.end - self.start)


def _drawable(value: float | None, axis: Axis) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not axis.log)


def _frame(axis: Axis, values: Sequence[float], start: float, end: float) -> _Frame:
    finite = [v for v in values if _drawable(v, axis)]
    low = axis.low if axis.low is not None else min(finite, default=0.0)
    high = axis.high if axis.high is not None else max(finite, default=1.0)
    if axis.low is None and not axis.log and 0 < low < 0.4 * high:
        low = 0.0  # values that start near zero are drawn from zero
    if not high > low:
        low, high = (low / 2, high * 2) if axis.log and low > 0 else (low - 0.5, high + 0.5)
    return _Frame(low, high, start, end, axis.log and low > 0)


def _numbers(frame: _Frame, axis: Axis) -> list[tuple[float, str]]:
    return [(frame(value), _short(value, axis.percent)) for value in _ticks(frame)]


def _ticks(frame: _Frame) -> list[float]:
    if frame.log:
        first, last = math.ceil(math.log10(frame.low)), math.floor(math.log10(frame.high))
        if last - first >= 1:
            step = max(1, math.ceil((last - first) / 4))
            return [10.0**power for power in range(first, last + 1, step)]
    rough = (frame.high - frame.low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * 0.999)
    first, last = math.ceil(frame.low / apart - 1e-9), math.floor(frame.high / apart + 1e-9)
    return [number * apart for number in range(first, last + 1)]


def _short(value: float, percent: bool) -> str:
    value = 100 * value if percent else value
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    if 0 < abs(value) < 0.001:
        tiny = abs(value) < 1e-4
        digits, exponent = f"{value:.2g}".split("e") if tiny else (f"{value * 1e4:.3g}", "-4")
        return f"{digits}e{int(exponent)}"
    return f"{value:.3g}{'%' if percent else ''}"


def _paths(curve: Line, fx: _Frame, fy: _Frame) -> dict[str, Any]:
    path, pen, places = [], "M", []
    for a, b in zip(curve.x, curve.y, strict=True):
        if not math.isfinite(b) or (fy.log and b <= 0):
            pen = "M"
            continue
        places.append(f"{fx(a):.1f} {fy(b):.1f}")
        path.append(f"{pen}{places[-1]}")
        pen = "L"
    interval = None
    if curve.low is not None and curve.high is not None:
        interval = "".join(
            f"M{fx(a):.1f} {fy(b):.1f}V{fy(c):.1f}"
            for a, b, c in zip(curve.x, curve.low, curve.high, strict=True)
            if math.isfinite(b) and math.isfinite(c)
        )
    dots = "".join(f"M{place}h0" for place in places) if len(places) <= 30 else None
    return {"path": "".join(path), "interval": interval, "dots": dots}


def _more(count: int) -> str:
    return f"; and {count} more" if count > 0 else ""
