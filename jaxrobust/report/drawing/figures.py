"""Figures as SVG, each with its data as JSON beside it: curves over an axis, and rows of values.

A figure is 340 units wide, so that its letters can be read on a telephone. The script of the page
reads the JSON, and says the values where somebody points or moves the arrow keys.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxrobust.report.drawing.markup import Html, data, remark, tag

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 340, 44, 10, 8, 158
_COLOURS = 6  # of the style sheet; lines behind the sixth are dashed
_MARKS = 40  # that are drawn in a figure
_ROW = 17


class Line(NamedTuple):
    """A curve; y that is not finite interrupts it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None  # ends of intervals
    high: Sequence[float] | None = None


class Bar(NamedTuple):
    """A value with its interval, and perhaps a second value beside it."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    second: float | None = None
    strong: bool = False  # stands out, such as a difference that is told apart


class Mark(NamedTuple):
    """A place of x at which something happened, and what."""

    at: float
    text: str
    harmless: bool = False  # drawn in grey


class Axis(NamedTuple):
    """What an axis says; a percentage is given as a fraction."""

    label: str
    percent: bool = False
    log: bool = False
    low: float | None = None  # ends, where they are fixed
    high: float | None = None


def spelled(value: float | None, percent: bool = False) -> str:
    """Return a value for people."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if percent:
        return f"{100 * value:.4g} %"
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
) -> Html:
    """Return a figure of curves, with what happened on the way as dashed lines."""
    if not any(_drawable(b, y) for c in curves for b in c.y):
        return _empty(title, "positive and finite" if y.log else "finite", note)
    xs = [v for c in curves for v in c.x if math.isfinite(v)]
    ys = [v for c in curves for part in (c.y, c.low or (), c.high or ()) for v in part]
    fx, fy = _frame(x, xs, _LEFT, _WIDTH - _RIGHT), _frame(y, ys, _BOTTOM, _TOP)
    parts = [_grid(fx, fy, x, y)]
    for mark in marks[:_MARKS]:
        style = "mark harmless" if mark.harmless else "mark"
        parts.append(tag("path", d=f"M{fx(mark.at):.1f} {_TOP}V{_BOTTOM}", class_=style))
    for number, curve in enumerate(curves):
        parts += _drawn(curve, _style(number), fx, fy)
    content = {"kind": "lines", "title": title, "x": x.label, "y": y.label, "percent": y.percent}
    content |= {"frame": {"x": fx, "y": fy, "top": _TOP, "bottom": _BOTTOM}}
    content |= {"series": [c._asdict() for c in curves], "marks": [[m.at, m.text] for m in marks]}
    legend = [tag("li", _swatch(n), c.name) for n, c in enumerate(curves) if len(curves) > 1]
    alt = _summary(curves, y)
    return figure(identity, title, parts, _BOTTOM + 34, content, alt, legend, note)


def _drawable(value: float | None, axis: Axis) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not axis.log)


def _empty(title: str, kind: str, note: str) -> Html:
    sentence = f"There is nothing to draw: no value is {kind}."
    return tag("figure", tag("figcaption", title), tag("p", sentence), remark(note))


