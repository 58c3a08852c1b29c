"""The fast version: a part of the standard version's jobs, and the rest of them on a sample.

All images meet APGD-CE and APGD-T, the latter at few targets, those first that MALT calls nearest.
Of what stands, the eighth whose boundary seems nearest meets the other targets and restarts of
these two, and FAB-T at as few. Of what stands then, as many images as the passes allow, drawn at
random, meet all that the standard version has left for them: its other targets and restarts, FAB-T
and Square. So a sampled image has the standard version's verdict, and the sample bounds how many
verdicts of the others differ.

Every job is one that the standard version would make too, with the same draws, and is written into
its ledger: what fools here fools there, and the standard call goes on with the jobs that are left.

Source: Melamed et al. 2024 (arXiv 2407.02240) for the targets. They take the nearest 9 of the 100
likeliest classes, we take 4 of the 9 that the standard version aims at.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.attacks import Setting, ensembles
from jaxrobust.evaluation.engine import engine
from jaxrobust.evaluation.engine.cascade import Attack
from jaxrobust.evaluation.engine.evaluation_progress import Decisions
from jaxrobust.evaluation.engine.ledger import PART
from jaxrobust.evaluation.engine.lots import DecidedLots
from jaxrobust.evaluation.engine.outcome import AttackContext, Cost, Outcome, refuse_damaged
from jaxrobust.evaluation.engine.schedule import Aims
from jaxrobust.evaluation.network import reliability
from jaxrobust.evaluation.records import survivors
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text.progress import say

# Of the standard version's passes. The rest of a fifth is for jobs that are begun in vain, and for
# survivors that the standard version would soon be done with, as where gradients are masked.
SHARE = 0.18
# Of what stands after the first targets and restarts: a choice, whose worth was measured on few.
NEAR = 1 / 8


class PartialAttack(Attack):
    """The first jobs of an attack, at the nearest of its targets.

    An image that they fool has the attack's verdict; of one that they do not fool the ledger notes
    which jobs were made.
    """

    def __init__(
        self, evaluation: AttackContext, setting: Setting, meter: Decisions, whole: Setting
    ) -> None:
        super().__init__(evaluation, setting, meter)
        self.whole = whole
        self.measured = 0  # images whose targets were put in order, of all processes after `join`
        self.chosen: dict[int, list[int]] = {}

    def recall(self) -> np.ndarray:
        """Take over what the ledger knows; return the other images.

        One that only later jobs of the attack have fooled has survived these.
        """
        rows, part = self.book.rows(self.name), self.book.rows(self.name + PART)
        survived = np.zeros(len(rows), bool)
        for image in np.flatnonzero(part["known"]).tolist():
            survived[image] = self.suffices(image)
        met = np.flatnonzero(self.outcome.standing & (rows["known"] | survived))
        self.flat = (rows["flat"] | part["flat"])[met].tolist()
        doubtful = np.where(survived, part["doubtful"], rows["doubtful"])
        self.doubted = int(doubtful[met].sum())
        fallen = met[rows["fooled"][met] & ~survived[met]]
        self.outcome.strike(self.name, fallen)
        refuse_damaged(self.evaluation, self.name, self.draw(), fallen)
        return np.flatnonzero(self.outcome.standing & ~(rows["known"] | survived))

    def suffices(self, image: int) -> bool:
        """Tell whether the jobs that were made on an image are as many as these."""
        tried = self.book.tried(image, self.name)
        enough = len(tried.targets) >= max(self.setting.targets, 1)
        return enough and tried.restarts >= self.setting.restarts

    def aims(self, which: np.ndarray) -> Aims:
        """Select the nearest of the targets that the whole attack has for some images."""
        targets = ensembles.targets(self.whole, self.sample.ranks[which])
        count = max(self.setting.targets, 1)
        if count < targets.shape[1]:
            images, labels, _ = self.sample.rows(which)
            norm = self.setting.norm
            targets = engine.nearest_first(
                self.runner, norm, images, labels, targets.astype(np.int32)
            )[:, :count]
            self.measured = len(which)
        self.chosen = dict(zip(which.tolist(), targets.tolist(), strict=True))
        return Aims(targets, self.made(which, targets))

    def named(self, image: int, fooled: bool) -> dict[str, Any]:
        """Name the attack, or the part of it that found nothing, with its jobs."""
        if fooled or self.setting == self.whole:
            return {"attack": self.name}
        tried = {"targets": self.chosen[image], "restarts": self.setting.restarts}
        return {"attack": self.name + PART, "tried": tried}

    def join(self, mine: np.ndarray, known: int) -> None:
        """Take over what the other processes found, and which jobs they made in vain."""
        super().join(mine, known)
        own = self.book.survived(mine, (self.name + PART, self.name))  # others may go on with them
        for process, theirs in enumerate(hosts.everyone(own)):
            self.book.take_over_survived(process, theirs)
        self.measured = hosts.total(self.measured)

    def run(self, later: int) -> Cost:
        """Decide every image, as the whole attack; count what the order of targets takes too."""
        cost = super().run(later)
        forward, backward = (self.measured * each for each in ordering(self.setting, self.whole))
        return cost.plus(Cost(cost.attack, 0, forward, backward, 0, 0.0, 0.0))


Pair = tuple[Setting, Setting]  # a part of an attack's jobs, or all, and all


def ordering(setting: Setting, whole: Setting) -> tuple[int, int]:
    """Count the forward and backward passes of an image whose targets are put in order."""
    each = whole.targets if setting.targets < whole.targets else 0
    return min(each, 1), each


class Budget(NamedTuple):
    """The passes of an image that nothing fools."""

    whole: int  # of the standard version
    first: int  # of what all images meet, the order of the targets included
    near: int  # of what only the nearest images meet
    rest: int  # of all that is left after the first

    def sampled(self, survivors: int, near: int, fallen: int) -> int:
        """Choose how many survivors are drawn, after `fallen` passes on images that were fooled.

        The standard version needs about as many of these. Of the survivors, `near` ones meet more.
        """
        most = SHARE * (fallen + survivors * self.whole)
        spare = most - fallen - survivors * self.first - near * self.near
        return min(survivors, max(int(spare // max(self.rest, 1)), 1))


def run(
    evaluation: AttackContext,
    settings: Sequence[Setting],
    meter: Decisions,
    whole: Sequence[Setting],
    *,
    verbose: bool,
) -> DecidedLots:
    """Attack all images with a part of the jobs of `whole`, and a sample with all others."""
    sample, outcome = evaluation.sample, evaluation.outcome
    n, order = len(sample.ids), [setting.name for setting in settings]
    both = [*zip(settings, whole, strict=True)]
    attacks = [
        PartialAttack(evaluation, setting, meter, full)
        for setting, full in both
        if setting.name in ensembles.ON_ALL
    ]
    most = [ensembles.most_passes(attack.setting, sample.classes) for attack in attacks]
    costs: dict[str, Cost] = {}

    def add(cost: Cost) -> None:
        costs[cost.attack] = costs[cost.attack].plus(cost) if cost.attack in costs else cost

    for number, attack in enumerate(attacks):
        add(attack.run(sum(most[number + 1 :])))
    survived, fallen = int(outcome.standing.sum()), _fallen(attacks)
    more = _of_the_nearest(both)
    near = _nearest(evaluation, whole) if more else np.zeros(n, bool)
    if verbose and more:
        names = " and ".join(setting.name for setting, _ in more)
        say(f"{survived:,} images stand; the {near.sum():,} nearest meet more of {names}")
    for cost in _of_some(evaluation, more, meter, near):
        add(cost)
    budget = _budget(attacks, more, whole, sample.classes)
    stood = outcome.standing.copy()
    count = min(budget.sampled(survived, int(near.sum()), fallen), int(stood.sum()))
    chosen = survivors.sample(sample.seed, sample.ids, stood, count)
    if verbose:
        say(f"{stood.sum():,} images stand; {count:,} of them, at random, meet all that is left")
    complete = {attack.name for attack in attacks if attack.setting == attack.whole}
    rest = [full for full in whole if full.name not in complete]
    for cost in _of_some(evaluation, [(full, full) for full in rest], meter, chosen):
        add(cost)
    found = survivors.found(
        n, int(stood.sum()), count, sample.ids[stood & ~outcome.standing].tolist()
    )
    outcome.flags["fast"] = survivors.line(found)
    if count:
        outcome.flags.update(_masked(outcome, chosen, stood))
    after = {name: _left(outcome, order[at + 1 :]) for at, name in enumerate(order)}
    return DecidedLots(slice(None), [costs[name] for name in order], after, {"fast": found})


def _of_the_nearest(both: Sequence[Pair]) -> list[Pair]:
    """List what only the nearest images meet: all of a part, and a part of another attack."""
    begun = [full for setting, full in both if full.name in ensembles.ON_ALL and setting != full]
    others = [pair for pair in both if pair[1].name in ensembles.ON_NEAREST]
    return [*((full, full) for full in begun), *others]


def _budget(
    attacks: Sequence[PartialAttack], more: Sequence[Pair], whole: Sequence[Setting], classes: int
) -> Budget:
    def most(setting: Setting) -> int:
        return ensembles.most_passes(setting, classes)

    made = {attack.name: most(attack.setting) for attack in attacks}
    every, first = sum(map(most, whole)), sum(made.values())
    near = sum(most(own) - made.get(own.name, 0) + sum(ordering(own, full)) for own, full in more)
    measuring = sum(sum(ordering(a.setting, a.whole)) for a in attacks) + sum(_measuring(whole))
    return Budget(every, first + measuring, near, every - first)


def _measuring(whole: Sequence[Setting]) -> tuple[int, int]:
    """Count the forward and backward passes that tell how near an image's boundary is."""
    return 1, max(setting.targets for setting in whole if setting.name in ensembles.ON_ALL)


