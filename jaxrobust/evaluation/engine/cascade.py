"""One attack after the other on what still stands, verdict by verdict through the ledger."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust.attacks import MACHINES, Setting, ensembles
from jaxrobust.evaluation.engine import engine, outcome, slots
from jaxrobust.evaluation.engine.evaluation_progress import Decisions
from jaxrobust.evaluation.engine.ledger import PART
from jaxrobust.evaluation.engine.outcome import AttackContext, Cost
from jaxrobust.evaluation.engine.schedule import Aims
from jaxrobust.evaluation.network import checks, randomised, reliability
from jaxrobust.evaluation.records import parts
from jaxrobust.runtime.devices import compilation
from jaxrobust.runtime.processes import hosts


class Attack:
    """One attack on all images that stand, from the ledger as far as it knows them."""

    def __init__(
        self, evaluation: AttackContext, setting: Setting, meter: Decisions, suffix: str = ""
    ) -> None:
        self.evaluation, self.setting, self.meter, self.suffix = evaluation, setting, meter, suffix
        self.runner, self.sample, self.outcome, self.book, self.how = evaluation
        self.judged: dict[int, Judged] = {}  # images by some of their draws, while others are due
        self.name, self.classes = setting.name + suffix, self.sample.classes
        self.steps = self.idle = self.unconfirmed = 0  # of all processes after `join`
        self.waiting: list[engine.ImageVerdict] = []  # for a last word, since `confirmed`
        self.confirmed = time.perf_counter()
        self.doubtful: set[int] = set()  # images with an adversarial example that did not hold
        self.doubted = 0  # of those that the ledger knows
        self.compile_seconds = 0.0
        self.flat: list[bool] = []

    def run(self, later: int) -> Cost:
        """Decide every image; `later` passes are needed for one that survives this attack."""
        start, met = time.perf_counter(), int(self.outcome.standing.sum())
        pending = self.recall()
        mine, known = hosts.share(pending), met - len(pending)
        what = f"{self.name} on {self.runner.slots} slots"
        program = compilation.program(what, self.runner.logits_fn)
        seen = (known + len(mine), known, self.standing(), self.runner.slots)
        self.meter.begin(self.name, *seen, compilation.expected(program))
        calls = engine.decide(
            self.runner,
            self.setting,
            *(self.sample.images, self.sample.labels, self.sample.ids, mine),
            self.aims(mine),
            epsilon=self.sample.threat.epsilon,
            seed=self.sample.seed,
            confirm=self.confirm,
        )
        with compilation.cache_hits() as hits:
            for call in self.meter.awaited(calls):
                if call.compiles and call.seconds > 1:
                    compilation.remember(program, call.seconds, hit=bool(hits))
                self.count(call, later // jax.process_count())
        self.join(mine, known)
        self.flag()
        return Cost(
            attack=self.name,
            fooled=met - int(self.outcome.standing.sum()),
            forward=self.steps * ensembles.forward(self.setting),
            backward=self.steps * ensembles.backward(self.setting, self.classes),
            idle=self.idle * ensembles.forward(self.setting),
            seconds=time.perf_counter() - start - self.compile_seconds,
            compile_seconds=self.compile_seconds,
        )

    def aims(self, which: np.ndarray) -> Aims:
        """Select what to aim at on some images; jobs that a part of this attack has made stay out.

        Their draws are those of their target and restart, so nothing is lost by that.
        """
        targets = ensembles.targets(self.setting, self.sample.ranks[which])
        return Aims(targets, self.made(which, targets))

    def made(self, which: np.ndarray, targets: np.ndarray) -> np.ndarray | None:
        """Mark the jobs that the ledger has of parts, bool[n, T, restarts]; None: there is none."""
        begun = np.flatnonzero(self.book.rows(self.name + PART)["known"][which])
        if not len(begun):
            return None
        made = np.zeros((*targets.shape, self.setting.restarts), bool)
        for row in begun.tolist():
            tried = self.book.tried(int(which[row]), self.name)
            made[row, np.isin(targets[row], tried.targets), : tried.restarts] = True
        return made

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
        met = np.flatnonzero(self.outcome.of_interest() & rows["known"])
        self.flat = rows["flat"][met].tolist()
        self.doubted = int(rows["doubtful"][met].sum())
        fallen = met[rows["fooled"][met]]
        self.outcome.strike(self.name, fallen)
        if self.outcome.once is not None:
            self.outcome.once[met[rows["once"][met]]] = False
        outcome.refuse_damaged(self.evaluation, self.name, self.draw(), fallen)
        return np.flatnonzero(self.outcome.of_interest() & ~rows["known"])

    def confirm(self, verdicts: list[engine.ImageVerdict], last: bool) -> list[engine.ImageVerdict]:
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

    def refuted(self, part: list[engine.ImageVerdict]) -> list[engine.ImageVerdict]:
        """Say the last word by one more forward pass, and the norm in float64."""
        which = np.array([v.image for v in part], int)
        points = np.stack([v.adversarial for v in part if v.adversarial is not None])
        confirmed, wrong = outcome.confirmed(self.evaluation, points, which, self.draw()), []
        for verdict, point, ok, norm, other in zip(part, *confirmed, strict=True):
            if ok:
                self.write(verdict, point, float(norm), int(other))
            else:
                wrong.append(verdict)
        self.doubtful |= {verdict.image for verdict in wrong}
        return wrong

    def undecided(self, part: list[engine.ImageVerdict]) -> list[engine.ImageVerdict]:
        """Judge points by draws, and return the verdicts of which a later job may still say more.

        By one draw, it is over with the first point that one draw called wrong, as in the
        reference; by the rule, once its draws call the strongest point wrong.
        """
        assert self.how is not None and self.outcome.once is not None
        images, labels, ids = self.sample.rows(np.array([v.image for v in part], int))
        points = np.stack([v.adversarial for v in part if v.adversarial is not None])
        pairs = points if points.ndim == 5 else np.stack([points, points], axis=1)
        latest, strongest = (
            engine.settled(self.runner, self.setting.norm, pairs[:, k], images) for k in (0, 1)
        )
        inside = lambda points: outcome.within(points, images, labels, self.sample)  # noqa: E731
        given: dict[str, Any] = {"seed": self.sample.seed, "draw": self.draw()}
        one = randomised.verdict(randomised.ONE)
        alone = outcome.answers_of(self.runner, one, latest, labels, ids, **given)
        ruled = outcome.answers_of(self.runner, self.how, strongest, labels, ids, **given)
        once = inside(latest)[0] & ~alone.right
        sure, norms = inside(strongest)
        sure &= ~ruled.right
        undecided = []
        for row, verdict in enumerate(part):
            image = verdict.image
            known = self.judged.pop(image, Judged())
            if known.once is None and np.isfinite(latest[row]).all():
                known = known._replace(once=bool(once[row]))
            if known.point is None and sure[row] and self.outcome.standing[image]:
                about = (strongest[row], float(norms[row]), int(ruled.reached[row]))
                known = Judged(known.once, *about)
            self.judged[image] = known
            by_one = known.once is not None or not self.outcome.once[image]
            by_rule = known.point is not None or not self.outcome.standing[image]
            if by_one and (by_rule or self.how.rule == randomised.ONE):
                self.write(verdict)
            else:
                undecided.append(verdict)
        return undecided

    def standing(self) -> int:
        """Count the images that are robust so far."""
        return int(self.outcome.standing.sum()) + self.outcome.aside

    def draw(self) -> int:
        """Derive the number of the draw of a last forward pass; 0 is that of the clean images."""
        return 1 + ensembles.named(self.setting.name).number

    def write(
        self,
        verdict: engine.ImageVerdict,
        adversarial: np.ndarray | None = None,
        norm: float = 0.0,
        other: int = -1,
    ) -> None:
        """Write a verdict into the ledger: `other` was reached, or what draws have judged."""
        by_one: dict[str, bool] = {}
        if self.outcome.once is not None:
            known = self.judged.pop(verdict.image, Judged())
            by_one = {"once": bool(known.once)}
            adversarial, norm, other = known.point, known.norm, known.reached
            self.outcome.once[verdict.image] &= not known.once
        part = self.book.rows(self.name + PART)[verdict.image]  # which may have the first job
        flat = verdict.flat or part["flat"]
        if part["doubtful"]:
            self.doubtful.add(verdict.image)
        record = {
            **self.named(verdict.image, adversarial is not None),
            "fooled": adversarial is not None,
            **by_one,
            "target": verdict.target,
            "restart": verdict.restart,
            "iterations": verdict.steps,
            "norm": norm,
            "reached": other,
            "seed": self.sample.seed,
            "flat": bool(flat),
        }
        if adversarial is None and verdict.image in self.doubtful:
            record["doubtful"] = True
        self.book.add(verdict.image, record, adversarial)
        self.flat.append(bool(flat))
        if adversarial is not None:
            self.outcome.strike(self.name, verdict.image)
        each = ensembles.passes(self.setting, self.classes)
        self.meter.decided(self.standing(), verdict.steps * each, fooled=adversarial is not None)

    def named(self, image: int, fooled: bool) -> dict[str, Any]:
        """Name the attack in the record of an image."""
        return {"attack": self.name}

    def join(self, mine: np.ndarray, known: int) -> None:
        """Take over what the other processes found, and add up what all of them took."""
        rows = self.book.rows(self.name)
        fallen, once = mine[rows["fooled"][mine]], mine[rows["once"][mine]]
        unconfirmed = sum(self.outcome.standing[list(self.doubtful)])
        counts = np.array([self.steps, self.idle, unconfirmed])
        own = self.book.results(fallen, self.name)
        parts = hosts.everyone((fallen, own, self.flat[known:], counts, once))
        for process, (which, theirs, _, _, by_one) in enumerate(parts):
            self.book.take_over(process, which, self.name, theirs)
            self.outcome.strike(self.name, which)
            if self.outcome.once is not None:
                self.outcome.once[by_one] = False
        self.flat[known:] = [flat for part in parts for flat in part[2]]
        sums = np.sum([part[3] for part in parts], axis=0)
        self.steps, self.idle, self.unconfirmed = sums.tolist()
        self.unconfirmed += self.doubted

    def flag(self) -> None:
        """Flag what this attack makes doubtful."""
        flags = self.outcome.flags
        untargeted = not (self.setting.targets or self.suffix)
        if untargeted and MACHINES[self.setting.machine].flat:
            flags.update(reliability.check_gradients(np.array(self.flat, bool)))
        if self.unconfirmed:
            why = _why_unconfirmed(slots.narrower_products(jax.default_backend()))
            flags[f"unconfirmed by {self.name}"] = (
                f"{self.unconfirmed} images were fooled in the search but not in a last forward "
                "pass, or left the ball, nor was anything else found in the steps after; they "
                f"count as robust. {why}"
            )


def _why_unconfirmed(narrower: str | None) -> str:
    of_batch = (
        "Numerics that depend on the batch do this: look for batch statistics, or compare with "
        "batch_size=1"
    )
    if narrower is None:
        return of_batch
    return (
        f"The search may multiply in {narrower} on this device, which does this near the decision "
        "boundary: JAX_DEFAULT_MATMUL_PRECISION=highest searches in float32. Should some be left "
        f"then: {of_batch}"
    )


class Judged(NamedTuple):
    """What the draws have said so far of an image of a randomised network."""

    once: bool | None = None  # fooled by one draw, as the reference judges; None: not judged yet
    point: np.ndarray | None = None  # f32[H,W,C], that fools it by the rule
    norm: float = 0.0
    reached: int = -1


# --- A search in lower precision, checked by one in full precision of a sample of survivors ---

_SAMPLE = 64  # survivors that are attacked again


def _words(sample: parts.SampledSearch) -> str:
    survivors, sampled, every = sample["survivors"], sample["sampled"], sample["fooled_of_all"]
    text = (
        f"of {sampled} survivors of the search with search_fn, {sample['fooled']} were fooled "
        "by one with logits_fn itself"
    )
    remedy = "; search with logits_fn" if sample["fooled"] else ""
    if sampled == survivors:
        return f"{text}; there are no others{remedy}"
    if every is not None:
        return f"{text}, hence all {survivors} were attacked so, and {every} fell{remedy}"
    rest, at_most = survivors - sampled, sample["at_most"]
    return (
        f"{text}. With 95 % confidence that excludes no more than a share above {at_most:.1%}: of "
        f"the other {rest} up to {at_most * rest:.0f} may fall so, so robust accuracy is at least "
        f"{sample['robust_at_least']:.2%} by that search, and only search_dtype float32 (no "
        "search_fn) says more"
    )


def search_again(
    evaluation: AttackContext, settings: Sequence[Setting]
) -> tuple[Cost, parts.SampledSearch]:
    """Search survivors with the network that decides: some, and if one of them falls, all."""
    sample, outcome = evaluation.sample, evaluation.outcome
    survivors = np.flatnonzero(outcome.standing)
    count = min(_SAMPLE, len(survivors))
    chosen = np.zeros_like(outcome.standing)
    chosen[np.random.default_rng(sample.seed).choice(survivors, count, replace=False)] = True
    evaluation = evaluation._replace(runner=evaluation.runner._replace(search_fn=None))
    costs = _attacked(evaluation, settings, chosen)
    fallen = int((chosen & ~outcome.standing).sum())
    every = None
    if fallen and count < len(survivors):
        costs += _attacked(evaluation, settings, outcome.standing & ~chosen)
        every = int((~outcome.standing[survivors]).sum())
    complete = count == len(survivors)
    at_most = fallen / max(count, 1) if complete else checks.upper_bound(fallen, count)
    unknown = 0 if every is not None else len(survivors) - count
    least = int(outcome.standing.sum()) - at_most * unknown
    searched: parts.SampledSearch = {
        "survivors": len(survivors),
        "sampled": count,
        "fooled": fallen,
        "at_most": at_most,
        "fooled_of_all": every,
        "robust_at_least": least / max(len(outcome.standing), 1),
    }
    outcome.flags["search-gap"] = _words(searched)
    return Cost("full", *(sum(column) for column in list(zip(*costs, strict=True))[1:])), searched


def _attacked(
    evaluation: AttackContext, settings: Sequence[Setting], chosen: np.ndarray
) -> list[Cost]:
    again = evaluation.outcome._replace(standing=chosen.copy())
    interval, count = checks.binomial_interval, int(chosen.sum())
    with Decisions(count, interval=interval, enabled=False) as meter:
        attacked = evaluation._replace(outcome=again)
        costs = [Attack(attacked, setting, meter, suffix=" (full)").run(0) for setting in settings]
    evaluation.outcome.standing[chosen & ~again.standing] = False
    return costs
