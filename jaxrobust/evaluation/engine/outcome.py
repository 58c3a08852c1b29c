"""A running evaluation: its images, what the attacks have found, the passes that decide."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust.attacks import Setting, ensembles
from jaxrobust.evaluation.engine import engine
from jaxrobust.evaluation.engine.ledger import Ledger
from jaxrobust.evaluation.engine.schedule import Sample
from jaxrobust.evaluation.network import checks, randomised
from jaxrobust.evaluation.network.images import ImageSet
from jaxrobust.evaluation.records.verdicts import REPLAY
from jaxrobust.runtime.processes import hosts
from jaxrobust.types import unmasked

_APART = 1000  # between the numbers of an image's draws; `draw` itself is smaller


class Cost(NamedTuple):
    """The cost of an attack; a pass is of one image."""

    attack: str
    fooled: int
    forward: int
    backward: int
    idle: int  # forward passes in slots without an image
    seconds: float
    compile_seconds: float

    def plus(self, other: "Cost") -> "Cost":
        """Add the cost of the same attack on other images."""
        counts: Any = (a + b for a, b in zip(self[1:], other[1:], strict=True))
        return Cost(self.attack, *counts)


class Outcome(NamedTuple):
    """The attacks' verdicts so far, updated in place."""

    standing: np.ndarray  # bool[N]
    fooled_by: np.ndarray  # i8[N], a place in `names`
    names: list[str]  # "", "clean", then the attacks
    flags: dict[str, str]
    aside: int = 0  # other survivors, which are not attacked
    once: np.ndarray | None = None  # bool[N], standing by one draw; None: not randomized

    @classmethod
    def of(
        cls,
        clean: np.ndarray,
        settings: Sequence[Setting],
        flags: dict[str, str],
        once: np.ndarray | None,
    ) -> "Outcome":
        """Start with the verdicts before any attack: correctly classified images survive."""
        names = ["", "clean", *(s.name for s in settings), *(f"{s.name} (full)" for s in settings)]
        fooled_by = np.where(clean, 0, 1).astype(np.int8)
        once = None if once is None else once.copy()
        return cls(clean.copy(), fooled_by, [*names, REPLAY], flags, once=once)

    def without(self, aside: np.ndarray) -> "Outcome":
        """Set some images aside for one attack, which collects its own flags."""
        stays = self.standing & aside
        once = None if self.once is None else self.once & ~stays
        return self._replace(
            standing=self.standing & ~stays, once=once, aside=int(stays.sum()), flags={}
        )

    def take(self, attacked: "Outcome", aside: np.ndarray) -> None:
        """Adopt the verdicts of an attack that ran on `without(aside)`."""
        stays = self.standing & aside
        self.standing[:] = attacked.standing | stays
        if self.once is not None:
            self.once[:] &= attacked.once | stays

    def strike(self, name: str, places: Any) -> None:
        """Mark images as fooled by an attack."""
        self.standing[places] = False
        self.fooled_by[places] = self.names.index(name)

    def of_interest(self) -> np.ndarray:
        """Mark the surviving images that an attack must still try, bool[N]."""
        return self.standing if self.once is None else self.standing | self.once


class AttackContext(NamedTuple):
    """Everything an attack needs."""

    runner: engine.Engine
    sample: Sample
    outcome: Outcome
    book: Ledger
    rule: randomised.VerdictRule | None = None  # judges answers; None: not randomized

    def recall_fooled(self, name: str) -> None:
        """Mark the standing images that an attack fools according to the ledger."""
        places = np.flatnonzero(self.outcome.standing & self.book.rows(name)["fooled"])
        refuse_damaged(self, name, 0, places)
        self.outcome.strike(name, places)

    def exchange_fooled(self, name: str, places: np.ndarray) -> int:
        """Tell all processes which of this one's images an attack fools; return the total."""
        fallen = places[~self.outcome.standing[places]]
        parts = hosts.everyone((fallen, self.book.results(fallen, name)))
        for process, (others, results) in enumerate(parts):
            self.book.take_over(process, others, name, results)
            self.outcome.strike(name, others)
        return sum(len(others) for others, _ in parts)


