"""A comparison as a picture: differences with their intervals, and the classes of a pair."""

from typing import Any

import numpy as np

from jaxrobust.evaluation.pairs import Paired
from tools.analyses import pictures
from tools.comparison.findings import INTERVAL, LEVEL, Findings, Pair
from tools.comparison.markdown import row, title

_INK, _APART, _PALE = "#1f4e79", "#d1495b", "#b9c4d0"
_NAMED = 40  # classes that have a name and an interval in the picture: more do not fit
_LABELS = 12  # names of classes that are told apart, where there are more


def draw(found: Findings) -> Any:
    """Return the figure.

    Raises:
      ValueError: matplotlib is not installed.
    """
    rows = _rows(found)
    one = found.pairs[0] if len(found.pairs) == 1 and len(found.pairs[0].classes) > 1 else None
    classes = min(len(one.classes), _NAMED // 2) if one else 0
    height = 1.6 + max(0.34 * len(rows), 0.18 * classes)
    figure = pictures.figure(title(found), 11.5 if one else 7, max(height, 3.2))
    panels = figure.subplots(1, 2 if one else 1, squeeze=False)[0]
    _forest(panels[0], rows, found)
    if one:
        _classes(panels[1], one)
    return figure


def _rows(found: Findings) -> list[tuple[str, Paired, bool]]:
    """Return label, comparison and whether it tells apart of each line, from above."""
    if len(found.pairs) == 1:
        steps = found.pairs[0].steps.items()
        return [(name, one, one.p < 1 - LEVEL) for name, one in steps]
    rows = []
    for pair in found.pairs:
        for what, one in (("clean", pair.clean), ("robust", pair.robust)):
            if one:
                rows.append((f"{pair.other} - {pair.first}, {what}", one.found, one.apart))
    return rows


def _forest(panel: Any, rows: list[tuple[str, Paired, bool]], found: Findings) -> None:
    for at, (_, one, apart) in enumerate(rows):
        _bar(panel, at, one, apart, 6, 2)
    panel.set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=8)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    what = "the other minus A" if len(found.pairs) > 1 else "B minus A"
    told = "red: told apart" if any(apart for _, _, apart in rows) else "none is told apart"
    panel.set_title(f"accuracy; {told}", fontsize=8)
    _axis(panel, f"{what}: points, with {INTERVAL}s")


def _bar(panel: Any, at: int, one: Paired, apart: bool, size: float, width: float) -> None:
    low, middle, high = (100 * value for value in (one.low, one.difference, one.high))
    colour = _APART if apart else _INK
    panel.plot([low, high], [at, at], color=colour, linewidth=width, solid_capstyle="butt")
    panel.plot([middle], [at], "o", color=colour, markersize=size)


def _axis(panel: Any, label: str) -> None:
    panel.axvline(0, color="black", linewidth=0.8, zorder=1)
    panel.grid(axis="x", color=_PALE, linewidth=0.5)
    panel.set_axisbelow(True)
    panel.set_xlabel(label, fontsize=8)
    panel.tick_params(axis="x", labelsize=8)
    panel.margins(x=0.06)


def _classes(panel: Any, pair: Pair) -> None:
    """Draw the classes of a pair, those that can be told apart in red."""
    each = pair.by_class
    order = np.argsort(-each.difference, kind="stable")
    apart = pair.p_by_class < 1 - LEVEL
    named = len(order) <= _NAMED
    if named:
        for line, index in enumerate(order):
            _bar(panel, line, row(pair, index), bool(apart[index]), 3.5, 1.2)
        size = 7 if len(order) <= _NAMED // 2 else 5
        panel.set_yticks(range(len(order)), [str(pair.classes[i]) for i in order], fontsize=size)
        panel.set_ylim(len(order) - 0.4, -0.6)
    else:
        for of, colour, size in ((~apart, _INK, 3), (apart, _APART, 7)):
            at = np.flatnonzero(of[order])
            panel.plot(100 * each.difference[order][at], at, ".", color=colour, markersize=size)
        for at in np.flatnonzero(apart[order])[:_LABELS]:
            place = 100 * each.difference[order[at]], at
            name = f" {pair.classes[order[at]]}"
            panel.annotate(name, place, (4, 0), textcoords="offset points", fontsize=7, va="center")
        panel.set_ylim(len(order), -1)
        panel.set_yticks([])
    panel.set_ylabel("class" if named else "classes, by their difference", fontsize=8)
    tested = f"red: told apart, corrected for all {len(order):,}"
    panel.set_title(
        f"class by class; {tested if apart.any() else 'none is told apart'}", fontsize=8
    )
    _axis(panel, f"B minus A: points{f', with {INTERVAL}s' if named else ''}")
