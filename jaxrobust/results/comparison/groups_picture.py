"""The picture of two groups: each network's accuracies, the means, and intervals of their gap."""

from pathlib import Path
from typing import Any

from jaxrobust.evaluation.records import records
from jaxrobust.results import plotting
from jaxrobust.results.comparison import groups, groups_markdown, picture
from jaxrobust.results.comparison.comparison_findings import INTERVAL
from jaxrobust.results.comparison.groups import GroupDifference, GroupFindings

_COLOURS = {"A": "#1f4e79", "B": "#d1495b"}
_PALE = "#b9c4d0"


def draw(findings: GroupFindings) -> Any:
    """Draw the accuracies of all networks, and beside them the differences of the means."""
    own = {"clean": findings.clean, "robust": findings.robust}
    shown = {what: one for what, one in own.items() if one is not None}
    record = findings.evaluations[0].record
    about = f"{findings.images:,} images of {record.dataset}, {record.split}; attack: "
    sizes = f"A: {findings.sizes[0]}, B: {findings.sizes[1]} networks\n"
    figure = plotting.figure(sizes + about + records.attack_line(record), 9, 3.2)
    left, right = figure.subplots(1, 2)
    _networks(left, shown)
    _gaps(right, shown)
    return figure


def _networks(panel: Any, shown: dict[str, GroupDifference]) -> None:
    lines = [(what, side) for what in shown for side in _COLOURS]
    for at, (what, side) in enumerate(lines):
        one = shown[what]
        values = 100 * (one.first if side == "A" else one.second)
        panel.plot(values, [at] * len(values), "o", color=_COLOURS[side], alpha=0.55, markersize=5)
        panel.plot([values.mean()], [at], "|", color=_COLOURS[side], markersize=18)
    panel.set_yticks(range(len(lines)), [f"{side}, {what}" for what, side in lines], fontsize=8)
    panel.set_ylim(len(lines) - 0.5, -0.5)
    _axis(panel, "accuracy (%): networks, and their mean as a bar")


def _gaps(panel: Any, shown: dict[str, GroupDifference]) -> None:
    lines = [(what, over) for what in shown for over in ("images", "seeds")]
    for at, (what, kind) in enumerate(lines):
        over = getattr(shown[what], kind)
        if over is None:  # of one network nothing is known over seeds
            continue
        low, middle, high = (100 * v for v in (over.low, over.difference, over.high))
        panel.plot([low, high], [at, at], color="#1f4e79", linewidth=2, solid_capstyle="butt")
        panel.plot([middle], [at], "o", color="#1f4e79", markersize=5)
    panel.axvline(0, color="black", linewidth=0.8, zorder=1)
    panel.set_yticks(
        range(len(lines)), [f"{what}, over {kind}" for what, kind in lines], fontsize=8
    )
    panel.set_ylim(len(lines) - 0.5, -0.5)
    _axis(panel, f"B minus A: points, with {INTERVAL}s")


def _axis(panel: Any, label: str) -> None:
    panel.grid(axis="x", color=_PALE, linewidth=0.5)
    panel.set_axisbelow(True)
    panel.set_xlabel(label, fontsize=8)
    panel.tick_params(axis="x", labelsize=8)
    panel.margins(x=0.06)


def write(out: Path, name: str, findings: GroupFindings) -> None:
    """Write the text, the numbers and the picture, each of them whole."""
    plain = groups.plain(findings)
    document = groups_markdown.document(findings, f"{name}.png")
    picture.save(out, name, plain, lambda: draw(findings), document)
