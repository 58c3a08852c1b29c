"""Whether a network has collapsed: it gives nearly all images one class, at chance accuracy.

Such a network keeps its answer under every attack, so its robust accuracy equals its clean
accuracy, which looks like robustness.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.evaluation.network import checks

SHARE = 0.9  # of the images of other classes
_LEVEL = 0.95
_SIGMAS = 3
_KNOWS = 0.01  # of the images of other classes: right answers beyond chance that prove nothing
_REMEDY = (
    "continue from earlier weights, with a lower learning rate, a longer warm-up or a smaller "
    "initial radius (attack.warmup_epochs); for weights from elsewhere, check the preprocessing "
    "and that all weights are loaded"
)


class Collapse(NamedTuple):
    """What a sample of answers shows."""

    proven: bool  # False: too few images to tell
    words: str  # one sentence and its remedy


def of(answers: Any, labels: Any) -> Collapse | None:
    """Describe a network that has collapsed to one class; None if it has not.

    Only the m images whose label is not the most frequent answer count: if most images have one
    class, a sound network gives it to most. If a share s of the m get that answer, at most 1 - s
    of them are right. Accuracy is then at most that of a constant answer plus 1 - s, a tenth at
    `SHARE` 0.9. The share must reach `SHARE` by Clopper and Pearson's one-sided 95% bound: 29 of 29
    suffice, or 57 of 58. Accuracy is at chance if the same answers in random order would be right
    as often, within three standard deviations of the mean (Hoeffding 1951, "A combinatorial central
    limit theorem", theorem 2) plus one in a hundred of the m images. A barely trained network whose
    few other answers are right has not collapsed.

    With fewer images the share is not established. From m = 5 on, they show at 95% that most images
    get the most frequent answer: then `proven` is False. Fewer show nothing. Images with a negative
    answer have none and are skipped.
    """
    answered = np.asarray(answers) >= 0
    answers, labels = np.asarray(answers)[answered], np.asarray(labels)[answered]
    if not answered.any():
        return None
    n, most = len(labels), int(np.bincount(answers).argmax())
    others = labels != most
    m, k = int(others.sum()), int((answers[others] == most).sum())
    if not m or k < SHARE * m or beyond_chance(answers, labels) > _KNOWS * m:
        return None
    least = 1 - checks.upper_bound(m - k, m, _LEVEL)
    sentence = (
        f"{int((answers == most).sum()):,} of {n:,} clean images are predicted as class {most}, "
        f"including {k:,} of {m:,} from other classes, and {(answers == labels).mean():.1%} are "
        "classified correctly"
    )
    if least >= SHARE:
        sentence += (
            ", no more than with a constant answer. The network has collapsed to one class, "
            f"and giving the same answer under attack is not robustness; {_REMEDY}"
        )
        return Collapse(True, sentence)
    if least <= 0.5:
        return None
    return Collapse(
        False,
        f"{sentence}, as if the network had collapsed to one class. So few "
        f"images only show that at least {least:.0%} of the others get this class (95% "
        "confidence); evaluate more images before you quote an accuracy",
    )


def proven(reached: dict[str, Any]) -> bool:
    """Tell whether a result of `accuracy.count` is of a collapsed network."""
    return bool((reached.get("collapse") or {}).get("proven"))


def flags(answers: Any, labels: Any) -> dict[str, str]:
    """Flag `collapsed` if `of` finds a collapse."""
    sentence = of(answers, labels)
    return {"collapsed": sentence.words} if sentence else {}


def beyond_chance(answers: np.ndarray, labels: np.ndarray) -> float:
    """Count the right answers beyond chance plus three standard deviations."""
    n, classes = len(labels), int(max(answers.max(), labels.max())) + 1
    p, q = (np.bincount(column, minlength=classes) / n for column in (answers, labels))
    mean = float(p @ q)
    variance = n**2 / max(n - 1, 1) * (mean - p @ q**2 - q @ p**2 + mean**2)
    deviation = math.sqrt(max(float(variance), 0.0))
    return int((answers == labels).sum()) - n * mean - _SIGMAS * deviation
