"""Shared parts of the pictures: CSV rows, grids of images, colors."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrobust.results.plotting import figure, plotting

MOST = 16  # images of a grid; the CSV has the rest
Rows = list[dict[str, Any]]  # of a CSV: column -> value


def folder(out: Path | None, workdir: str | None) -> Path:
    """Choose the folder for a table and its picture: the given one, else one next to the run."""
    return out or (Path(workdir) / "analyses" if workdir else Path("analyses"))


def rows(columns: dict[str, Any]) -> Rows:
    """Return rows of plain numbers and texts from columns."""
    plain = {k: v.tolist() if isinstance(v, np.ndarray) else list(v) for k, v in columns.items()}
    return [dict(zip(plain, row, strict=True)) for row in zip(*plain.values(), strict=True)]


def save(out: Path, name: str, figure: Any, lines: Rows) -> tuple[Path, Path]:
    """Write rows as CSV, floats with all their digits, and their picture; return both paths."""
    out.mkdir(parents=True, exist_ok=True)
    table, picture = (out / f"{name}.{kind}" for kind in ("csv", "png"))
    figure.savefig(picture, dpi=130)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return table, picture


def grid(cells: Sequence[tuple[np.ndarray, str, bool]], across: int, about: str) -> Any:
    """Return a figure of images f[H,W,C] in [0, 1] with titles, red where the flag says so."""
    down = -(-len(cells) // across)
    lines = about.count("\n") + 1
    side = 1.35 if across > 4 else 1.7
    picture_figure = figure(
        about, max(side * across, 5.4), (side + 0.16) * down + 0.2 * lines + 0.1
    )
    picture_figure.get_layout_engine().set(h_pad=0.02, w_pad=0.02, hspace=0, wspace=0)
    panels = picture_figure.subplots(down, across, squeeze=False).ravel()
    for panel in panels:
        panel.axis("off")
    for panel, (image, title, red) in zip(panels, cells, strict=False):
        picture = np.clip(image, 0, 1)
        picture = picture[..., 0] if picture.shape[-1] == 1 else picture
        panel.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        panel.set_title(title, fontsize=7, pad=2, color="#b3261e" if red else "black")
    return picture_figure


def shades(count: int) -> list[Any]:
    """Return colors from pale to dark, for ordered series."""
    return [plotting().colormaps["viridis_r"](x) for x in np.linspace(0.1, 1, count)]
