"""One attack after the other on what still stands, verdict by verdict through the ledger."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust.attacks import MACHINES, Setting, ensembles
from jaxrobust.evaluation.engine import engine
from jaxrobust.evaluation.engine.ledger import Ledger
from jaxrobust.evaluation.engine.progress import Decisions
from jaxrobust.evaluation.network import checks, randomised, reliability
from jaxrobust.evaluation.network.images import ImageSet
from jaxrobust.evaluation.records.verdicts import REPLAY
from jaxrobust.runtime.devices import compilation
from jaxrobust.runtime.processes import hosts
from jaxrobust.types import Threat


class Cost(NamedTuple):
    """What an attack took; a pass is that of one image."""

    attack: str
    fooled: int
    forward: int
    backward: int
    idle: int  # forward passes in slots without an image
    seconds: float
    compile_seconds: float


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
        """Return images, labels and ids of some places."""
        return self.images[which], self.labels[which], self.ids[which]


class Found(NamedTuple):
    """What the attacks have found so far; they write into it."""

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
    ) -> "Found":
        """Return the verdicts before any attack, when an image stands if it is right as it is."""
        names = ["", "clean", *(s.name for s in settings), *(f"{s.name} (full)" for s in settings)]
        fooled_by = np.where(clean, 0, 1).astype(np.int8)
        own = None if once is None else once.copy()
        return cls(clean.copy(), fooled_by, [*names, REPLAY], flags, once=own)

    def without(self, aside: np.ndarray) -> "Found":
        """Return it for an attack that leaves some images aside."""
        stays = self.standing & aside
        once = None if self.once is None else self.once & ~stays
        return self._replace(standing=self.standing & ~stays, once=once, aside=int(stays.sum()))

    def take(self, attacked: "Found", aside: np.ndarray) -> None:
        """Take over what an attack left of `without(aside)`."""
        stays = self.standing & aside
        self.standing[:] = attacked.standing | stays
        if self.once is not None:
            self.once[:] &= attacked.once | stays

    def of_interest(self) -> np.ndarray:
        """Tell which images an attack must look at, bool[N]."""
        return self.standing if self.once is None else self.standing | self.once


class Attack:
    """One attack on all images that stand, from the ledger as far as it knows them."""

    def __init__(
        self,
        runner: engine.Engine,
        setting: Setting,
        sample: Sample,
        found: Found,
        book: Ledger,
        meter: Decisions,
        suffix: str = "",
        how: randomised.Verdict | None = None,
    ) -> None:
        self.how = how  # answers are judged; None: they are not random
        self.judged: dict[int, Judged] = {}  # images by some of their draws, while others are due
        self.runner, self.setting, self.sample, self.found = runner, setting, sample, found
        self.book, self.meter, self.suffix = book, meter, suffix
        self.name, self.classes = setting.name + suffix, sample.classes
        self.steps = self.idle = self.unconfirmed = 0  # of all processes after `join`
        self.waiting: list[engine.Verdict] = []  # for a last word, since `confirmed`
        self.confirmed = time.perf_counter()
        self.doubtful: set[int] = set()  # images with an adversarial example that did not hold
        self.compile_seconds = 0.0
        self.flat: list[bool] = []

    def run(self, later: int) -> Cost:
        """Decide every image; `later` passes are needed for one that survives this attack."""
        start, met = time.perf_counter(), int(self.found.standing.sum())
        pending = self.recall()
        mine, known = hosts.share(pending), met - len(pending)
        program = compilation.program(
            f"{self.name} on {self.runner.slots} slots", self.runner.logits_fn
        )
        seen = (known + len(mine), known, self.standing(), self.runner.slots)
        self.meter.begin(self.name, *seen, compilation.expected(program))
        with compilation.cache_hits() as hits:
            for call in self.meter.awaited(self.calls(mine)):
                if call.compiles and call.seconds > 1:
                    compilation.remember(program, call.seconds, hit=bool(hits))
                self.count(call, later // jax.process_count())
        self.join(mine, known)
        self.flag()
        return Cost(
            attack=self.name,
            fooled=met - int(self.found.standing.sum()),
            forward=self.steps * ensembles.forward(self.setting),
            backward=self.steps * ensembles.backward(self.setting, self.classes),
            idle=self.idle * ensembles.forward(self.setting),
            seconds=time.perf_counter() - start - self.compile_seconds,
            compile_seconds=self.compile_seconds,
        )

    def calls(self, mine: np.ndarray) -> Iterator[engine.Call]:
        """Return the calls of the engine, which decide these images."""
        sample = self.sample
        return engine.decide(
            self.runner,
            self.setting,
            sample.images,
            sample.labels,
            sample.ids,
            mine,
            ensembles.targets(self.setting, sample.ranks[mine]),
            epsilon=sample.threat.epsilon,
            seed=sample.seed,
            confirm=self.confirm,
        )

    def count(self, call: engine.Call, later: int) -> None:
        """Take note of what a call took."""
        self.steps += call.useful_steps
        self.idle += call.slot_steps - call.useful_steps
        self.compile_seconds += call.seconds * call.compiles
        made = call.useful_steps * ensembles.passes(self.setting, self.classes)
        most = ensembles.most_passes(self.setting, self.classes)
        self.meter.advance(made, call.seconds, call.compiles, most, later)

    def recall(self) -> np.ndarray:
        """Take over what the ledger knows; return the other images."""
        rows = self.book.rows(self.name)
        met = np.flatnonzero(self.found.of_interest() & rows["known"])
        self.flat = rows["flat"][met].tolist()
        fallen = met[rows["fooled"][met]]
        self.strike(fallen)
        if self.found.once is not None:
            self.found.once[met[rows["once"][met]]] = False
        for start in range(0, len(fallen), self.runner.slots):
            part = fallen[start : start + self.runner.slots]
            given = (self.runner, self.name, self.draw(), part, self.sample, self.book)
            refuse_damaged(*given, how=self.how)
        return np.flatnonzero(self.found.of_interest() & ~rows["known"])

    def confirm(self, verdicts: list[engine.Verdict], last: bool) -> list[engine.Verdict]:
        """Write what holds, and return what does not, once enough has come for a whole batch.

        Nothing waits for long, where it would be lost in a kill; with `last` nothing waits at all.
        """
        for verdict in verdicts:
            if verdict.fooled:
                self.waiting.append(verdict)
            else:
                self.write(verdict)
        due = last or len(self.waiting) >= self.runner.slots
        if not due and time.perf_counter() - self.confirmed <= 5:
            return []
        waiting, self.waiting, self.confirmed = self.waiting, [], time.perf_counter()
        parts = range(0, len(waiting), self.runner.slots)
        last_word = self.refuted if self.how is None else self.undecided
        return [v for i in parts for v in last_word(waiting[i : i + self.runner.slots])]

    def refuted(self, part: list[engine.Verdict]) -> list[engine.Verdict]:
        """Return the last word: one more forward pass, and the norm in float64."""
        images, labels, ids = self.sample.rows(np.array([v.image for v in part], int))
        points = np.stack([v.adversarial for v in part if v.adversarial is not None])
        points = engine.settled(self.runner, self.setting.norm, points, images)
        logits = logits_of(self.runner, points, ids, self.sample.seed, draw=self.draw())
        sure, norms = checks.verified(points, images, labels, logits, self.sample.threat)
        wrong, others = [], reached(logits, labels)
        for verdict, ok, norm, other, point in zip(part, sure, norms, others, points, strict=True):
            if ok:
                self.write(verdict, point, float(norm), int(other))
            else:
                wrong.append(verdict)
        self.doubtful |= {verdict.image for verdict in wrong}
        return wrong

    def undecided(self, part: list[engine.Verdict]) -> list[engine.Verdict]:
        """Judge points by draws, and return the verdicts of which a later job may still say more.

        By one draw, it is over with the first point that one draw called wrong, as in the
        reference; by the rule, once its draws call the strongest point wrong.
        """
        assert self.how is not None and self.found.once is not None
        images, labels, ids = self.sample.rows(np.array([v.image for v in part], int))
        points = np.stack([v.adversarial for v in part if v.adversarial is not None])
        pairs = points if points.ndim == 5 else np.stack([points, points], axis=1)
        latest, strongest = (
            engine.settled(self.runner, self.setting.norm, pairs[:, k], images) for k in (0, 1)
        )
        inside = lambda points: _inside(points, images, labels, self.sample)  # noqa: E731
        given: dict[str, Any] = {"seed": self.sample.seed, "draw": self.draw()}
        one = randomised.verdict(randomised.ONE)
        alone = answers_of(self.runner, one, latest, labels, ids, **given)
        ruled = answers_of(self.runner, self.how, strongest, labels, ids, **given)
        once = inside(latest)[0] & ~alone.right
        sure, norms = inside(strongest)
        sure &= ~ruled.right
        undecided = []
        for row, verdict in enumerate(part):
            image = verdict.image
            known = self.judged.pop(image, Judged())
            if known.once is None and np.isfinite(latest[row]).all():
                known = known._replace(once=bool(once[row]))
            if known.point is None and sure[row] and self.found.standing[image]:
                about = (strongest[row], float(norms[row]), int(ruled.reached[row]))
                known = Judged(known.once, *about)
            self.judged[image] = known
            by_one = known.once is not None or not self.found.once[image]
            by_rule = known.point is not None or not self.found.standing[image]
            if by_one and (by_rule or self.how.rule == randomised.ONE):
                self.write(verdict)
            else:
                undecided.append(verdict)
        return undecided

    def standing(self) -> int:
        """Count the images that are robust so far."""
        return int(self.found.standing.sum()) + self.found.aside

    def draw(self) -> int:
        """Return the number of the draw in a randomised network's last forward pass.

        0 is that of the clean images.
        """
        return 1 + ensembles.named(self.setting.name).number

    def write(
        self,
        verdict: engine.Verdict,
        adversarial: np.ndarray | None = None,
        norm: float = 0.0,
        other: int = -1,
    ) -> None:
        """Write a verdict into the ledger; `other` is the class that was reached.

        Of a randomised network it is what draws have said.
        """
        by_one: dict[str, bool] = {}
        if self.found.once is not None:
            known = self.judged.pop(verdict.image, Judged())
            by_one = {"once": bool(known.once)}
            adversarial, norm, other = known.point, known.norm, known.reached
            self.found.once[verdict.image] &= not known.once
        record = {
            "attack": self.name,
            "fooled": adversarial is not None,
            **by_one,
            "target": verdict.target,
            "restart": verdict.restart,
            "iterations": verdict.steps,
            "norm": norm,
            "reached": other,
            "seed": self.sample.seed,
            "flat": verdict.flat,
        }
        self.book.add(verdict.image, record, adversarial)
        self.flat.append(verdict.flat)
        if adversarial is not None:
            self.strike(verdict.image)
        each = ensembles.passes(self.setting, self.classes)
        self.meter.decided(self.standing(), verdict.steps * each, fooled=adversarial is not None)

    def strike(self, which: Any) -> None:
        """Take note that images are fooled."""
        strike(self.found, self.name, which)

    def join(self, mine: np.ndarray, known: int) -> None:
        """Take over what the other processes found, and add up what all of them took."""
        rows = self.book.rows(self.name)
        fallen, once = mine[rows["fooled"][mine]], mine[rows["once"][mine]]
        unconfirmed = sum(self.found.standing[list(self.doubtful)])
        counts = np.array([self.steps, self.idle, unconfirmed])
        own = self.book.found(fallen, self.name)
        parts = hosts.everyone((fallen, own, self.flat[known:], counts, once))
        for process, (which, theirs, _, _, by_one) in enumerate(parts):
            self.book.take_over(process, which, self.name, theirs)
            self.strike(which)
            if self.found.once is not None:
                self.found.once[by_one] = False
        self.flat[known:] = [flat for part in parts for flat in part[2]]
        sums = np.sum([part[3] for part in parts], axis=0)
        self.steps, self.idle, self.unconfirmed = sums.tolist()

    def flag(self) -> None:
        """Flag what this attack makes doubtful."""
        flags = self.found.flags
        untargeted = not (self.setting.targets or self.suffix)
        if untargeted and MACHINES[self.setting.machine].flat:
            flags.update(reliability.check_gradients(np.array(self.flat, bool)))
        if self.unconfirmed:
            flags[f"unconfirmed by {self.name}"] = (
                f"{self.unconfirmed} images were fooled in the search but not in a last forward "
                "pass, or left the ball, nor was anything else found in the steps after; they "
                "count as robust. Numerics that depend on the batch do this: look for batch "
                "statistics, or compare with batch_size=1"
            )


class Judged(NamedTuple):
    """What the draws have said so far of an image of a randomised network."""

    once: bool | None = None  # fooled by one draw, as the reference judges; None: not judged yet
    point: np.ndarray | None = None  # f32[H,W,C], that fools it by the rule
    norm: float = 0.0
    reached: int = -1


def _inside(
    points: np.ndarray, images: np.ndarray, labels: np.ndarray, sample: Sample
) -> tuple[np.ndarray, np.ndarray]:
    """Tell which points are in the ball and in [0, 1], bool[n], and their norms, f64[n]."""
    wrong = ~np.eye(sample.classes, dtype=bool)[labels]  # whatever the logits
    return checks.verified(points, images, labels, wrong, sample.threat)


_APART = 1000  # between the numbers of an image's draws; each of them counts from less


def answers_of(
    runner: engine.Engine,
    how: randomised.Verdict,
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


def strike(found: Found, name: str, which: Any) -> None:
    """Take note that an attack has fooled images."""
    found.standing[which] = False
    found.fooled_by[which] = found.names.index(name)


def refuse_damaged(
    runner: engine.Engine,
    name: str,
    draw: int,
    which: np.ndarray,
    sample: Sample,
    book: Ledger,
    how: randomised.Verdict | None = None,
) -> None:
    """Refuse up to `slots` adversarial images of the ledger that are none, by more than rounding.

    The ledger learns the classes that they reach, where an older version did not note them.
    Raises:
      ValueError: with the image, and what to do.
    """
    images, labels, ids = sample.rows(which)
    shape = images.shape[1:]
    points = np.stack([book.adversarial(i, name, shape) for i in which.tolist()])
    own = np.eye(sample.classes, dtype=bool)[labels]
    inside, _ = checks.verified(points, images, labels, ~own, sample.threat)  # whatever the logits
    if how is None:
        logits = logits_of(runner, points, ids, sample.seed, draw=draw)
        with np.errstate(invalid="ignore"):  # infinite ones
            margins = logits[own] - np.where(own, -np.inf, logits).max(axis=1)
            right = margins > hosts.ROUNDING * np.ptp(logits, axis=1)
        others = reached(logits, labels)
    else:
        said = answers_of(runner, how, points, labels, ids, seed=sample.seed, draw=draw)
        right, others = said.right, said.reached
    for i, there, stands in zip(which, inside, right, strict=True):
        if stands or not there:
            why = "does not fool this network" if there else "is outside the ball"
            raise ValueError(
                f"the ledger's adversarial image of {name} on image {sample.ids[i]} "
                f"{why}: its .images file is damaged or another evaluation's; remove both files"
            )
    noted = book.rows(name)["reached"][which]
    book.rows(name)["reached"][which] = np.where(noted < 0, others, noted)


def reached(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the likeliest wrong class by logits f[n,K], i[n]; -1 where one is not finite."""
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
