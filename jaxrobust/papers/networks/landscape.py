"""The loss around a network's weights: a resumable table of points, and its contours.

Two random directions with filter normalization span the plane: a direction has the norm of the
weights filter by filter, and does not change biases, norms and statistics.
Source: Li et al. 2018 (arXiv 1712.09913), as Tang et al. 2022 (arXiv 2209.14105) use it.
"""

import csv
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxrobust.papers.networks import network_sample, picture_parts
from jaxrobust.runtime.devices import sharding
from jaxrobust.types import VERDICT_PRECISION, Array, Classifier, Params
from jaxrobust.weights.store import hashes
from jaxrobust.weights.trained import runs

_TINY = 1e-10
LEVELS = np.arange(0.1, 10, 0.5)  # of contours, as the source draws them


class Plane(NamedTuple):
    """The points where the loss is computed."""

    side: int = 51  # points along a side, an odd number
    reach: float = 1.0  # the half side, in norms of the filters
    points: int = 51  # points per call
    batch: int = 250
    seed: int = 0  # of the directions


def direction(params: dict[str, Any], seed: int, number: int) -> dict[str, np.ndarray]:
    """Draw a seed's direction `number`: Gaussian, with each filter scaled to the weights' norm.

    A filter computes one output of a kernel. Other arrays with several axes count as one filter,
    and arrays with one axis do not change. An array's draws depend on its name.
    """
    scaled = {}
    for name, value in params.items():
        weights = np.asarray(value, np.float32)
        if weights.ndim < 2:
            scaled[name] = np.zeros_like(weights)
            continue
        key = [seed, (number << 32) + zlib.crc32(name.encode())]
        drawn = np.random.Generator(np.random.Philox(key=key)).standard_normal(weights.shape)
        axes = tuple(range(weights.ndim - 1)) if name.endswith(".kernel") else None
        have, want = (
            np.sqrt(np.sum(np.square(array, dtype=np.float64), axes, keepdims=True))
            for array in (drawn, weights)
        )
        scaled[name] = (drawn * (want / (have + _TINY))).astype(np.float32)
    return scaled


def losses_around(
    net: Classifier,
    params: Params,
    stats: Params,
    directions: Sequence[dict[str, np.ndarray]],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch: int,
    mesh: jax.sharding.Mesh,
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return a function of points f32[P,2] to mean cross-entropy and accuracy there, f64[P] each.

    The devices of `mesh` share the points; `batch` only changes the rounding of the sum.
    """
    steps = -(-len(images) // batch)
    short = steps * batch - len(images)
    padded = np.concatenate([images, np.zeros((short, *images.shape[1:]), np.float32)])
    grouped = (
        padded.reshape(steps, batch, *images.shape[1:]),
        np.concatenate([labels, np.zeros(short, np.int32)]).astype(np.int32).reshape(steps, batch),
        (np.arange(steps * batch) < len(images)).reshape(steps, batch),
    )
    split = PartitionSpec((sharding.DATA, sharding.FSDP))
    specs = (*[PartitionSpec()] * 5, split)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    def of_points(
        params: Params, stats: Params, first: Params, second: Params, data: Any, points: Array
    ) -> Any:
        def at(point: Array) -> tuple[Array, Array]:
            a, b = point
            moved = {n: value + a * first[n] + b * second[n] for n, value in params.items()}

            def add(totals: Any, group: Any) -> tuple[Any, None]:
                x, y, mask = group
                logits = net.apply(moved, stats, x)[0].astype(jnp.float32)
                of_label = jnp.take_along_axis(logits, y[:, None], -1)[:, 0]
                losses = jax.nn.logsumexp(logits, -1) - of_label
                right = (logits.argmax(-1) == y) & mask & jnp.isfinite(losses)
                return (totals[0] + jnp.where(mask, losses, 0).sum(), totals[1] + right.sum()), None

            zero = (jnp.float32(0), jnp.int32(0))
            return jax.lax.scan(add, zero, data)[0]

        return jax.lax.map(at, points)

    on_devices = jax.device_put((params, stats, *directions, grouped), sharding.replicated(mesh))

    def call(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        short = -len(points) % mesh.size
        padded_points = np.concatenate([points, np.zeros((short, 2))]).astype(np.float32)
        sums = jax.device_get(of_points(*on_devices, padded_points))
        loss, right = (of[: len(points)].astype(np.float64) / len(images) for of in sums)
        return loss, right

    return call


def grid(side: int, reach: float) -> np.ndarray:
    """Return the points f64[side * side, 2], row by row."""
    line = np.linspace(-reach, reach, side)
    return np.stack([part.ravel() for part in np.meshgrid(line, line, indexing="ij")], 1)


def written(network_flags: dict[str, Any], plane: Plane, out: Path | None) -> tuple[Path, Path]:
    """Compute the missing points, and write both files; return their paths."""
    picture_parts.plotting()  # refuses before anything is computed
    split = network_flags["split"] or "train"
    if network_flags["workdir"] and not (network_flags["split"] or network_flags["dataset"]):
        split = runs.run_config(
            Path(network_flags["workdir"]), network_flags["phase"]
        ).data.train_split
    sample = network_sample.seen(network_flags | {"split": str(split)}, attacked=False)
    params, stats = sample.logits_fn.args  # type: ignore[attr-defined]
    about = {
        "images": len(sample.labels),
        "split": f"{sample.subject.dataset} {sample.subject.split}",
        "seed": plane.seed,
        "weights_sha256": hashes.weights_sha256(params, stats),
    }
    out = picture_parts.folder(out, network_flags["workdir"])
    out.mkdir(parents=True, exist_ok=True)
    table, picture = out / "landscape.csv", out / "landscape.png"
    points = grid(plane.side, plane.reach)
    done = _done(table, points, about)
    if done < len(points):
        both = [direction(params, plane.seed, number) for number in range(2)]
        net, mesh = sample.subject.create("float32"), sharding.make_mesh(jax.local_devices())
        batch = min(plane.batch, len(sample.labels))
        data = (sample.images, sample.labels)
        at = losses_around(net, params, stats, both, *data, batch=batch, mesh=mesh)
        with jax.default_matmul_precision(VERDICT_PRECISION):
            _computed(table, at, points, done, plane.points, about)
    rows = _rows(table)
    line = np.array([float(row["b"]) for row in rows[: plane.side]])
    losses = np.array([float(row["loss"]) for row in rows]).reshape(plane.side, plane.side)
    draw(sample.name, line, losses, about).savefig(picture, dpi=130)
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
        stored = {key: row.get(key) for key in about}
        places = [float(row.get(key) or "nan") for key in ("a", "b")]
        if (
            stored != same
            or not np.allclose(places, point, rtol=0, atol=1e-12)
            or len(there) > len(points)
        ):
            raise ValueError(
                f"{table} belongs to other weights, images, directions or points; name another "
                "--out, or remove it"
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
    levels = LEVELS[: max(3, int((shown.max() > LEVELS).sum()) + 1)]  # up to the surface's height
    colours = panel.contourf(line, line, shown, levels, cmap="viridis", extend="both")
    lines = panel.contour(line, line, shown, levels, colors="white", linewidths=0.5)
    panel.clabel(lines, fontsize=6, fmt="%.1f")
    panel.plot(0, 0, "+", color="#d1495b", ms=9, mew=1.6)
    panel.set(xlabel="first direction, in filter norms", ylabel="second direction")
    panel.set_aspect("equal")
    figure.colorbar(colours, ax=panel, shrink=0.9)
    return figure
