"""One attack on the images that survive, verdict by verdict through the ledger."""

import time
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust.attacks import MACHINES, Setting, ensembles
from jaxrobust.attacks.geometry import malt
from jaxrobust.evaluation.engine import engine, outcome, slots
from jaxrobust.evaluation.engine.evaluation_progress import Decisions
from jaxrobust.evaluation.engine.ledger import PART
from jaxrobust.evaluation.engine.outcome import AttackContext, Cost
from jaxrobust.evaluation.engine.schedule import Aims, ImageVerdict
from jaxrobust.evaluation.network import randomised, reliability
from jaxrobust.runtime.devices import compilation
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text import spelling


def ordering(setting: Setting, full: Setting) -> tuple[int, int]:
    """Count the forward and backward passes that ordering an image's targets takes."""
    count = full.targets if setting.targets < full.targets else 0
    return min(count, 1), count


class Judged(NamedTuple):
    """The verdicts so far of a randomized network's draws on an image."""

    once: bool | None = None  # fooled by one draw, as the reference judges; None: not judged yet
    point: np.ndarray | None = None  # f32[H,W,C], adversarial by the rule
    norm: float = 0.0
    reached: int = -1


class Attack:
    """One attack on all surviving images; verdicts in the ledger are reused.

    If `setting` has fewer targets or restarts than `full`, only the first jobs of that attack run,
    at its nearest targets. An image that they fool has the attack's verdict; for other images the
    ledger notes which jobs were done.
    """

    def __init__(
        self,
        evaluation: AttackContext,
        setting: Setting,
        meter: Decisions,
        full: Setting | None = None,
        suffix: str = "",
    ) -> None:
        self.evaluation, self.setting, self.meter, self.suffix = evaluation, setting, meter, suffix
        self.full, self.in_parts = full or setting, full is not None
        self.runner, self.sample, self.outcome, self.book, self.rule = evaluation
        self.judged: dict[int, Judged] = {}  # images judged by some draws, with others pending
        self.name, self.classes = setting.name + suffix, self.sample.classes
        # Summed over processes by `join`; `ordered`: images whose targets were put in order.
        self.steps = self.idle = self.unconfirmed = self.ordered = 0
        self.waiting: list[ImageVerdict] = []  # to be confirmed, since the time `confirmed`
        self.confirmed = time.perf_counter()
        self.doubtful: set[int] = set()  # images with an adversarial example that did not hold
        self.doubted = 0  # doubtful images recorded in the ledger
        self.targets: dict[int, list[int]] = {}  # of each image, when only some are attacked
        self.compile_seconds = 0.0
        self.flat: list[bool] = []

    def run(self, later: int) -> Cost:
        """Decide every image; one that survives this attack needs `later` more passes."""
        start, met = time.perf_counter(), int(self.outcome.standing.sum())
        pending = self.recall()
        mine, decided = hosts.share(pending), met - len(pending)
        label = f"{self.name} on {self.runner.slots} slots"
        program = compilation.program(label, self.runner.logits_fn)
        counts = (decided + len(mine), decided, self.standing(), self.runner.slots)
        self.meter.begin(self.name, *counts, compilation.expected(program))
        calls = engine.decide(
            self.runner,
            self.setting,
            self.sample,
            mine,
            self.aims(mine),
            confirm=self.confirm,
        )
        most = ensembles.most_passes(self.setting, self.classes)
        per_step = ensembles.passes(self.setting, self.classes)
        with compilation.cache_hits() as hits:
            for call in self.meter.awaited(calls):
                if call.compiles and call.seconds > 1:
                    compilation.remember(program, call.seconds, hit=bool(hits))
                self.steps += call.useful_steps
                self.idle += call.slot_steps - call.useful_steps
                self.compile_seconds += call.seconds * call.compiles
                passes, share = call.useful_steps * per_step, later // jax.process_count()
                self.meter.advance(passes, call.seconds, call.compiles, most, share)
        self.join(mine, decided)
        self.flag()
        forward, backward = (self.ordered * count for count in ordering(self.setting, self.full))
        return Cost(
            attack=self.name,
            fooled=met - int(self.outcome.standing.sum()),
            forward=forward + self.steps * ensembles.forward(self.setting),
            backward=backward + self.steps * ensembles.backward(self.setting, self.classes),
            idle=self.idle * ensembles.forward(self.setting),
            seconds=time.perf_counter() - start - self.compile_seconds,
            compile_seconds=self.compile_seconds,
        )

    def aims(self, places: np.ndarray) -> Aims:
        """Choose the targets of some images, without jobs that a part of this attack has done.

        Skipping them is exact, because draws depend only on the target and the restart.
        """
        targets = ensembles.targets(self.full, self.sample.ranks[places])
        count = max(self.setting.targets, 1)
        if count < targets.shape[1]:  # the nearest of the full attack's targets
            images, labels, _ = self.sample.rows(places)
            targets = targets.astype(np.int32)
            norm = self.setting.norm
            distances = engine.nearness(self.runner, norm, images, labels, targets)
            targets = malt.nearest_first(distances, targets)[:, :count]
            self.ordered = len(places)
        if self.setting != self.full:
            self.targets = dict(zip(places.tolist(), targets.tolist(), strict=True))
        begun = np.flatnonzero(self.book.rows(self.name + PART)["known"][places])
        if not len(begun):
            return Aims(targets)
        done = np.zeros((*targets.shape, self.setting.restarts), bool)
        for row in begun.tolist():
            tried = self.book.tried(int(places[row]), self.name)
            done[row, np.isin(targets[row], tried.targets), : tried.restarts] = True
        return Aims(targets, done)

    def recall(self) -> np.ndarray:
        """Reuse the verdicts in the ledger; return the other images.

        An image fooled only by later jobs of the attack counts as surviving a part of it.
        """
        rows, part = self.book.rows(self.name), self.book.rows(self.name + PART)
        survived = np.zeros(len(rows), bool)
        for image in np.flatnonzero(part["known"]).tolist():
            tried = self.book.tried(image, self.name)
            enough = len(tried.targets) >= max(self.setting.targets, 1)
            survived[image] = enough and tried.restarts >= self.setting.restarts
        interesting, is_known = self.outcome.of_interest(), rows["known"] | survived
        met = np.flatnonzero(interesting & is_known)
        pending = np.flatnonzero(interesting & ~is_known)
        self.flat = (rows["flat"] | part["flat"])[met].tolist()
        self.doubted = int(np.where(survived, part["doubtful"], rows["doubtful"])[met].sum())
        fallen = met[rows["fooled"][met] & ~survived[met]]
        self.outcome.strike(self.name, fallen)
        if self.outcome.once is not None:
            self.outcome.once[met[rows["once"][met]]] = False
        outcome.refuse_damaged(self.evaluation, self.name, self.draw(), fallen)
        return pending

    def confirm(self, verdicts: list[ImageVerdict], last: bool) -> list[ImageVerdict]:
        """Write the verdicts that hold and return the others, once a batch is full.

        No verdict waits for long, because a kill would lose it; with `last` none waits at all.
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
        last_word = self.refuted if self.rule is None else self.undecided
        return [v for i in parts for v in last_word(waiting[i : i + self.runner.slots])]

    def refuted(self, part: list[ImageVerdict]) -> list[ImageVerdict]:
        """Confirm verdicts by one more forward pass and the norm in float64; return the rest."""
        places = np.array([v.image for v in part], int)
        points = np.stack([v.adversarial for v in part if v.adversarial is not None])
        confirmed, wrong = outcome.confirmed(self.evaluation, points, places, self.draw()), []
        for verdict, point, ok, norm, other in zip(part, *confirmed, strict=True):
            if ok:
                self.write(verdict, point, float(norm), int(other))
            else:
                wrong.append(verdict)
        self.doubtful |= {verdict.image for verdict in wrong}
        return wrong

    def undecided(self, part: list[ImageVerdict]) -> list[ImageVerdict]:
        """Judge points by draws, and return the verdicts that a later job may still change.

        The one-draw verdict is final at the first point that one draw misclassifies, as in the
        reference; the rule's, once its draws misclassify the strongest point.
        """
        assert self.rule is not None and self.outcome.once is not None
        images, labels, ids = self.sample.rows(np.array([v.image for v in part], int))
        points = np.stack([v.adversarial for v in part if v.adversarial is not None])
        pairs = points if points.ndim == 5 else np.stack([points, points], axis=1)
        latest, strongest = (
            engine.settled(self.runner, self.setting.norm, pairs[:, k], images) for k in (0, 1)
        )
        draws: dict[str, Any] = {"seed": self.sample.seed, "draw": self.draw()}
        one = randomised.verdict(randomised.ONE)
        alone = outcome.answers_of(self.runner, one, latest, labels, ids, **draws)
        ruled = outcome.answers_of(self.runner, self.rule, strongest, labels, ids, **draws)
        once = outcome.within(latest, images, labels, self.sample)[0] & ~alone.right
        sure, norms = outcome.within(strongest, images, labels, self.sample)
        sure &= ~ruled.right
        undecided = []
        for row, verdict in enumerate(part):
            image = verdict.image
            judged = self.judged.pop(image, Judged())
            if judged.once is None and np.isfinite(latest[row]).all():
                judged = judged._replace(once=bool(once[row]))
            if judged.point is None and sure[row] and self.outcome.standing[image]:
                point = (strongest[row], float(norms[row]), int(ruled.reached[row]))
                judged = Judged(judged.once, *point)
            self.judged[image] = judged
            by_one = judged.once is not None or not self.outcome.once[image]
            by_rule = judged.point is not None or not self.outcome.standing[image]
            if by_one and (by_rule or self.rule.rule == randomised.ONE):
                self.write(verdict)
            else:
                undecided.append(verdict)
        return undecided

    def standing(self) -> int:
        """Count the images that are robust so far."""
        return int(self.outcome.standing.sum()) + self.outcome.aside

    def draw(self) -> int:
        """Return the draw number of the last forward pass; clean images use 0."""
        return 1 + ensembles.named(self.setting.name).number

    def write(
        self,
        verdict: ImageVerdict,
        adversarial: np.ndarray | None = None,
        norm: float = 0.0,
        other: int = -1,
    ) -> None:
        """Write a verdict to the ledger: class `other` was reached, or as the draws judged."""
        by_one: dict[str, bool] = {}
        if self.outcome.once is not None:
            judged = self.judged.pop(verdict.image, Judged())
            by_one = {"once": bool(judged.once)}
            adversarial, norm, other = judged.point, judged.norm, judged.reached
            self.outcome.once[verdict.image] &= not judged.once
        part = self.book.rows(self.name + PART)[verdict.image]  # may hold the first job
        flat = verdict.flat or part["flat"]
        if part["doubtful"]:
            self.doubtful.add(verdict.image)
        fooled = adversarial is not None
        name: dict[str, Any] = {"attack": self.name}
        if not fooled and self.setting != self.full:
            tried = {"targets": self.targets[verdict.image], "restarts": self.setting.restarts}
            name = {"attack": self.name + PART, "tried": tried}
        record = {
            **name,
            "fooled": fooled,
            **by_one,
            "target": verdict.target,
            "restart": verdict.restart,
            "iterations": verdict.steps,
            "norm": norm,
            "reached": other,
            "seed": self.sample.seed,
            "flat": bool(flat),
        }
        if not fooled and verdict.image in self.doubtful:
            record["doubtful"] = True
        self.book.add(verdict.image, record, adversarial)
        self.flat.append(bool(flat))
        if fooled:
            self.outcome.strike(self.name, verdict.image)
        passes = verdict.steps * ensembles.passes(self.setting, self.classes)
        self.meter.decided(self.standing(), passes, fooled=fooled)

    def join(self, mine: np.ndarray, decided: int) -> None:
        """Adopt the other processes' verdicts, and sum the costs of all."""
        rows = self.book.rows(self.name)
        fallen, once = mine[rows["fooled"][mine]], mine[rows["once"][mine]]
        unconfirmed = sum(self.outcome.standing[list(self.doubtful)])
        counts = np.array([self.steps, self.idle, unconfirmed, self.ordered])
        results = self.book.results(fallen, self.name)
        # Another process may do the next jobs of a survivor.
        names = (self.name + PART, self.name) if self.in_parts else ()
        survived = self.book.survived(mine, names)
        parts = hosts.everyone((fallen, results, self.flat[decided:], counts, once, survived))
        for process, (places, others, _, _, by_one, survivors) in enumerate(parts):
            self.book.take_over(process, places, self.name, others)
            self.outcome.strike(self.name, places)
            if self.outcome.once is not None:
                self.outcome.once[by_one] = False
            self.book.take_over_survived(process, survivors)
        self.flat[decided:] = [flat for part in parts for flat in part[2]]
        sums = np.sum([part[3] for part in parts], axis=0)
        self.steps, self.idle, self.unconfirmed, self.ordered = sums.tolist()
        self.unconfirmed += self.doubted

    def flag(self) -> None:
        """Flag reasons for doubt that this attack has shown."""
        flags = self.outcome.flags
        untargeted = not (self.setting.targets or self.suffix)
        if untargeted and MACHINES[self.setting.machine].flat:
            flags.update(reliability.check_gradients(np.array(self.flat, bool)))
        if self.unconfirmed:
            why = (
                "Results that depend on the batch can cause this: look for batch statistics, or "
                "compare with batch_size=1"
            )
            if narrower := slots.narrower_products(jax.default_backend()):
                why = (
                    f"The search may multiply in {narrower} on this device, which can cause this "
                    "near the decision boundary: set JAX_DEFAULT_MATMUL_PRECISION=highest to "
                    f"search in float32. If some remain, {why[0].lower()}{why[1:]}"
                )
            flags[f"unconfirmed by {self.name}"] = (
                f"the search fooled {spelling.counted(self.unconfirmed, 'image')} that a final "
                "forward pass classified correctly or found outside the ball. Later steps did "
                f"not find another example, so each counts as robust. {why}"
            )
