"""Whether a network gives one class to nearly all images and knows no more than that answer.

Such a network keeps its answer under every attack, so its robust accuracy is its clean one, which
looks like robustness.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.evaluation.network import checks

SHARE = 0.9  # of the images of other classes
_LEVEL = 0.95
_SIGMAS = 3
_KNOWS = 0.01  # of the images of other classes: what is right beyond chance, and is not knowledge
_REMEDY = (
    "go back to weights from before that, with a lower learning rate, a longer warm-up or a "
    "smaller radius at first (attack.warmup_epochs); of weights from elsewhere, check that all of "
    "them are loaded, and the preprocessing"
)


class Collapse(NamedTuple):
    """What a sample of answers says."""

    proven: bool  # False: too few images to tell
    words: str  # one sentence and its remedy


def of(answers: Any, labels: Any) -> Collapse | None:
    """Describe a network that has collapsed to one class; None: it has not.

    Relevant are the m images that are not labelled with the most frequent answer: if most images
    have one class, a sound network gives it to most. If it gives that answer to a share s of the m,
    it is right on at most 1 - s of them, so its accuracy is at most that of the constant answer and
    1 - s: of `SHARE` 0.9 a tenth. The share is there where Clopper and Pearson's bound to one side
    at 95% says so: 29 of 29, or 57 of 58. Its accuracy is at chance where the same answers, dealt
    to the images in any order, are right as often, by the mean and three standard deviations of
    that number (Hoeffding 1951, "A combinatorial central limit theorem", theorem 2), or by one in a
    hundred of the m images. A network that is barely trained, but whose few other answers are
    right, has not collapsed.

    Too few images show neither. From m = 5 on, the most frequent answer is that of most images, at
    95%: `proven` is False then. Fewer say nothing. Images with a negative answer, none, are left
    out.
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
        f"{int((answers == most).sum()):,} of {n:,} clean images are given class {most}, {k:,} of "
        f"the {m:,} of other classes among them, and {(answers == labels).mean():.1%} are right"
    )
    if least >= SHARE:
        sentence += (
            ", no more than such an answer explains: the network has collapsed to one class, and "
            f"keeping that answer under attack is not robustness; {_REMEDY}"
        )
        return Collapse(True, sentence)
    if least <= 0.5:
        return None
    return Collapse(
        False,
        f"{sentence}, which is how a network answers that has collapsed to one class; so few "
        f"images show only that at least {least:.0%} of the others get it (95% confidence): "
        "look at more before any accuracy is quoted",
    )


def proven(reached: dict[str, Any]) -> bool:
    """Tell whether an accuracy that `accuracy.count` measured is that of a collapsed network."""
    return bool((reached.get("collapse") or {}).get("proven"))


def flags(answers: Any, labels: Any) -> dict[str, str]:
    """Flag `collapsed` where `of` says so."""
    sentence = of(answers, labels)
    return {"collapsed": sentence.words} if sentence else {}


def beyond_chance(answers: np.ndarray, labels: np.ndarray) -> float:
    """Count the right answers beyond those of chance and three deviations of it."""
    n, classes = len(labels), int(max(answers.max(), labels.max())) + 1
    p, q = (np.bincount(column, minlength=classes) / n for column in (answers, labels))
    mean = float(p @ q)
    variance = n**2 / max(n - 1, 1) * (mean - p @ q**2 - q @ p**2 + mean**2)
    deviation = math.sqrt(max(float(variance), 0.0))
    return int((answers == labels).sum()) - n * mean - _SIGMAS * deviation
