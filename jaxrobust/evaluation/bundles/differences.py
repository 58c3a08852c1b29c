"""Adversarial images as small differences from the clean ones.

A perturbation is rounded to a few levels on either side of 0 and scaled to the radius. That is
another adversarial image, or none: the network says so, and more levels are taken where it is none.
"""

import zlib
from typing import NamedTuple

import numpy as np

from jaxrobust.evaluation.bundles import claims
from jaxrobust.evaluation.bundles.claims import Logits
from jaxrobust.evaluation.network import checks
from jaxrobust.types import Threat

LEVELS = (1, 2, 4, 8, 32, 127)  # on either side of 0, tried in this order


class Coded(NamedTuple):
    """The difference of an adversarial image from the clean one."""

    levels: int  # 0: it is exact
    step: float
    code: bytes
    sure: bool  # misclassified by `claims.MARGIN` at least


def encoded(
    adversarial: np.ndarray, images: np.ndarray, labels: np.ndarray, logits: Logits, threat: Threat
) -> list[Coded]:
    """Make the differences of n images, each with the fewest levels that keep it adversarial.

    With fewest levels among those that the network misclassifies by `claims.MARGIN`; where none
    does so, exact, or among those that it misclassifies at all. Images are f32[n,H,W,C].
    """
    best: list[Coded | None] = [None] * len(images)
    for levels in (*LEVELS, 0):
        todo = [i for i, coded in enumerate(best) if coded is None or not coded.sure]
        if not todo:
            break
        made = [_coded(adversarial[i], images[i], levels, threat) for i in todo]
        points = np.stack(
            [
                claims.restored(code, images[i], used, step)
                for i, (used, step, code) in zip(todo, made, strict=True)
            ]
        )
        answers = logits(points)
        holds, _ = checks.verified(points, images[todo], labels[todo], answers, threat)
        sure = holds & (claims.margin(answers, labels[todo]) < -claims.MARGIN)
        for i, how, ok, firm in zip(todo, made, holds, sure, strict=True):
            if firm or (best[i] is None and (ok or not levels)):
                best[i] = Coded(*how, sure=bool(firm))
    return [coded for coded in best if coded is not None]


def _coded(
    adversarial: np.ndarray, image: np.ndarray, levels: int, threat: Threat
) -> tuple[int, float, bytes]:
    if not levels:
        bits = [np.ascontiguousarray(a, "<f4").view("<u4") for a in (adversarial, image)]
        planes = (bits[0] - bits[1]).ravel().view(np.uint8).reshape(-1, 4).T
        return 0, 0.0, zlib.compress(np.ascontiguousarray(planes).tobytes(), 6)
    delta = adversarial.astype(np.float64) - image.astype(np.float64)
    largest = float(np.abs(delta).max()) or 1.0
    steps = np.rint(delta * (levels / largest))
    length = float(np.linalg.norm(steps.ravel(), checks.ORDER[threat.norm])) or 1.0
    code = zlib.compress(np.ascontiguousarray(steps.astype(np.int8)).tobytes(), 6)
    return levels, float(np.float32(threat.epsilon / length)), code