def _nearest(evaluation: AttackContext, whole: Sequence[Setting]) -> np.ndarray:
    """Mark the survivors whose boundary to one of APGD-T's targets seems nearest, bool[N]."""
    runner, sample, outcome = evaluation.runner, evaluation.sample, evaluation.outcome
    stands = np.flatnonzero(outcome.standing)
    mine = hosts.share(stands)
    images, labels, _ = sample.rows(mine)
    targets = sample.ranks[mine, : _measuring(whole)[1]].astype(np.int32)
    found = engine.nearness(runner, sample.threat.norm, images, labels, targets)
    nearest = np.where(np.isnan(found), np.inf, found).min(axis=1)
    both = [np.concatenate(part) for part in zip(*hosts.everyone((mine, nearest)), strict=True)]
    places, distances = both
    order = places[np.lexsort((places, distances))]
    marked = np.zeros(len(outcome.standing), bool)
    marked[order[: round(NEAR * len(stands))]] = True
    return marked


def _fallen(attacks: Sequence[PartialAttack]) -> int:
    """Count the passes on images that one of the attacks has fooled, as the ledger knows them."""
    passes, before = 0, 0
    for attack in attacks:
        own = attack.outcome.fooled_by == attack.outcome.names.index(attack.name)
        before += sum(ordering(attack.setting, attack.whole))
        each = ensembles.passes(attack.setting, attack.classes)
        passes += int(own.sum()) * before + each * int(
            attack.book.rows(attack.name)["steps"][own].sum()
        )
        before += ensembles.most_passes(attack.setting, attack.classes)
    return passes


