"""Drawing of a figure for one column of a paper: size, fonts, colors.

The palette is from Okabe and Ito (2008), for all kinds of color vision, without yellow, which is
hard to see on white paper. Markers and dashes distinguish series in gray too.
"""

import contextlib
import io
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from jaxrobust.papers.figures.contents import FigureContent, Series
from jaxrobust.results.plotting import plotting

WIDTH = 3.25  # inches: one column of a two-column paper
_SIZE = 8  # font size in points
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_DASHES: Any = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_LETTER = 0.058  # approximate width of a letter in a legend, inches
_OF_LEGEND = 46  # letters per line of a legend
_SPACING = 0.85  # line spacing of a text: the font's own is twice the height of its letters
_WRAPPED = 20  # letters per line of a network's name next to its row
_STYLE = {
    "font.family": "serif",
    "font.serif": ["STIXGeneral"],  # comes with matplotlib, and looks like Times
    "mathtext.fontset": "stix",
    "font.size": _SIZE,
    "axes.labelsize": _SIZE,
    "xtick.labelsize": _SIZE,
    "ytick.labelsize": _SIZE,
    "legend.fontsize": _SIZE,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.6,
    "pdf.fonttype": 42,  # embedded TrueType, as submission systems require
    "svg.hashsalt": "jaxrobust",  # equal figures give equal files
    "savefig.dpi": 300,
}
# No dates in files: the same records give the same bytes.
_METADATA: dict[str, dict[str, None]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}


def rendered(content: FigureContent, suffix: str) -> bytes:
    """Draw a figure and return the bytes of its PDF, SVG or PNG file, chosen by `suffix`."""
    with _style():
        figure = _DRAW[content.kind](content)
        file = io.BytesIO()
        figure.savefig(file, format=suffix, metadata=_METADATA.get(suffix))
    return file.getvalue()


@contextlib.contextmanager
def _style() -> Iterator[None]:
    plt = plotting()
    with plt.rc_context(_STYLE):
        yield
        plt.close("all")


def _figure(height: float) -> tuple[Any, Any]:
    figure = plotting().figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, hspace=0, wspace=0)
    return figure, figure.add_subplot()


def _attacks(content: FigureContent) -> Any:
    count, steps = len(content.series), len(content.ticks)
    labels = [_in_lines(tick, steps) for tick in content.ticks]
    figure, panel = _figure(2.0 + _legend_height(content.series))
    spacing = 0.45 / max(count, 4)  # distance of neighbors, so that their bars do not overlap
    for at, one in enumerate(content.series):
        xs = [x + spacing * (at - (count - 1) / 2) for x in content.places]
        values = [100 * value for value in one.values]
        below, above = ([abs(100 * end[i] - v) for end, v in zip(one.ends, values, strict=True)]
                        for i in (0, 1))  # fmt: skip
        panel.errorbar(
            *(xs, values, (below, above)),
            color=_COLOURS[at],
            marker=_MARKERS[at],
            linestyle="none",  # attacks have no order
            elinewidth=0.8,
            capsize=1.5,
            capthick=0.8,
        )
    panel.set_xticks(content.places, labels, linespacing=1.0)
    panel.set_xlim(-0.5, steps - 0.5)
    _accuracy(panel, content.series)
    _legend(figure, content.series, joined=False)
    return figure


