"""PGD's perturbations as images (Debenedetti's thesis, section 4.3 and appendix A.1)."""

from typing import Any

import numpy as np

from jaxrobust.papers.networks import attack, picture_parts
from jaxrobust.papers.networks.analyses import AnalysisSettings
from jaxrobust.papers.networks.network_sample import NetworkSample
from jaxrobust.papers.networks.picture_parts import Rows

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # Rec. 601


def analyse(sample: NetworkSample, settings: AnalysisSettings) -> tuple[Rows, Any]:
    """Return a row for each image, and the data for `draw`."""
    steps = settings.steps[0]
    adversarial, adversarial_logits = attack.pgd(
        sample, steps=steps, seed=settings.seed, batch=settings.batch
    )
    clean_logits = attack.logits(sample, sample.images, settings.batch)
    delta = adversarial - sample.images
    largest = limits(sample, delta)
    share = np.abs(delta) / largest[:, None, None, None]
    columns = {
        "image": sample.ids,
        "label": sample.labels,
        "class": [sample.called(label) for label in sample.labels],
        "clean_prediction": clean_logits.argmax(1),
        "adversarial_prediction": adversarial_logits.argmax(1),
        "clean_ce": attack.cross_entropy(clean_logits, sample.labels),
        "adversarial_ce": attack.cross_entropy(adversarial_logits, sample.labels),
        "largest_change": np.abs(delta).max((1, 2, 3)),
        "mean_change_of_limit": share.mean((1, 2, 3)),
        "share_at_limit": (share > 1 - 1e-4).mean((1, 2, 3)),
    }
    return picture_parts.rows(columns), (adversarial, shown(delta, largest, settings.sign))


def limits(sample: NetworkSample, delta: np.ndarray) -> np.ndarray:
    """Return f32[N], the change shown as black or white: the radius in linf, else the largest."""
    if sample.threat.norm == "linf":
        return np.full(len(delta), sample.threat.epsilon, np.float32)
    return np.maximum(np.abs(delta).max((1, 2, 3)), np.finfo(np.float32).tiny)


def shown(delta: np.ndarray, largest: np.ndarray, sign: str) -> np.ndarray:
    """Return (delta + limit) / (2 limit) in [0, 1]; `sign` "code" uses the authors' x - x_adv."""
    turned = -delta if sign == "code" else delta
    limit = largest[:, None, None, None]
    return np.clip((turned + limit) / (2 * limit), 0, 1)


def draw(sample: NetworkSample, rows: Rows, result: Any, settings: AnalysisSettings) -> Any:
    """Draw image, adversarial image and perturbation, in color and in gray."""
    adversarial, change = result
    grey = change @ LUMA[:, None] if change.shape[-1] == 3 else None
    kinds = [("image", sample.images), ("adversarial", adversarial), ("perturbation", change)]
    kinds += [] if grey is None else [("in gray", grey)]
    cells = []
    for i, row in enumerate(rows[: picture_parts.MOST]):
        wrong = row["adversarial_prediction"] != row["label"]
        called = sample.called(row["adversarial_prediction"])
        titles = [(row["class"], False), (called, wrong), ("", False), ("", False)]
        cells += [(images[i], *title) for (_, images), title in zip(kinds, titles, strict=False)]
    ball = sample.threat.written()
    about = f"PGD-{settings.steps[0]}, {ball}: {', '.join(name for name, _ in kinds)}\n"
    about += "titles: the class, and the prediction for the adversarial image (red: wrong)\n"
    about += "perturbation: gray means no change, white the brightest change that the ball allows"
    across = len(kinds) * (2 if len(rows) > 4 else 1)
    return picture_parts.grid(cells, across, f"{sample.name}\n{about}")
