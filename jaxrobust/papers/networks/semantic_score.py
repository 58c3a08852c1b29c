"""How well other networks recognize a class from perturbations alone (the thesis' Table 9).

The perturbations of PGD become 8-bit images, (x - x_adv + limit) / (2 limit) in color as in the
authors' code, and other networks, the judges, classify them: the score is their top-5 accuracy.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrobust.data.transforms.preparing import evaluation_transform
from jaxrobust.papers.networks import attack, perturbations, picture_parts
from jaxrobust.papers.networks.analyses import AnalysisSettings
from jaxrobust.papers.networks.network_sample import NetworkSample, other
from jaxrobust.papers.networks.picture_parts import Rows

_FEW = 20  # with this few classes, five guesses would say little


def analyse(sample: NetworkSample, settings: AnalysisSettings) -> tuple[Rows, Any]:
    """Return a row for each judge."""
    classes = int(sample.subject.network.num_classes or 0)
    top = settings.top or (5 if classes > _FEW else 1)
    if top >= classes:
        raise ValueError(f"--top={top} must be below the {classes} classes of {sample.name}")
    judges = [(sample.name, sample.subject, sample.logits_fn)]
    for place in settings.judges:
        name, subject, logits_fn = other(place, sample)
        judges.append((f"{name}, {Path(place).name}", subject, logits_fn))
    options = {"steps": settings.steps[0], "seed": settings.seed, "batch": settings.batch}
    delta = attack.pgd(sample, **options)[0] - sample.images
    change = quantised(
        perturbations.shown(delta, perturbations.limits(sample, delta), settings.sign)
    )
    clean = quantised(sample.images)
    rows = []
    for number, (name, subject, logits_fn) in enumerate(judges):
        judge = sample._replace(logits_fn=logits_fn)
        size, row = subject.network.image_size or 0, {"judge": name, "itself": number == 0}
        for kind, images in (("perturbations", change), ("images", clean)):
            values = attack.logits(judge, resized(images, size), settings.batch)
            row |= {f"{kind}_top{k}": hits(values, sample.labels, k) for k in (1, top)}
        rows.append(row | {"top": top, "images": len(sample.labels), "steps": settings.steps[0]})
    return rows, change


def quantised(images: np.ndarray) -> np.ndarray:
    """Return uint8[N,H,W,C], as stored in image files."""
    return np.round(images * 255).astype(np.uint8)


def resized(images: np.ndarray, size: int) -> np.ndarray:
    """Return f32[N,size,size,C] in [0, 1], resized bicubically if the size differs."""
    if images.shape[1] != size:
        transform = evaluation_transform(f"bicubic-{size}-crop-{size}")
        images = np.stack([transform(image) for image in images])
    return images.astype(np.float32) / np.float32(255)


def hits(values: np.ndarray, labels: np.ndarray, top: int) -> float:
    """Return the share of images whose label is among the `top` largest logits."""
    _, best = jax.lax.top_k(values, top)
    return float((np.asarray(best) == labels[:, None]).any(1).mean())


def draw(sample: NetworkSample, rows: Rows, result: Any, settings: AnalysisSettings) -> Any:
    """Draw a bar for each judge on perturbations and on images, and some perturbations."""
    top, shown = rows[0]["top"], result[: min(8, len(result))]
    ball = sample.threat.written()
    chance = f"{100 * top / int(sample.subject.network.num_classes or 1):.1f}%"
    about = f"Top-{top} accuracy on the perturbations alone (PGD-{settings.steps[0]}, {ball}, "
    about += f"{len(result)} images)\nof {sample.name}; chance is {chance}"
    figure = picture_parts.figure(about, 8.4, 2.6 + 0.55 * len(rows))
    above, below = figure.subfigures(2, 1, height_ratios=[0.55 * len(rows) + 1.0, 1.3])
    panel, places = above.subplots(), np.arange(len(rows))[::-1]
    for kind, shift, colour in (("perturbations", 0.18, "#d1495b"), ("images", -0.18, "#b9c4d0")):
        values = [100 * row[f"{kind}_top{top}"] for row in rows]
        bars = panel.barh(places + shift, values, 0.34, color=colour, label=f"on {kind}")
        panel.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
    names = [row["judge"] + " itself" * row["itself"] for row in rows]
    panel.set_yticks(places, names, fontsize=8)
    panel.set_xlim(0, 112)
    panel.set_xlabel(f"top-{top} accuracy, %", fontsize=8)
    panel.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    for cell, image, label in zip(below.subplots(1, 8), shown, sample.labels, strict=False):
        cell.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        cell.set_title(sample.called(label), fontsize=7, pad=2)
    for cell in below.axes:
        cell.axis("off")
    return figure
