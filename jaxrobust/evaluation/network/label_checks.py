"""Checks of labels against the answers to clean images: their classes and order."""

from typing import Any

import numpy as np

from jaxrobust.data.splits import balance
from jaxrobust.evaluation.network import reliability
from jaxrobust.evaluation.network.reliability import Flags

_GAIN = 0.1  # of the images
_SIGMAS = 5
_CLASSES = 2000  # above which a matrix of answers is too large
_SHOWN = 5


def check_answers(answers: Any, labels: Any, classes: int, *, complete: bool = False) -> Flags:
    """Flag `low-accuracy` and `permuted-labels` by the answers i[N] to clean images; -1: none.

    If these are all images of an evaluation (`complete`), add `balance.flags`.
    """
    answers, labels = np.asarray(answers), np.asarray(labels)
    flags = reliability.check_accuracy(answers == labels, classes)
    flags |= _permuted(answers, labels, classes)
    return flags | (balance.flags(labels, classes) if complete else {})


def _permuted(answers: np.ndarray, labels: np.ndarray, classes: int) -> Flags:
    """Flag labels that are a permutation of the network's classes."""
    # Each half of the images is used to interpret the labels of the other half, so chance gains
    # nothing. The gain must exceed a tenth of the images and five standard deviations.
    by_label = np.argsort(labels, kind="stable")
    answers, labels = answers[by_label], labels[by_label]
    if len(labels) < reliability.ENOUGH or classes > _CLASSES:
        return {}
    right, even = answers == labels, np.arange(len(labels)) % 2 == 0
    matched = np.zeros(len(labels), bool)
    for half in (even, ~even):
        meaning = _meaning(answers[half], labels[half], classes)
        matched[~half] = meaning[labels[~half]] == answers[~half]
    gained, lost = int((matched & ~right).sum()), int((right & ~matched).sum())
    if gained - lost <= max(_GAIN * len(labels), _SIGMAS * (gained + lost) ** 0.5):
        return {}
    meaning, present = _meaning(answers, labels, classes), np.unique(labels)
    moved = present[meaning[present] != present]
    steps = np.unique((meaning[moved] - moved) % classes)
    if len(steps) == 1 and len(moved) == len(present):
        step = int(steps[0]) if steps[0] <= classes / 2 else int(steps[0]) - classes
        words = f"if all labels were {abs(step)} {'higher' if step > 0 else 'lower'}"
    else:
        shown = ", ".join(f"{label} as {meaning[label]}" for label in moved[:_SHOWN])
        words = f"if labels were renumbered ({shown}{', ...' * (len(moved) > _SHOWN)})"
    return {
        "permuted-labels": f"{right.mean():.1%} of {len(labels)} clean images are classified "
        f"correctly, but {matched.mean():.1%} would be {words}: the data set numbers its classes "
        "differently from the network; check the order and number of the class folders, and "
        "whether labels start at 0"
    }


def _meaning(answers: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Match labels and answers one to one, i[classes], to maximize accuracy."""
    from scipy.optimize import linear_sum_assignment  # its import takes 0.1 s

    answered = answers >= 0
    counts = np.zeros((classes, classes))
    np.add.at(counts, (labels[answered], answers[answered]), 1)
    return np.asarray(linear_sum_assignment(counts + np.eye(classes) / 2, maximize=True)[1])
