"""An evaluation under way: its images, what the attacks have come to, the passes that decide."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.attacks import Setting
from jaxrobust.evaluation.engine import engine
from jaxrobust.evaluation.engine.ledger import Ledger
from jaxrobust.evaluation.network import checks, randomised
from jaxrobust.evaluation.network.images import ImageSet
from jaxrobust.evaluation.records.verdicts import REPLAY
from jaxrobust.runtime.processes import hosts
from jaxrobust.types import Threat, unmasked

_APART = 1000  # between the numbers of an image's draws; each of them counts from less


class Cost(NamedTuple):
    """What an attack took; a pass is that of one image."""

    attack: str
    fooled: int
    forward: int
    backward: int
    idle: int  # forward passes in slots without an image
    seconds: float
    compile_seconds: float

    def plus(self, other: "Cost") -> "Cost":
        """Add what the same attack took on other images."""
        counts: Any = (a + b for a, b in zip(self[1:], other[1:], strict=True))
        return Cost(self.attack, *counts)


class Sample(NamedTuple):
    """What is evaluated, N images of K classes."""

    images: ImageSet
    labels: np.ndarray  # i32[N]
    ids: np.ndarray  # u32[N]
    clean: np.ndarray  # bool[N], classified correctly
    ranks: np.ndarray  # u[N, T], the likeliest wrong classes
    classes: int  # K
    threat: Threat
    seed: int

    def rows(self, which: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Look up images, labels and ids of some places."""
        return self.images[which], self.labels[which], self.ids[which]


class Outcome(NamedTuple):
    """What the attacks have come to so far; they write into it."""

    standing: np.ndarray  # bool[N]
    fooled_by: np.ndarray  # i8[N], a place in `names`
    names: list[str]  # "", "clean", then the attacks
    flags: dict[str, str]
    aside: int = 0  # images that stand beside these and are not attacked
    once: np.ndarray | None = None  # bool[N], standing by one draw; None: draws decide nothing

    @classmethod
    def of(
        cls,
        clean: np.ndarray,
        settings: Sequence[Setting],
        flags: dict[str, str],
        once: np.ndarray | None,
    ) -> "Outcome":
        """Begin with the verdicts before any attack: an image stands if it is right as it is."""
        names = ["", "clean", *(s.name for s in settings), *(f"{s.name} (full)" for s in settings)]
        fooled_by = np.where(clean, 0, 1).astype(np.int8)
        own = None if once is None else once.copy()
        return cls(clean.copy(), fooled_by, [*names, REPLAY], flags, once=own)

    def without(self, aside: np.ndarray) -> "Outcome":
        """Leave some images aside, for one attack."""
        stays = self.standing & aside
        once = None if self.once is None else self.once & ~stays
        return self._replace(standing=self.standing & ~stays, once=once, aside=int(stays.sum()))

    def take(self, attacked: "Outcome", aside: np.ndarray) -> None:
        """Take over what an attack left of `without(aside)`."""
        stays = self.standing & aside
        self.standing[:] = attacked.standing | stays
        if self.once is not None:
            self.once[:] &= attacked.once | stays

    def strike(self, name: str, which: Any) -> None:
        """Take note that an attack has fooled images."""
        self.standing[which] = False
        self.fooled_by[which] = self.names.index(name)

    def of_interest(self) -> np.ndarray:
        """Mark the images that stand and that an attack must look at, bool[N]."""
        return self.standing if self.once is None else self.standing | self.once


class AttackContext(NamedTuple):
    """All that an attack works with."""

    runner: engine.Engine
    sample: Sample
    outcome: Outcome
    book: Ledger
    how: randomised.VerdictRule | None = None  # answers are judged; None: they are not random


def within(
    points: np.ndarray, images: np.ndarray, labels: np.ndarray, sample: Sample
) -> tuple[np.ndarray, np.ndarray]:
    """Mark points that are in the ball and in [0, 1], bool[n], and measure their norms, f64[n]."""
    wrong = ~np.eye(sample.classes, dtype=bool)[labels]  # whatever the logits
    return checks.verified(points, images, labels, wrong, sample.threat)


def answers_of(
    runner: engine.Engine,
    how: randomised.VerdictRule,
    images: np.ndarray,
    labels: np.ndarray,
    ids: np.ndarray,
    *,
    seed: int,
    draw: int,
) -> randomised.Answers:
    """Judge a randomised network's answers to some images, of which there may be none.

    The draws derive from the seed, an image's id and `draw` alone, not from its batch.
    """

    def forward(number: int) -> np.ndarray:
        return logits_of(runner, images, ids, seed, draw=draw + _APART * number)

    return randomised.answers(forward, how, labels, runner.traces[0].classes)


def refuse_damaged(evaluation: AttackContext, name: str, draw: int, which: np.ndarray) -> None:
    """Refuse adversarial images of the ledger that are none, by more than rounding."""
    slots = evaluation.runner.slots
    for start in range(0, len(which), slots):
        _refuse_damaged(evaluation, name, draw, which[start : start + slots])


def _refuse_damaged(evaluation: AttackContext, name: str, draw: int, which: np.ndarray) -> None:
    runner, sample, _, book, how = evaluation
    images, labels, ids = sample.rows(which)
    points = np.stack([book.adversarial(i, name, images.shape[1:]) for i in which.tolist()])
    inside, _ = within(points, images, labels, sample)
    own = np.eye(sample.classes, dtype=bool)[labels]
    if how is None:
        logits = logits_of(runner, points, ids, sample.seed, draw=draw)
        with np.errstate(invalid="ignore"):  # infinite ones
            margins = logits[own] - np.where(own, -np.inf, logits).max(axis=1)
            spread = np.ptp(logits[:, unmasked(logits)], axis=1)
            right = margins > hosts.ROUNDING * spread
        others = reached(logits, labels)
    else:
        answers = answers_of(runner, how, points, labels, ids, seed=sample.seed, draw=draw)
        right, others = answers.right, answers.reached
    for i, there, stands in zip(which, inside, right, strict=True):
        if stands or not there:
            why = "does not fool this network" if there else "is outside the ball"
            raise ValueError(
                f"the ledger's adversarial image of {name} on image {sample.ids[i]} "
                f"{why}: its .images file is damaged or another evaluation's; remove both files"
            )
    noted = book.rows(name)["reached"][which]
    book.rows(name)["reached"][which] = np.where(noted < 0, others, noted)


def confirmed(
    evaluation: AttackContext, points: np.ndarray, which: np.ndarray, draw: int
) -> tuple[np.ndarray, ...]:
    """Settle points; say which fool the network in a last pass, their norms, what they reach."""
    runner, sample = evaluation.runner, evaluation.sample
    images, labels, ids = sample.rows(which)
    points = engine.settled(runner, sample.threat.norm, points, images)
    logits = logits_of(runner, points, ids, sample.seed, draw=draw)
    sure, norms = checks.verified(points, images, labels, logits, sample.threat)
    return points, sure, norms, reached(logits, labels)


def reached(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Find the likeliest wrong class by logits f[n,K], i[n]; -1 where one is not finite."""
    wrong = np.array(logits, np.float64)
    wrong[np.arange(len(labels)), labels] = -np.inf
    return np.where(checks.answered(logits), wrong.argmax(axis=1), -1)


def logits_of(
    runner: engine.Engine, images: np.ndarray, ids: np.ndarray, seed: int, *, draw: int
) -> np.ndarray:
    """Compute the logits f32[n, K] of some images, of which there may be none."""
    if not len(images):
        return np.zeros((0, runner.traces[0].classes), np.float32)
    return engine.forward(runner, images, ids, seed=seed, draw=draw)