def _radius(content: FigureContent, steps: bool = False) -> Any:
    """Draw a curve per series; with `steps`, a value also holds at smaller radii."""
    figure, panel = _figure(2.0 + _legend_height(content.series))
    for at, one in enumerate(content.series):
        there = [i for i, value in enumerate(one.values) if math.isfinite(value)]
        xs = [content.places[i] for i in there]
        low, high = ([100 * one.ends[i][side] for i in there] for side in (0, 1))
        stepped = steps and len(there) == len(one.values)  # a ladder next to it has few radii
        band: dict[str, Any] = {"step": "pre"} if stepped else {}
        panel.fill_between(xs, low, high, color=_COLOURS[at], alpha=0.18, linewidth=0, **band)
        panel.plot(
            *(xs, [100 * one.values[i] for i in there]),
            color=_COLOURS[at],
            marker=_MARKERS[at],
            linestyle=_DASHES[at],
            drawstyle="steps-pre" if stepped else "default",
            markevery=max(len(xs) // 6, 1) if stepped else 1,
        )
    panel.set_xlabel(content.axis)
    first, last = content.places[0], content.places[-1]
    panel.set_xlim(first - 0.02 * (last - first), last + 0.02 * (last - first))
    _accuracy(panel, content.series)
    _legend(figure, content.series)
    return figure


def _resolution(content: FigureContent) -> Any:
    """Draw the curves of `_radius` over the tested image sizes."""
    figure = _radius(content)
    figure.axes[0].set_xticks(content.places, content.ticks)
    return figure


def _compare(content: FigureContent) -> Any:
    count = len(content.series)
    names = ["\n".join(_wrapped(one.name)) for one in content.series]
    lines = sum(1 + name.count("\n") for name in names)
    figure, panel = _figure(0.5 + 0.12 * count + 0.1 * lines)
    for at, one in enumerate(content.series):
        low, high = (100 * end for end in one.ends[0])
        panel.plot([low, high], [at, at], color=_COLOURS[0], solid_capstyle="butt")
        panel.plot([100 * one.values[0]], [at], "o", color=_COLOURS[0])
    panel.set_yticks(range(count), names)
    for label in panel.get_yticklabels():
        label.set(parse_math=False, linespacing=_SPACING)
    panel.set_ylim(count - 0.4, -0.6)
    every = sorted({letter for letters in content.letters for letter in letters})
    for at, letters in enumerate(content.letters):
        for letter in letters:  # each in the column of its letter
            place = (1.03 + 0.04 * every.index(letter), at)
            panel.text(*place, letter, transform=panel.get_yaxis_transform(), va="center")
    panel.set_xlabel(content.axis)
    panel.grid(axis="x", color="0.85", linewidth=0.5)
    panel.set_axisbelow(True)
    return figure


_DRAW: dict[str, Callable[[FigureContent], Any]] = {
    "attacks": _attacks,
    "radius": _radius,
    "compare": _compare,
    "certified": partial(_radius, steps=True),
    "resolution": _resolution,
}


def _accuracy(panel: Any, series: Sequence[Series]) -> None:
    """Draw the accuracy axis, from 0 to the smallest multiple of 10 above all values."""
    highest = max(100 * end for one in series for _, end in one.ends if math.isfinite(end))
    top = min(100, 10 * math.ceil(highest / 10 + 0.05))
    panel.set_ylim(0, 1.02 * top)  # do not clip a marker at the top
    panel.set_ylabel("accuracy (%)")
    panel.grid(axis="y", color="0.85", linewidth=0.5)
    panel.set_axisbelow(True)


def _columns(series: Sequence[Series]) -> int:
    """Count the legend columns that fit without cutting a name."""
    longest = max(len(one.name) for one in series)
    return max(1, min(len(series), int((WIDTH - 0.1) / (0.5 + _LETTER * longest))))


def _legend_height(series: Sequence[Series]) -> float:
    if len(series) == 1:
        return 0.0
    lines = sum(len(textwrap.wrap(one.name, _OF_LEGEND)) for one in series)
    return 0.15 * math.ceil(lines / _columns(series)) + 0.05


def _legend(figure: Any, series: Sequence[Series], joined: bool = True) -> None:
    if len(series) == 1:
        return
    from matplotlib.lines import Line2D

    style: Any = _DASHES if joined else ["none"] * len(series)
    lines = [
        Line2D([], [], color=_COLOURS[at], marker=_MARKERS[at], linestyle=style[at])
        for at in range(len(series))
    ]
    legend = figure.legend(
        lines,
        [one.name for one in series],
        loc="outside upper center",
        ncols=_columns(series),
        frameon=False,
        handlelength=2.4,
        columnspacing=1.0,
        labelspacing=0.25,
        borderpad=0.1,
    )
    for text in legend.get_texts():
        name = "\n".join(textwrap.wrap(text.get_text(), _OF_LEGEND))
        text.set(parse_math=False, text=name, linespacing=_SPACING)


def _wrapped(name: str) -> list[str]:
    """Break the name of a row into at most two lines; a name without blanks is cut too."""
    lines = textwrap.wrap(name, _WRAPPED) or [""]
    return lines if len(lines) <= 2 else [lines[0], lines[1][: _WRAPPED - 1] + "…"]


def _in_lines(tick: str, steps: int) -> str:
    """Break the name of an attack if it would touch its neighbors."""
    return tick.replace(" ", "\n", 1) if len(tick) > 30 // steps else tick
