"""The scatter plots of the papers: size and clean accuracy against robust accuracy."""

import string
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.papers.tables import matching
from jaxrobust.papers.tables.tables import named, paper, title
from jaxrobust.papers.tables.tables_markdown import Filled
from jaxrobust.results.plotting import plotting
from jaxrobust.results.run_records import RunRecord

_AXES = {"params_m": "parameters, millions", "macs_g": "multiply-adds, 1e9", "clean": "clean, %"}
_LOG = ("params_m", "macs_g")
_ATTACKS = {"autoattack": "AutoAttack", "apgd-ce": "APGD-CE"}
_LEAST = 4  # rows that make a picture
_INK, _PALE, _OURS = "#1f4e79", "#b9c4d0", "#d1495b"


class Point(NamedTuple):
    """One network in all panels."""

    label: str  # at the point; explained in the key at the right
    name: str
    values: dict[str, float]  # of the axes, and "robust"
    kind: str  # authors, others, ours, beside


def robust_key(filled: Filled) -> str | None:
    """Return the result for the vertical axis: AutoAttack before others, linf before others."""
    kinds = {key: result["attack"] for key, result in filled.table.attacked().items()}
    keys = [key for key, kind in kinds.items() if kind not in ("clean", "union", "corruptions")]
    order = {"autoattack": 0, "apgd-ce": 1}
    return min(keys, key=lambda key: order.get(kinds[key], 2), default=None)


def points(filled: Filled, records: list[RunRecord]) -> list[Point]:
    """Return the paper's networks, our values for them, and our other records of that attack."""
    table, robust = filled.table, robust_key(filled)
    if robust is None:
        return []
    shown: list[Point] = []
    used: set[int] = set()
    with_value = [
        (index, row) for index, row in enumerate(table.rows) if row.get(robust) is not None
    ]
    for number, (index, row) in enumerate(with_value, 1):
        values = {key: row[key] for key in _AXES if row.get(key) is not None}
        kind = "authors" if row.get("origin") == "authors" else "others"
        label, name = str(number), _told_apart(row, table.rows)
        shown.append(Point(label, name, values | {"robust": row[robust]}, kind))
        if (cell := filled.cells.get((index, robust))) and not cell.alike:
            used.add(cell.record)
            clean_cell = filled.cells.get((index, "clean"))
            values = values | ({"clean": clean_cell.value} if clean_cell else {})
            shown.append(Point(label, "", values | {"robust": cell.value}, "ours"))
    shown += _beside(table.results[robust], records, used)
    return shown


def _told_apart(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    name = named(row)
    if sum(named(other) == name for other in rows) > 1:
        units = {"epochs": "epochs", "attack_steps": "steps"}
        name += "".join(f", {row[key]} {unit}" for key, unit in units.items() if row.get(key))
    return name


def _beside(result: dict[str, Any], records: list[RunRecord], used: set[int]) -> list[Point]:
    shown: list[Point] = []
    for number, run_record in enumerate(records):
        record = run_record.record
        if number in used or any(matching.other_attack(result, record)):
            continue
        values = {"clean": 100 * (record.clean or 0), "robust": 100 * (record.robust or 0)}
        letter = string.ascii_lowercase[len(shown) % 26]
        name = f"{matching.label(run_record)}, {record.dataset}, images {record.image_ids}"
        shown.append(Point(letter, name, values | matching.sizes(run_record), "beside"))
    return shown


def draw(filled: Filled, records: list[RunRecord], folder: Path) -> list[Path]:
    """Write a picture per data set of a table with the sizes of at least four networks."""
    rows = filled.table.rows
    names = dict.fromkeys(row.get("dataset") for row in rows)
    paths = []
    for name in names:
        places = {i: n for n, i in enumerate(i for i, r in enumerate(rows) if r["dataset"] == name)}
        cells = {(places[i], key): cell for (i, key), cell in filled.cells.items() if i in places}
        part = Filled(filled.table._replace(rows=[rows[i] for i in places]), cells)
        suffix = f"-{name}" if len(names) > 1 else ""
        path = folder / f"{filled.table.paper}-{filled.table.id}{suffix}.png"
        if _drawn(part, records, path, str(name)):
            paths.append(path)
    return paths


def _drawn(filled: Filled, records: list[RunRecord], path: Path, dataset: str) -> bool:
    shown, robust = points(filled, records), robust_key(filled)
    printed = [p for p in shown if p.kind in ("authors", "others")]
    axes = [a for a in _AXES if sum(a in p.values for p in printed) >= _LEAST]
    if robust is None or not set(axes) & set(_LOG):
        return False
    pyplot = plotting()
    wrapped = [textwrap.wrap(f"{p.label}  {p.name}", 52) for p in shown if p.name]
    key = ["\n     ".join(lines) for lines in wrapped]
    height = max(4.6, 1.9 + 0.16 * sum(map(len, wrapped)))
    figure = pyplot.figure(figsize=(4.2 * len(axes) + 3.4, height), layout="constrained")
    panels = figure.subplots(1, len(axes) + 1, width_ratios=[4.2] * len(axes) + [3.4])
    result = filled.table.results[robust]
    attack = _ATTACKS.get(result["attack"], result["attack"])
    ordinate = f"{attack}, {result['norm']} {result['epsilon']}, %"
    panels[-1].axis("off")
    panels[-1].text(0, 1, "\n".join(key), va="top", fontsize=7, transform=panels[-1].transAxes)
    source = paper(filled.table.paper)["source"]
    about = f"{source['authors']} {source['year']}, {title(filled.table)}: {filled.table.caption}"
    count = sum(p.kind in ("ours", "beside") for p in shown)
    red = f"{count} values measured by us" if count else "not yet measured by us"
    legend = f"{dataset}; blue: printed in the paper; red: {red}; numbers: see the right"
    figure.suptitle(f"{about}\n{legend}", fontsize=10)
    for panel, axis in zip(panels, axes, strict=False):
        _panel(panel, axis, shown, ordinate)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        fontsize=8,
        frameon=False,
    )
    figure.get_layout_engine().execute(figure)  # positions of labels depend on it
    for panel, axis in zip(panels, axes, strict=False):
        _label(panel, axis, shown)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


