"""The picture of a comparison of networks or groups, and the files: text, numbers, picture."""

import io
import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from jaxrobust.evaluation.records.comparisons import Paired
from jaxrobust.results import plotting
from jaxrobust.results.comparison import comparison_findings, comparison_markdown, groups
from jaxrobust.results.comparison.comparison_findings import (
    INTERVAL,
    LEVEL,
    ComparisonFindings,
    Pair,
)
from jaxrobust.results.comparison.comparison_markdown import images_line, row, title
from jaxrobust.results.comparison.evaluations import letter
from jaxrobust.results.comparison.group_tests import Over
from jaxrobust.results.comparison.groups import GroupDifference, GroupFindings
from jaxrobust.runtime.files import jsonl, whole

_INK, _APART, _PALE = "#1f4e79", "#d1495b", "#b9c4d0"
_NAMED = 40  # maximum number of classes shown with name and interval
_WIDTH = 44  # characters per line of a network's name
_LABELS = 12  # maximum number of names of classes told apart, with more than `_NAMED` classes


def draw(findings: ComparisonFindings) -> Any:
    """Draw attacks and classes of two networks, or the differences of several."""
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


def _forest(panel: Any, accuracy: str, lines: list[tuple[str, Paired, bool]], axis: str) -> None:
    for at, (_, one, apart) in enumerate(lines):
        _bar(panel, at, one, apart, 5, 2)
    panel.set_yticks(range(len(lines)), [name for name, _, _ in lines], fontsize=7.5)
    panel.set_ylim(len(lines) - 0.4, -0.6)
    legend = "red: significant" if any(apart for _, _, apart in lines) else "none is significant"
    panel.set_title(f"{accuracy}; {legend}", fontsize=8)
    _axis(panel, axis)


def _bar(panel: Any, at: int, one: Paired | Over, apart: bool, size: float, width: float) -> None:
    low, middle, high = (100 * value for value in (one.low, one.difference, one.high))
    colour = _APART if apart else _INK
    panel.plot([low, high], [at, at], color=colour, linewidth=width, solid_capstyle="butt")
    panel.plot([middle], [at], "o", color=colour, markersize=size)


def _axis(panel: Any, label: str, *, zero: bool = True) -> None:
    if zero:
        panel.axvline(0, color="black", linewidth=0.8, zorder=1)
    panel.grid(axis="x", color=_PALE, linewidth=0.5)
    panel.set_axisbelow(True)
    panel.set_xlabel(label, fontsize=8)
    panel.tick_params(axis="x", labelsize=8)
    panel.margins(x=0.06)


def _classes(panel: Any, pair: Pair, axis: str) -> None:
    by_class = pair.by_class
    order = np.argsort(-by_class.difference, kind="stable")
    apart = pair.p_by_class < 1 - LEVEL
    has_names = len(order) <= _NAMED
    if has_names:
        for line, index in enumerate(order):
            _bar(panel, line, row(pair, index), bool(apart[index]), 3.5, 1.2)
        size = 7 if len(order) <= _NAMED // 2 else 5
        panel.set_yticks(range(len(order)), [str(pair.classes[i]) for i in order], fontsize=size)
        panel.set_ylim(len(order) - 0.4, -0.6)
    else:
        for of, colour, size in ((~apart, _INK, 3), (apart, _APART, 7)):
            at = np.flatnonzero(of[order])
            panel.plot(100 * by_class.difference[order][at], at, ".", color=colour, markersize=size)
        for at in np.flatnonzero(apart[order])[:_LABELS]:
            place = 100 * by_class.difference[order[at]], at
            name = f" {pair.classes[order[at]]}"
            panel.annotate(name, place, (4, 0), textcoords="offset points", fontsize=7, va="center")
        panel.set_ylim(len(order), -1)
        panel.set_yticks([])
    panel.set_ylabel("class" if has_names else "classes, by their difference", fontsize=8)
    tested = f"red: significant, corrected for all {len(order):,}"
    verdict = tested if apart.any() else "none is significant"
    panel.set_title(f"class by class; {verdict}", fontsize=8)
    _axis(panel, axis if has_names else axis.partition(",")[0])


def draw_groups(findings: GroupFindings) -> Any:
    """Draw the accuracies of all networks next to the differences of the means."""
    differences = {"clean": findings.clean, "robust": findings.robust}
    shown = {accuracy: one for accuracy, one in differences.items() if one is not None}
    sizes = f"A: {findings.sizes[0]}, B: {findings.sizes[1]} networks\n"
    line = images_line(findings.evaluations[0].record, findings.images)
    figure = plotting.figure(sizes + line, 9, 3.2)
    panel, right = figure.subplots(1, 2)
    names: list[str] = []
    for accuracy, one in shown.items():
        for side, values, colour in (("A", one.first, _INK), ("B", one.second, _APART)):
            at = len(names)
            panel.plot(
                100 * values, [at] * len(values), "o", color=colour, alpha=0.55, markersize=5
            )
            panel.plot([100 * values.mean()], [at], "|", color=colour, markersize=18)
            names.append(f"{side}, {accuracy}")
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.set_ylim(len(names) - 0.5, -0.5)
    _axis(panel, "accuracy (%): networks, and their mean as a bar", zero=False)
    _gaps(right, shown)
    return figure


def _gaps(panel: Any, shown: dict[str, GroupDifference]) -> None:
    names: list[str] = []
    for accuracy, difference in shown.items():
        for kind, over in (("images", difference.images), ("seeds", difference.seeds)):
            if over is not None:  # one network shows nothing over seeds
                _bar(panel, len(names), over, False, 5, 2)
            names.append(f"{accuracy}, over {kind}")
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.set_ylim(len(names) - 0.5, -0.5)
    _axis(panel, f"B minus A: points, with {INTERVAL}s")


def write(out: Path, name: str, findings: ComparisonFindings | GroupFindings) -> dict[str, Any]:
    """Write text, numbers and picture; return the numbers.

    Raises:
      ValueError: the folder holds a comparison of other evaluations.
    """
    if isinstance(findings, GroupFindings):
        plain, drawing = groups.plain(findings), draw_groups(findings)
        document = groups.document(findings, f"{name}.png")
    else:
        plain, drawing = comparison_findings.plain(findings), draw(findings)
        document = comparison_markdown.document(findings, f"{name}.png")
    text, table, drawn = (out / f"{name}.{kind}" for kind in ("md", "json", "png"))
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if table.exists() and _compares(table) != _files(plain):
        raise ValueError(f"{table} compares different evaluations; name another folder with --out")
    image = io.BytesIO()
    drawing.savefig(image, dpi=130, format="png")
    out.mkdir(parents=True, exist_ok=True)
    with whole.writing(drawn) as part:
        part.write_bytes(image.getvalue())
    jsonl.replace(table, json.dumps(plain, indent=1) + "\n")
    jsonl.replace(text, document)
    return plain


def _compares(table: Path) -> list[tuple[str, ...]] | None:
    try:
        return _files(json.loads(table.read_text()))
    except (ValueError, KeyError, TypeError):
        return None


def _files(plain: dict[str, Any]) -> list[tuple[str, ...]]:
    keys = ("file", "evaluation", "group")  # "group" exists only for groups
    return [tuple(one[key] for key in keys if key in one) for one in plain["evaluations"]]