def _of_some(
    evaluation: AttackContext, rest: Sequence[Pair], meter: Decisions, chosen: np.ndarray
) -> Iterator[Cost]:
    """Attack the chosen images with what is left of `rest`; yield what each attack took."""
    outcome, classes = evaluation.outcome, evaluation.sample.classes
    aside = ~chosen
    others = int((outcome.standing & aside).sum())
    meter.widen(len(chosen), others)
    for number, (setting, whole) in enumerate(rest):
        later = sum(ensembles.most_passes(each, classes) for each, _ in rest[number + 1 :])
        own = outcome.without(aside)._replace(flags={})
        attack = PartialAttack(evaluation._replace(outcome=own), setting, meter, whole)
        yield attack.run(later)
        outcome.take(own, aside)
        for name, text in own.flags.items():  # of all images before of some
            outcome.flags.setdefault(name, text)


def _masked(outcome: Outcome, chosen: np.ndarray, stood: np.ndarray) -> dict[str, str]:
    """Flag what Square finds, as if it found as much on all that stood as on the sample."""
    after = float(_share(outcome, [])[chosen].mean())
    before = float(_share(outcome, ["square"])[chosen].mean())
    scale = float(stood.mean())
    flags = reliability.check_cascade(
        {"others": before * scale, "clean": 1.0, "square": after * scale}
    )
    return {name: f"extrapolated from a sample: {text}" for name, text in flags.items()}


def _share(outcome: Outcome, later: Sequence[str]) -> np.ndarray:
    """Mark the images that stand before the attacks `later`, bool[N]."""
    codes = [0, *(outcome.names.index(name) for name in later)]
    return np.isin(outcome.fooled_by, codes)


def _left(outcome: Outcome, later: Sequence[str]) -> float:
    return float(_share(outcome, later).mean()) if len(outcome.fooled_by) else 0.0
