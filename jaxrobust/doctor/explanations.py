"""Changes of the images or the class order that would raise a network's accuracy.

Each explanation is tried, and only the best one counts, if it raises the accuracy considerably. So
a network that normalizes twice is not blamed for the order of its classes.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment  # JAX depends on SciPy

from jaxrobust.doctor.patient import Patient
from jaxrobust.evaluation.network.checks import is_right
from jaxrobust.weights.naming.compose import NORMALIZATIONS

RANGE, MISSING, TWICE = "input-range", "missing-normalisation", "double-normalisation"
CHANNELS, ORDER = "channel-order", "label-order"
ALL = (RANGE, MISSING, TWICE, CHANNELS, ORDER)
# Gains in accuracy for red and yellow, beyond chance and a network's preference for contrast.
GAIN, _SOME, _DEVIATIONS = 0.1, 0.04, 3.5


class Tried(NamedTuple):
    """A change that was tried, and its effect on the network."""

    check: str
    done: str
    accuracy: float
    loss: float
    gain: float  # in accuracy
    deviations: float  # significance of the gain in standard deviations


def tried(patient: Patient) -> list[Tried]:
    """Try all explanations, first those by changes of the images."""
    done = []
    for check, words, change in _changes(patient.images.shape[-1]):
        logits = patient.forward(np.ascontiguousarray(change(patient.images), np.float32))
        done.append(compared(check, words, patient.logits, logits, patient.labels))
    return [*done, *_of_orders(patient)]


def best(explanations: list[Tried], classes: int, count: int) -> Tried | None:
    """Choose the explanation with the highest accuracy, on ties with the lowest loss, among those
    that are significant and better than guessing.
    """
    chance = 1 / classes
    floor = chance + 3 * (chance * (1 - chance) / max(count, 1)) ** 0.5
    worth = [e for e in explanations if e.gain > _SOME and e.deviations > _DEVIATIONS]
    above = [e for e in worth if e.accuracy > floor]
    return max(above, key=lambda e: (round(e.accuracy, 2), -e.loss), default=None)


def _changes(channels: int) -> Iterator[tuple[str, str, Callable[[np.ndarray], np.ndarray]]]:
    yield RANGE, "images in 0..255", lambda x: 255 * x
    for name, (mean, std) in NORMALIZATIONS.items():
        # RobustART's larger scale lowers the loss of networks that expect another normalization,
        # and those that expect it are also explained by CIFAR-10's.
        if name in ("none", "cifar10-robustart"):
            continue
        m, s = (np.asarray(v, np.float32) for v in (mean, std))
        if channels == 1:
            m, s = m.mean(keepdims=True), s.mean(keepdims=True)
        if len(m) not in (1, channels):
            continue
        words = "[-1, 1] (mean 0.5, std 0.5)" if name == "half" else f"the {name} normalization"
        yield MISSING, words, lambda x, m=m, s=s: (x - m) / s  # type: ignore[misc]
        yield TWICE, words, lambda x, m=m, s=s: x * s + m  # type: ignore[misc]
    if channels == 3:
        yield CHANNELS, "BGR", lambda x: x[..., ::-1]


def losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute the cross-entropies f[N] of logits f[N,K]; all infinite unless all are finite."""
    if not np.isfinite(logits).all():
        return np.full(len(labels), np.inf)
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    picked = shifted[np.arange(len(labels)), labels]
    return np.log(np.exp(shifted).sum(axis=1)) - picked


def compared(
    check: str, done: str, old_logits: np.ndarray, new_logits: np.ndarray, labels: np.ndarray
) -> Tried:
    """Compare logits before and after a change, image by image.

    The deviations are those of a sign test on images whose verdict changes. From two on, those of
    the difference in loss count too, if larger. That test is sharper, because accuracy ignores
    images whose verdict stays.
    """
    was, is_now = is_right(old_logits, labels), is_right(new_logits, labels)
    won, lost = int((is_now & ~was).sum()), int((was & ~is_now).sum())
    deviations = (won - lost) / max(won + lost, 1) ** 0.5
    loss, earlier = losses(new_logits, labels), losses(old_logits, labels)
    if deviations >= 2 and np.isfinite(loss).all() and np.isfinite(earlier).all():
        less = earlier - loss
        spread = max(float(less.std()), 1e-12)
        deviations = max(deviations, float(less.mean()) / spread * len(less) ** 0.5)
    gain = (won - lost) / max(len(labels), 1)
    return Tried(check, done, float(is_now.mean()), float(loss.mean()), gain, deviations)


def _usual_orders(names: tuple[str, ...], count: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield common ways to number classes, i[K]: output i means class order[i]."""
    numbers = np.arange(count)
    yield "classes shifted by -1", np.roll(numbers, 1)
    yield "classes shifted by 1", np.roll(numbers, -1)
    yield "classes in the opposite order", numbers[::-1]
    texts = {"their numbers as text (10 before 2)": [str(k) for k in range(count)]}
    if len(names) == count:
        texts |= {"their names": list(names), "their names in lower case": [*map(str.lower, names)]}
    for by, keys in texts.items():
        order = np.asarray(sorted(range(count), key=keys.__getitem__))
        if (order != numbers).any():
            yield f"classes sorted by {by}", order
            yield f"classes as before they were sorted by {by}", np.argsort(order)


def _of_orders(patient: Patient) -> Iterator[Tried]:
    """Try the usual orders of the classes; with at least four images per class, also find the best
    order on one half of the images, and try it on the other.
    """
    logits, labels = patient.logits, patient.labels
    classes = logits.shape[1]
    if not np.isfinite(logits).all():
        return
    for words, order in _usual_orders(patient.classes, classes):
        yield compared(ORDER, words, logits, logits[:, np.argsort(order)], labels)
    if len(labels) < 4 * classes:
        return
    order, judged = permutation(logits, labels)
    if (order != np.arange(classes)).any():
        words, half = _described(order, patient.classes), logits[judged]
        yield compared(ORDER, words, half, half[:, np.argsort(order)], labels[judged])


def permutation(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the order of classes that fits one half of the images best, i[K]: output i means class
    order[i] (Kuhn 1955, on the confusion matrix); also return the other half, i[n], to test it.
    """
    classes = logits.shape[1]
    mixed = np.random.default_rng(0).permutation(len(labels))
    counted, judged = np.split(mixed, [len(labels) // 2])
    table = np.zeros((classes, classes))
    np.add.at(table, (logits[counted].argmax(axis=1), labels[counted]), 1)
    table += 0.5 * np.eye(classes)  # classes without images keep their place
    return linear_sum_assignment(-table)[1], judged


def _described(order: np.ndarray, names: tuple[str, ...]) -> str:
    count = len(order)
    for words, usual in _usual_orders(names, count):
        if (order == usual).all():
            return words

    moved = np.flatnonzero(order != np.arange(count))
    moves = []
    for k in moved[:10]:
        name = names[order[k]] if len(names) == count else str(order[k])
        suffix = "" if name == str(order[k]) else f" ({name})"
        moves.append(f"output {k} is class {order[k]}{suffix}")
    return ", ".join(moves + ["..."] * (len(moved) > 10))
