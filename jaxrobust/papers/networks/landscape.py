"""The loss around a network's weights: a table of points that goes on, and its contours.

The plane is that of two random directions with the norm of each filter.
Source: Li et al. 2018 (arXiv 1712.09913), as Tang et al. 2022 (arXiv 2209.14105) use it.
"""

import csv
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust.papers.networks import network_sample, picture_parts, surface
from jaxrobust.runtime.devices import sharding
from jaxrobust.types import VERDICT_PRECISION
from jaxrobust.weights.store import hashes
from jaxrobust.weights.trained import runs

LEVELS = np.arange(0.1, 10, 0.5)  # of contours, as the source draws them


class Plane(NamedTuple):
    """Where the loss is computed, and how."""

    side: int = 51  # points along a side, an odd number
    reach: float = 1.0  # the half side, in norms of the filters
    points: int = 51  # that one call computes
    batch: int = 250
    seed: int = 0  # of the directions


def grid(side: int, reach: float) -> np.ndarray:
    """Return the points f64[side * side, 2], row by row."""
    line = np.linspace(-reach, reach, side)
    return np.stack([part.ravel() for part in np.meshgrid(line, line, indexing="ij")], 1)


def written(named: dict[str, Any], plane: Plane, out: Path | None) -> tuple[Path, Path]:
    """Compute the points that are missing, and write both files; their paths come back."""
    picture_parts.plotting()  # refuses before anything is computed
    split = named["split"] or "train"
    if named["workdir"] and not (named["split"] or named["dataset"]):
        split = runs.run_config(Path(named["workdir"]), named["phase"]).data.train_split
    seen = network_sample.seen(named | {"split": str(split)}, attacked=False)
    params, stats = seen.logits_fn.args  # type: ignore[attr-defined]
    about = {
        "images": len(seen.labels),
        "split": f"{seen.subject.dataset} {seen.subject.split}",
        "seed": plane.seed,
        "weights_sha256": hashes.weights_sha256(params, stats),
    }
    out = picture_parts.folder(out, named["workdir"])
    out.mkdir(parents=True, exist_ok=True)
    table, picture = out / "landscape.csv", out / "landscape.png"
    points = grid(plane.side, plane.reach)
    done = _done(table, points, about)
    if done < len(points):
        both = [surface.direction(params, plane.seed, number) for number in range(2)]
        net, mesh = seen.subject.create("float32"), sharding.make_mesh(jax.local_devices())
        batch = min(plane.batch, len(seen.labels))
        data = (seen.images, seen.labels)
        at = surface.losses(net, params, stats, both, *data, batch=batch, mesh=mesh)
        with jax.default_matmul_precision(VERDICT_PRECISION):
            _computed(table, at, points, done, plane.points, about)
    rows = _rows(table)
    line = np.array([float(row["b"]) for row in rows[: plane.side]])
    losses = np.array([float(row["loss"]) for row in rows]).reshape(plane.side, plane.side)
    draw(seen.name, line, losses, about).savefig(picture, dpi=130)
    return table, picture


def _done(table: Path, points: np.ndarray, about: dict[str, Any]) -> int:
    if not table.exists():
        return 0
    text = table.read_text()
    if not text.endswith("\n"):
        table.write_text(text[: text.rfind("\n") + 1])
    there = _rows(table)
    for row, point in zip(there, points, strict=False):
        same = {key: str(value) for key, value in about.items()}
        own = {key: row.get(key) for key in about}
        places = [float(row.get(key) or "nan") for key in ("a", "b")]
        if (
            own != same
            or not np.allclose(places, point, rtol=0, atol=1e-12)
            or len(there) > len(points)
        ):
            raise ValueError(
                f"{table} is of other weights, images, directions or points; name another --out, "
                "or remove it"
            )
    return len(there)


def _computed(
    table: Path, at: Any, points: np.ndarray, done: int, step: int, about: dict[str, Any]
) -> None:
    from tqdm.auto import tqdm

    keys = ["a", "b", "loss", "accuracy", *about]
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, keys)
        if not done:
            writer.writeheader()
        for start in tqdm(range(done, len(points), step), disable=None, unit="call", leave=False):
            part = points[start : start + step]
            filled = np.resize(part, (step, 2))  # the last call is as long as the others
            loss, right = (values[: len(part)] for values in at(filled))
            for row in np.column_stack([part, loss, right]).tolist():
                writer.writerow(dict(zip(keys, row, strict=False)) | about)
            file.flush()


def _rows(table: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(table.read_text().splitlines()))


def draw(name: str, line: np.ndarray, losses: np.ndarray, about: dict[str, Any]) -> Any:
    """Draw the contours of the loss."""
    middle = losses[len(line) // 2, len(line) // 2]
    title = f"{name}\nmean cross-entropy of {about['images']:,} images of {about['split']}, "
    figure = picture_parts.figure(f"{title}{middle:.3f} in the middle", 5.8, 5.2)
    panel = figure.subplots()
    shown = np.where(np.isfinite(losses), losses, LEVELS[-1] + 1).T
    levels = LEVELS[: max(3, int((shown.max() > LEVELS).sum()) + 1)]  # as high as the surface is
    colours = panel.contourf(line, line, shown, levels, cmap="viridis", extend="both")
    lines = panel.contour(line, line, shown, levels, colors="white", linewidths=0.5)
    panel.clabel(lines, fontsize=6, fmt="%.1f")
    panel.plot(0, 0, "+", color="#d1495b", ms=9, mew=1.6)
    panel.set(xlabel="first direction, in norms of the filters", ylabel="second direction")
    panel.set_aspect("equal")
    figure.colorbar(colours, ax=panel, shrink=0.9)
    return figure