def classified(
    runner: engine.Engine,
    images: ImageSet,
    labels: np.ndarray,
    ids: np.ndarray,
    *,
    seed: int,
    count: int,
    rule: randomised.VerdictRule | None,
) -> tuple[np.ndarray, ...]:
    """Classify clean images: bool[N] right, right by one draw, finite and sure; wrong classes.

    An answer is sure if rounding cannot change it; for a randomized network none counts as sure.
    The last array, u[N, count], holds the likeliest wrong classes. Each process computes a share,
    and all return the same arrays.
    """
    mine = hosts.share(np.arange(len(images)))
    clean, once, finite, sure = np.zeros((4, len(images)), bool)
    likely = np.zeros((len(images), count), np.min_scalar_type(runner.traces[0].classes))
    for start in range(0, len(mine), runner.slots):
        part = mine[start : start + runner.slots]
        rows = (images[part], labels[part], ids[part])
        if rule is None:
            logits = engine.forward(runner, rows[0], rows[2], seed=seed)
            clean[part] = once[part] = checks.is_right(logits, rows[1])
            finite[part] = checks.answered(logits)
            with np.errstate(invalid="ignore"):  # infinite logits
                second, first = np.partition(logits, (-2, -1), axis=1)[:, -2:].T
                rounding = hosts.ROUNDING * np.ptp(logits[:, unmasked(logits)], axis=1)
                sure[part] = finite[part] & (first - second > 2 * rounding)
        else:
            answers = answers_of(runner, rule, *rows, seed=seed, draw=0)
            clean[part], once[part], finite[part], _, logits = answers
        likely[part] = ensembles.ranks(logits, rows[1], count)
    arrays = (clean, once, finite, sure, likely)
    for process, shares in enumerate(hosts.everyone([array[mine] for array in arrays])):
        for array, share in zip(arrays, shares, strict=True):
            array[process :: jax.process_count()] = share
    return arrays


def within(
    points: np.ndarray, images: np.ndarray, labels: np.ndarray, sample: Sample
) -> tuple[np.ndarray, np.ndarray]:
    """Mark points in the ball and in [0, 1], bool[n], and measure their norms, f64[n]."""
    wrong = ~np.eye(sample.classes, dtype=bool)[labels]  # logits of a wrong answer: none refuses
    return checks.verified(points, images, labels, wrong, sample.threat)


def answers_of(
    runner: engine.Engine,
    rule: randomised.VerdictRule,
    images: np.ndarray,
    labels: np.ndarray,
    ids: np.ndarray,
    *,
    seed: int,
    draw: int,
) -> randomised.Answers:
    """Judge a randomized network's answers to n >= 0 images.

    The draws depend only on the seed, an image's id and `draw`, not on its batch.
    """

    def forward(number: int) -> np.ndarray:
        return engine.forward(runner, images, ids, seed=seed, draw=draw + _APART * number)

    return randomised.answers(forward, rule, labels, runner.traces[0].classes)


def refuse_damaged(evaluation: AttackContext, name: str, draw: int, places: np.ndarray) -> None:
    """Raise if stored adversarial images fail to fool the network by more than rounding."""
    runner, sample, _, book, rule = evaluation
    for start in range(0, len(places), runner.slots):
        part = places[start : start + runner.slots]
        images, labels, ids = sample.rows(part)
        points = np.stack([book.adversarial(i, name, images.shape[1:]) for i in part.tolist()])
        inside, _ = within(points, images, labels, sample)
        if rule is None:
            logits = engine.forward(runner, points, ids, seed=sample.seed, draw=draw)
            is_label = np.eye(sample.classes, dtype=bool)[labels]
            with np.errstate(invalid="ignore"):  # infinite logits
                margins = logits[is_label] - np.where(is_label, -np.inf, logits).max(axis=1)
                spread = np.ptp(logits[:, unmasked(logits)], axis=1)
                right = margins > hosts.ROUNDING * spread
            others = reached(logits, labels)
        else:
            answers = answers_of(runner, rule, points, labels, ids, seed=sample.seed, draw=draw)
            right, others = answers.right, answers.reached
        for image, is_inside, stands in zip(ids, inside, right, strict=True):
            if stands or not is_inside:
                why = "does not fool this network" if is_inside else "is outside the ball"
                raise ValueError(
                    f"the ledger's adversarial image from {name} for image {image} {why}: its "
                    ".images file is damaged or from another evaluation; remove it and the ledger"
                )
        stored = book.rows(name)["reached"][part]
        book.rows(name)["reached"][part] = np.where(stored < 0, others, stored)


def confirmed(
    evaluation: AttackContext, points: np.ndarray, places: np.ndarray, draw: int
) -> tuple[np.ndarray, ...]:
    """Settle points and run a last pass; return points, bool[n] fooled, norms and classes."""
    runner, sample = evaluation.runner, evaluation.sample
    images, labels, ids = sample.rows(places)
    points = engine.settled(runner, sample.threat.norm, points, images)
    logits = engine.forward(runner, points, ids, seed=sample.seed, draw=draw)
    sure, norms = checks.verified(points, images, labels, logits, sample.threat)
    return points, sure, norms, reached(logits, labels)


def reached(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Find the likeliest wrong class by logits f[n,K], i[n]; -1 if a logit is not finite."""
    wrong = np.array(logits, np.float64)
    wrong[np.arange(len(labels)), labels] = -np.inf
    return np.where(checks.answered(logits), wrong.argmax(axis=1), -1)
