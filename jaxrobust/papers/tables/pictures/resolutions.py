"""Accuracy against test resolution, for tables with several resolutions."""

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.papers.tables.tables import named, paper, title
from jaxrobust.papers.tables.tables_markdown import Filled
from jaxrobust.results.plotting import plotting

_LEAST = 3  # resolutions that make a curve
_OURS = "#d1495b"


class ResolutionCurve(NamedTuple):
    """One result of one network by image size in pixels, in percent."""

    network: str
    result: str  # "clean", "linf 4/255", ...
    printed: dict[int, float]
    ours: dict[int, float]


def curves(filled: Filled) -> list[ResolutionCurve]:
    """Return a curve for each network and result with at least three resolutions in the table."""
    rows: dict[tuple[str, Any], list[int]] = defaultdict(list)
    for index, row in enumerate(filled.table.rows):
        if row.get("image_size"):
            rows[named(row), row.get("run")].append(index)
    curves_found = []
    for (name, _), places in rows.items():
        for key, result in filled.table.attacked().items():
            printed, measured = {}, {}
            for index in places:
                row = filled.table.rows[index]
                if row.get(key) is not None:
                    printed[row["image_size"]] = row[key]
                if (cell := filled.cells.get((index, key))) and not cell.alike:
                    measured[row["image_size"]] = cell.value
            if len(printed) >= _LEAST:
                words = (
                    f"{result['norm']} {result['epsilon']}"
                    if "norm" in result
                    else result["attack"]
                )
                curves_found.append(ResolutionCurve(name, words, printed, measured))
    return curves_found


def draw(filled: Filled, folder: Path) -> list[Path]:
    """Write a picture for each network with curves: printed values and ours."""
    paths = []
    of_network: dict[str, list[ResolutionCurve]] = defaultdict(list)
    for curve in curves(filled):
        of_network[curve.network].append(curve)
    for number, (name, network_curves) in enumerate(of_network.items()):
        suffix = f"-{number + 1}" if len(of_network) > 1 else ""
        path = folder / f"{filled.table.paper}-{filled.table.id}-resolution{suffix}.png"
        _draw(filled, name, network_curves, path)
        paths.append(path)
    return paths


def _draw(filled: Filled, name: str, network_curves: list[ResolutionCurve], path: Path) -> None:
    pyplot = plotting()
    figure, panel = pyplot.subplots(figsize=(6.4, 4.8), layout="constrained")
    shades = pyplot.get_cmap("Blues")
    for number, curve in enumerate(network_curves):
        shade = shades(0.95 - 0.6 * number / max(len(network_curves) - 1, 1))
        sizes = sorted(curve.printed)
        values = [curve.printed[size] for size in sizes]
        panel.plot(sizes, values, marker="o", color=shade, label=curve.result)
        panel.plot(
            *zip(*sorted(curve.ours.items()), strict=True) if curve.ours else ([], []),
            marker="*",
            markersize=13,
            linestyle="",
            color=_OURS,
        )
        panel.annotate(
            curve.result,
            (sizes[-1], values[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    panel.set_xticks(sorted({size for curve in network_curves for size in curve.printed}))
    panel.set(xlabel="test resolution, pixels", ylabel="accuracy, %")
    panel.margins(x=0.16)
    panel.grid(color="#b9c4d0", linewidth=0.5)
    count = sum(len(curve.ours) for curve in network_curves)
    red = f"{count} values measured by us" if count else "not yet measured by us"
    source = paper(filled.table.paper)["source"]
    about = f"{source['authors']} {source['year']}, {title(filled.table)}: {name}"
    figure.suptitle(f"{about}\nblue: printed in the paper; red: {red}", fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