_STYLES: dict[str, tuple[str, dict[str, Any]]] = {  # kind -> legend and style
    "authors": ("the paper's networks", {"marker": "o", "s": 34, "color": _INK}),
    "others": (
        "others that the paper lists",
        {"marker": "o", "s": 34, "facecolors": "white", "edgecolors": _INK},
    ),
    "ours": ("measured by us, the same network", {"marker": "*", "s": 190, "color": _OURS}),
    "beside": (
        "measured by us, another network or other images",
        {"marker": "D", "s": 46, "color": _OURS},
    ),
}


def _panel(panel: Any, axis: str, shown: list[Point], ordinate: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for kind, (label, style) in _STYLES.items():
        here = [p for p in shown if p.kind == kind and axis in p.values]
        xs, ys = [p.values[axis] for p in here], [p.values["robust"] for p in here]
        options = style | {"label": label, "linewidths": 1.1, "zorder": 4 if kind == "ours" else 3}
        if here:
            panel.scatter(xs, ys, **options)
    if axis in _LOG:
        values = [p.values[axis] for p in shown if axis in p.values]
        wide = max(values) > 20 * min(values)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide else (1, 2, 3, 4, 5, 7)))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter("{x:g}")
    panel.set(xlabel=_AXES[axis], ylabel=ordinate)
    panel.grid(color=_PALE, linewidth=0.5)
    panel.margins(0.08)


def _label(panel: Any, axis: str, shown: list[Point]) -> None:
    placed = [p for p in shown if axis in p.values]
    places = [(p.values[axis], p.values["robust"]) for p in placed]
    taken = [(float(x), float(y)) for x, y in map(panel.transData.transform, places)]
    for point, place, spot in zip(placed, places, list(taken), strict=True):
        dx, dy = _free(spot, taken)
        colour = _OURS if point.kind in ("ours", "beside") else "black"
        style = {"textcoords": "offset pixels", "fontsize": 7, "ha": "center", "va": "center"}
        panel.annotate(point.label, place, xytext=(dx, dy), color=colour, **style)
        taken.append((spot[0] + dx, spot[1] + dy))


def _free(spot: tuple[float, float], taken: list[tuple[float, float]]) -> tuple[float, float]:
    """Find the position near a point where its label is farthest from everything else."""
    best, far = (0.0, 0.0), -1.0
    for reach in (12, 16, 21, 27):
        for dx, dy in ((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, -1), (-1, 1)):
            scale = reach if 0 in (dx, dy) else 0.8 * reach
            x, y = 1.3 * scale * dx, scale * dy  # labels are wider than high
            least = min(max(abs(spot[0] + x - a) / 1.3, abs(spot[1] + y - b)) for a, b in taken)
            if least > far + 1:
                best, far = (x, y), least
        if far >= 11:
            break
    return best