class _Frame(NamedTuple):
    """Where the values of an axis lie in the picture."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        a, b, v = (math.log10(q) if self.log else q for q in (self.low, self.high, value))
        return self.start + (v - a) / (b - a) * (self.end - self.start)


def _frame(axis: Axis, values: Sequence[float], start: float, end: float) -> _Frame:
    finite = [v for v in values if math.isfinite(v) and (v > 0 or not axis.log)]
    low = axis.low if axis.low is not None else min(finite, default=0.0)
    high = axis.high if axis.high is not None else max(finite, default=1.0)
    if axis.low is None and not axis.log and 0 < low < 0.4 * high:
        low = 0.0  # what grows from near zero is drawn from zero
    if not high > low:
        low, high = (low / 2, high * 2) if axis.log and low > 0 else (low - 0.5, high + 0.5)
    return _Frame(low, high, start, end, axis.log and low > 0)


def _ticks(frame: _Frame, most: int) -> list[float]:
    if frame.log:
        first, last = math.ceil(math.log10(frame.low)), math.floor(math.log10(frame.high))
        if last - first >= 1:
            step = max(1, math.ceil((last - first) / most))
            return [10.0**power for power in range(first, last + 1, step)]
    rough = (frame.high - frame.low) / most
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
    return f"{value:.3g}{' %' if percent else ''}"


def _grid(fx: _Frame, fy: _Frame, x: Axis, y: Axis) -> Html:
    parts = []
    for value in _ticks(fy, 4):
        at = f"{fy(value):.1f}"
        parts.append(tag("path", d=f"M{_LEFT} {at}H{_WIDTH - _RIGHT}", class_="grid"))
        text = _short(value, y.percent)
        parts.append(tag("text", text, x=_LEFT - 4, y=at, dy="0.35em", class_="end"))
    parts += [tag("path", d=f"M{fx(v):.1f} {_BOTTOM}v3", class_="axis") for v in _ticks(fx, 4)]
    parts += _numbers(fx, x, _BOTTOM + 14)
    parts.append(tag("path", d=f"M{_LEFT} {_BOTTOM}H{_WIDTH - _RIGHT}", class_="axis"))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(tag("text", x.label, x=middle, y=_BOTTOM + 29, class_="middle"))
    return tag("g", parts, aria_hidden="true")


def _numbers(fx: _Frame, x: Axis, y: float) -> Iterator[Html]:
    """Yield the numbers below an axis; the last one stays in the picture."""
    for value in _ticks(fx, 4):
        place, text = fx(value), _short(value, x.percent)
        if place > _WIDTH - 22:
            yield tag("text", text, x=_WIDTH - 1, y=y, class_="end")
        else:
            yield tag("text", text, x=f"{place:.1f}", y=y, class_="middle")


def _drawn(curve: Line, style: str, fx: _Frame, fy: _Frame) -> list[Html]:
    path, pen, places = [], "M", []
    for a, b in zip(curve.x, curve.y, strict=True):
        if not math.isfinite(b) or (fy.log and b <= 0):
            pen = "M"
            continue
        places.append((fx(a), fy(b)))
        path.append(f"{pen}{places[-1][0]:.1f} {places[-1][1]:.1f}")
        pen = "L"
    parts = []
    if curve.low is not None and curve.high is not None:
        ends = "".join(
            f"M{fx(a):.1f} {fy(b):.1f}V{fy(c):.1f}"
            for a, b, c in zip(curve.x, curve.low, curve.high, strict=True)
            if math.isfinite(b) and math.isfinite(c)
        )
        parts.append(tag("path", d=ends, class_=f"{style} interval"))
    parts.append(tag("path", d="".join(path), class_=style))
    if len(places) <= 30:
        dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in places)
        parts.append(tag("path", d=dots, class_=f"{style} dots"))
    return parts


def _summary(curves: Sequence[Line], y: Axis) -> str:
    parts = []
    for curve in curves[:8]:
        finite = [v for v in curve.y if math.isfinite(v)]
        if finite:
            values = (finite[0], finite[-1], min(finite), max(finite))
            first, last, low, high = (spelled(v, y.percent) for v in values)
            at = f"begins at {first}, ends at {last}, lowest {low}, highest {high}"
            parts.append(f"{curve.name} {at}")
    more = f"; and {len(curves) - 8} more" if len(curves) > 8 else ""
    return "; ".join(parts) + more


def rows(
    identity: str,
    title: str,
    values: Sequence[Bar],
    x: Axis,
    *,
    names: tuple[str, str] = ("", ""),
    note: str = "",
) -> Html:
    """Return a figure with a line for each value, its interval, and a second value as a ring."""
    if not any(_drawable(v, x) for r in values for v in (r.value, r.second)):
        return _empty(title, "known" if values else "there", note)
    fx = _frame(x, [v for r in values for v in r[1:5] if v is not None], 118, _WIDTH - _RIGHT)
    bottom = 6 + _ROW * len(values)
    parts = [_rows_grid(fx, x, bottom)]
    for number, row in enumerate(values):
        parts += _row(row, 6 + _ROW * number + _ROW / 2, fx)
    content = {"kind": "rows", "title": title, "x": x.label, "percent": x.percent, "names": names}
    content |= {"frame": {"x": fx, "top": 6, "row": _ROW, "bottom": bottom}}
    content |= {"rows": [r._asdict() for r in values]}
    alt = "; ".join(f"{r.name} {spelled(r.value, x.percent)}" for r in values[:12])
    more = f"; and {len(values) - 12} more" if len(values) > 12 else ""
    legend = [
        tag("li", tag("span", sign, class_="sign", aria_hidden="true"), name)
        for sign, name in zip("●○", names, strict=True)
        if name
    ]
    return figure(identity, title, parts, bottom + 34, content, alt + more, legend, note)


def _rows_grid(fx: _Frame, x: Axis, bottom: float) -> Html:
    parts = []
    for value in _ticks(fx, 4):
        zero = " zero" if value == 0 else ""
        parts.append(tag("path", d=f"M{fx(value):.1f} 6V{bottom}", class_=f"grid{zero}"))
    label = tag("text", x.label, x=_WIDTH - _RIGHT, y=bottom + 28, class_="end")
    return tag("g", parts, *_numbers(fx, x, bottom + 13), label, aria_hidden="true")


def _row(row: Bar, y: float, fx: _Frame) -> list[Html]:
    name = row.name if len(row.name) <= 18 else f"{row.name[:17]}…"
    style = "c2" if row.strong else "c1"
    parts = [tag("text", name, x=2, y=y, dy="0.35em", class_="start", aria_hidden="true")]
    if row.low is not None and row.high is not None:
        ends = f"M{fx(row.low):.1f} {y}H{fx(row.high):.1f}"
        parts.append(tag("path", d=ends, class_=f"line {style} interval"))
    if row.second is not None:
        parts.append(tag("circle", cx=f"{fx(row.second):.1f}", cy=y, r=3.5, class_="ring"))
    if row.value is not None and math.isfinite(row.value):
        parts.append(tag("circle", cx=f"{fx(row.value):.1f}", cy=y, r=3.5, class_=f"dot {style}"))
    return parts


def _style(number: int) -> str:
    return f"line c{number % _COLOURS + 1}{' dashed' if number >= _COLOURS else ''}"


def _swatch(number: int) -> Html:
    path = tag("path", d="M0 5H22", class_=_style(number))
    return tag("svg", path, viewBox="0 0 22 10", class_="swatch", aria_hidden="true")


def figure(
    identity: str,
    title: str,
    parts: list[Html],
    height: float,
    content: dict[str, Any],
    alt: str,
    legend: list[Html],
    note: str,
) -> Html:
    """Return a picture with title, legend, note, and the data that `kind` of the script reads."""
    cursor, box = tag("path", d="", class_="cursor"), f"0 0 {_WIDTH} {height:g}"
    about = {"role": "img", "tabindex": 0, "aria_label": f"{title}. {alt}"}
    return tag(
        "figure",
        tag("figcaption", title),
        tag("svg", parts, cursor, viewBox=box, **about),
        tag("ul", legend, class_="legend") if legend else None,
        tag("output", ""),
        remark(note),
        data(f"data-{identity}", content),
        id=identity,
    )
