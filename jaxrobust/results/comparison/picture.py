"""The picture of a comparison, and its three files: its text, its numbers, this picture."""

import io
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxrobust.evaluation.records.pairs import Paired
from jaxrobust.results import plotting
from jaxrobust.results.comparison import comparison_markdown
from jaxrobust.results.comparison.comparison_findings import (
    LEVEL,
    ComparisonFindings,
    Pair,
)
from jaxrobust.results.comparison.comparison_markdown import row, title
from jaxrobust.results.comparison.evaluations import letter
from jaxrobust.runtime.files import jsonl, whole

_INK, _APART, _PALE = "#1f4e79", "#d1495b", "#b9c4d0"
_NAMED = 40  # classes that have a name and an interval in the picture: more do not fit
_WIDTH = 44  # letters of a network's name in a line
_LABELS = 12  # names of classes that are told apart, where there are more


def draw(findings: ComparisonFindings) -> Any:
    """Draw of two networks their attacks and classes, of several their differences."""
    if len(findings.pairs) > 1:
        return _several(findings)
    pair = findings.pairs[0]
    lines = [(name, one, one.p < 1 - LEVEL) for name, one in pair.steps.items()]
    wide = len(pair.classes) > 1
    classes = min(len(pair.classes), _NAMED // 2) if wide else 0
    height = max(1.6 + max(0.34 * len(lines), 0.18 * classes), 3.2)
    figure = plotting.figure(title(findings), 11.5 if wide else 7, height)
    panels = figure.subplots(1, 1 + wide, squeeze=False)[0]
    axis = f"B minus A: points, with {findings.interval}s"
    _forest(panels[0], "accuracy", lines, axis)
    if wide:
        _classes(panels[1], pair, axis)
    return figure


def _several(findings: ComparisonFindings) -> Any:
    kinds = ("robust", "clean") if findings.pairs[0].robust else ("clean",)
    height = max(1.4 + 0.24 * len(findings.pairs), 3.0)
    figure = plotting.figure(title(findings), 3.5 + 4 * len(kinds), height)
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    labels = [f"{letter(at)}: {one.label}" for at, one in enumerate(findings.evaluations)][1:]
    shown = ["\n".join(textwrap.wrap(label, _WIDTH)[:2]) for label in labels]
    for panel, kind in zip(panels, kinds, strict=True):
        differences = [getattr(pair, kind) for pair in findings.pairs]
        lines = [(name, d.paired, d.apart) for name, d in zip(shown, differences, strict=True)]
        axis = f"minus A: points, with {findings.interval}s"
        _forest(panel, f"{kind} accuracy", lines, axis)
    return figure


def _forest(panel: Any, what: str, lines: list[tuple[str, Paired, bool]], axis: str) -> None:
    for at, (_, one, apart) in enumerate(lines):
        _bar(panel, at, one, apart, 5, 2)
    panel.set_yticks(range(len(lines)), [name for name, _, _ in lines], fontsize=7.5)
    panel.set_ylim(len(lines) - 0.4, -0.6)
    legend = "red: told apart" if any(apart for _, _, apart in lines) else "none is told apart"
    panel.set_title(f"{what}; {legend}", fontsize=8)
    _axis(panel, axis)


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


def _classes(panel: Any, pair: Pair, axis: str) -> None:
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
    verdict = tested if apart.any() else "none is told apart"
    panel.set_title(f"class by class; {verdict}", fontsize=8)
    _axis(panel, axis if named else axis.partition(",")[0])


def write(out: Path, name: str, comparison: ComparisonFindings, plain: dict[str, Any]) -> None:
    """Write the three files, each of them whole."""
    document = comparison_markdown.document(comparison, f"{name}.png")
    save(out, name, plain, lambda: draw(comparison), document)


def save(
    out: Path, name: str, plain: dict[str, Any], drawn_by: Callable[[], Any], document: str
) -> None:
    """Write a text, numbers and a picture; refuse a folder with those of other evaluations."""
    text, table, drawn = (out / f"{name}.{kind}" for kind in ("md", "json", "png"))
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if table.exists() and _compares(table) != _files(plain):
        raise ValueError(f"{table} compares other evaluations; name another folder with --out")
    image = io.BytesIO()
    drawn_by().savefig(image, dpi=130, format="png")
    out.mkdir(parents=True, exist_ok=True)
    with whole.writing(drawn) as part:
        part.write_bytes(image.getvalue())
    jsonl.replace(table, json.dumps(plain, indent=1) + "\n")
    jsonl.replace(text, document)


def _compares(table: Path) -> list[tuple[str, ...]] | None:
    try:
        return _files(json.loads(table.read_text()))
    except (ValueError, KeyError, TypeError):
        return None


def _files(plain: dict[str, Any]) -> list[tuple[str, ...]]:
    keys = ("file", "evaluation", "group")  # a group only where there are groups
    return [tuple(one[key] for key in keys if key in one) for one in plain["evaluations"]]
