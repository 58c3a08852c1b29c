"""The order in which attacks run on images: on all at once, in lots, or as `fast` chooses.

**Lots** are taken from the images in random order until a rule says that the evaluation is decided.
Every lot goes through all attacks, so the verdicts so far are the standard evaluation of these
images. The end of a lot depends only on the number of images before it, not on slots or hosts.
A resumed evaluation therefore looks at the same points as the first one, and all processes look
after `Attack.join`, at the same verdicts. A lot has 60 images, later a sixteenth of the images
before it, which bounds how late the rule can stop. Some slots are idle at the end of each lot,
fewest if there are 64 or a small divisor of 64.

**Fast**: all images go through APGD-CE and APGD-T, the latter with few targets, starting with those
that MALT finds nearest. Of the survivors, the eighth with the seemingly nearest boundaries go
through the other targets and restarts of these two, and FAB-T with as few targets. Of the survivors
left, a random sample, as large as the budget of passes allows, goes through the rest of the
standard version: other targets and restarts, FAB-T and Square. So a sampled image has the standard
version's verdict, and the sample bounds how many verdicts of the others differ.

Every job is also a job of the standard version, with the same draws, and is written to its ledger.
Points that fool here fool there, and the standard call continues with the remaining jobs.

Source: Melamed et al. 2024 (arXiv 2407.02240) for the targets. They take the nearest 9 of the 100
likeliest classes; we take 4 of the 9 targets of the standard version.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.attacks import Setting, ensembles
from jaxrobust.evaluation.engine import engine
from jaxrobust.evaluation.engine.cascade import Attack, ordering
from jaxrobust.evaluation.engine.evaluation_progress import Decisions
from jaxrobust.evaluation.engine.outcome import AttackContext, Cost, Outcome
from jaxrobust.evaluation.engine.result import ResultFacts
from jaxrobust.evaluation.network import checks, reliability
from jaxrobust.evaluation.records import records, sequences, stopping
from jaxrobust.evaluation.records.record import SampledSearch, StoppedSequence
from jaxrobust.evaluation.records.stopping import StopRule
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text.progress import say

# Of the standard version's passes. The rest of a fifth pays for dropped jobs, and for survivors
# that the standard version would soon fool, as when gradients are masked.
SHARE = 0.18
# Of the survivors of the first targets and restarts: a heuristic, measured on few networks.
NEAR = 1 / 8
_SAMPLE = 64  # survivors of a search in lower precision that are attacked again


class Turn(NamedTuple):
    """An attack, or its first jobs, on some of the images."""

    setting: Setting
    full: Setting | None  # the attack with all its jobs; None: `setting` has all of them
    images: np.ndarray  # bool[N]


class AttackedImages(NamedTuple):
    """The results of the attacks on the images that they attacked."""

    met: Any  # i[n], places of these images, ascending; or a slice of all
    costs: list[Cost]
    accuracy_after: dict[str, float]  # of those images
    about: ResultFacts


def in_turn(
    evaluation: AttackContext,
    turns: Sequence[Turn],
    meter: Decisions,
    *,
    robust: int | None = None,
    suffix: str = "",
) -> Iterator[tuple[Attack, Cost]]:
    """Run attacks, each on the surviving images of its turn; yield each attack and its cost.

    Its flags are `attack.outcome.flags`. Progress counts `robust` more survivors; None: all others.
    """
    outcome, classes = evaluation.outcome, evaluation.sample.classes
    for number, (setting, full, images) in enumerate(turns):
        later = sum(ensembles.most_passes(t.setting, classes) for t in turns[number + 1 :])
        part = outcome.without(~images)
        if robust is not None:
            part = part._replace(aside=robust)
        attack = Attack(evaluation._replace(outcome=part), setting, meter, full, suffix)
        cost = attack.run(later)
        outcome.take(part, ~images)
        yield attack, cost


def all_images(
    evaluation: AttackContext,
    settings: Sequence[Setting],
    meter: Decisions,
    robust_beyond: np.ndarray,
) -> AttackedImages:
    """Run all attacks on all images, but only the first attack on those `robust_beyond`."""
    outcome, costs, after = evaluation.outcome, [], {}
    turns = [Turn(s, None, ~robust_beyond | (at == 0)) for at, s in enumerate(settings)]
    for attack, cost in in_turn(evaluation, turns, meter):
        outcome.flags.update(attack.outcome.flags)
        costs.append(cost)
        after[attack.name] = mean(outcome.standing)
    return AttackedImages(slice(None), costs, after, {})


def lot_by_lot(
    evaluation: AttackContext,
    settings: Sequence[Setting],
    meter: Decisions,
    rule: StopRule,
    *,
    verbose: bool,
) -> AttackedImages:
    """Attack lot by lot until `rule` stops or no images are left."""
    sample, outcome = evaluation.sample, evaluation.outcome
    order = rule.places(sample.seed, sample.ids)
    costs: dict[str, Cost] = {}
    standing_after = {setting.name: 0 for setting in settings}
    attacks: dict[str, list[Attack]] = {name: [] for name in standing_after}
    start, met, looked = 0, order[:0], StoppedSequence()
    for end in sequences.lots(len(order)):
        lot, met = order[start:end], order[:end]
        robust = int(outcome.standing[order[:start]].sum())
        meter.widen(end, robust)
        turns = [Turn(setting, None, _marked(lot, len(sample.ids))) for setting in settings]
        for attack, cost in in_turn(evaluation, turns, meter, robust=robust):
            attacks[attack.name].append(attack)
            _add(costs, cost)
            standing_after[attack.name] += int(outcome.standing[lot].sum())
        start = end
        looked = rule.look(sample.ids[met], sample.clean[met], outcome.standing[met], of=len(order))
        if verbose:
            say(stopping.line(looked))
        if "rule" in looked:
            break
    for setting in settings:  # flags cover the images of all lots
        total = Attack(evaluation, setting, meter)
        total.flat = [flat for attack in attacks[setting.name] for flat in attack.flat]
        total.unconfirmed = sum(attack.unconfirmed for attack in attacks[setting.name])
        total.flag()
    looked["order_seed"] = sample.seed
    looked["images"] = records.ranges(np.sort(sample.ids).tolist())
    after = {name: count / len(met) for name, count in standing_after.items()}
    return AttackedImages(np.sort(met), list(costs.values()), after, {"stopped": looked})


def fast(
    evaluation: AttackContext,
    settings: Sequence[Setting],
    meter: Decisions,
    full: Sequence[Setting],
    *,
    verbose: bool,
) -> AttackedImages:
    """Run some of the jobs of `full` on all images, and the others on a sample."""
    sample, outcome, costs = evaluation.sample, evaluation.outcome, dict[str, Cost]()
    every = np.ones(len(sample.ids), bool)
    turns = [Turn(*pair, every) for pair in zip(settings, full, strict=True)]
    first = [turn for turn in turns if turn.setting.name in ensembles.ON_ALL]
    for attack, cost in in_turn(evaluation, first, meter):
        outcome.flags.update(attack.outcome.flags)
        _add(costs, cost)
    survived, fallen = int(outcome.standing.sum()), _passes_of_fooled(evaluation, first)
    # The nearest images go through all jobs of these attacks, and some of another attack.
    more = [Turn(t.full, t.full, every) for t in first if t.setting != t.full and t.full]
    more += [turn for turn in turns if turn.setting.name in ensembles.ON_NEAREST]
    near = _nearest(evaluation, full) if more else np.zeros(len(every), bool)
    if verbose and more:
        names = " and ".join(turn.setting.name for turn in more)
        say(f"{survived:,} images survive; running {names} on the {near.sum():,} near a boundary")
    _run_on(evaluation, more, meter, near, costs)
    stood, budget = outcome.standing.copy(), _budget(first, more, full, sample.classes)
    count = min(budget.sampled(survived, int(near.sum()), fallen), int(stood.sum()))
    chosen = stopping.draw_survivors(sample.seed, sample.ids, stood, count)
    if verbose:
        say(
            f"{stood.sum():,} images survive; running all remaining attacks on {count:,} of them, "
            "chosen at random"
        )
    complete = [turn.setting for turn in first]
    remaining = [Turn(setting, setting, every) for setting in full if setting not in complete]
    _run_on(evaluation, remaining, meter, chosen, costs)
    fooled = sample.ids[stood & ~outcome.standing].tolist()
    sampled = stopping.fast_sample(len(every), int(stood.sum()), count, fooled)
    outcome.flags["fast"] = stopping.fast_line(sampled)
    if count:  # extrapolate Square's success on the sample to all survivors
        square, others = (
            float(_standing(outcome, later)[chosen].mean()) * float(stood.mean())
            for later in ([], ["square"])
        )
        flags = reliability.check_cascade({"others": others, "clean": 1.0, "square": square})
        for name, text in flags.items():
            outcome.flags[name] = f"extrapolated from a sample: {text}"
    order = [setting.name for setting in settings]
    after = {name: mean(_standing(outcome, order[at + 1 :])) for at, name in enumerate(order)}
    return AttackedImages(slice(None), [costs[name] for name in order], after, {"fast": sampled})


def _ordering(turn: Turn) -> int:
    return sum(ordering(turn.setting, turn.full or turn.setting))


class Budget(NamedTuple):
    """The number of passes on an image that is never fooled."""

    total: int  # of the standard version
    first: int  # of the jobs on all images, including the ordering of targets
    near: int  # of the jobs on the nearest images only
    remaining: int  # of all other jobs after the first

    def sampled(self, survivors: int, near: int, fallen: int) -> int:
        """Choose the number of sampled survivors, after `fallen` passes on fooled images.

        The standard version needs about as many of these. `near` survivors go through more jobs.
        """
        most = SHARE * (fallen + survivors * self.total)
        spare = most - fallen - survivors * self.first - near * self.near
        return min(survivors, max(int(spare // max(self.remaining, 1)), 1))


def _budget(
    first: Sequence[Turn], more: Sequence[Turn], full: Sequence[Setting], classes: int
) -> Budget:
    def most(setting: Setting) -> int:
        return ensembles.most_passes(setting, classes)

    begun_passes = {turn.setting.name: most(turn.setting) for turn in first}
    every, begun = sum(map(most, full)), sum(begun_passes.values())
    near = sum(most(t.setting) - begun_passes.get(t.setting.name, 0) + _ordering(t) for t in more)
    measuring = sum(map(_ordering, first)) + 1 + _measured(full)
    return Budget(every, begun + measuring, near, every - begun)


def _measured(full: Sequence[Setting]) -> int:
    """Count the targets used to estimate how near an image is to its boundary."""
    return max(setting.targets for setting in full if setting.name in ensembles.ON_ALL)


def _nearest(evaluation: AttackContext, full: Sequence[Setting]) -> np.ndarray:
    """Mark the survivors whose boundary to one of APGD-T's targets seems nearest, bool[N]."""
    runner, sample, outcome = evaluation.runner, evaluation.sample, evaluation.outcome
    standing = np.flatnonzero(outcome.standing)
    mine = hosts.share(standing)
    images, labels, _ = sample.rows(mine)
    targets = sample.ranks[mine, : _measured(full)].astype(np.int32)
    distances = engine.nearness(runner, sample.threat.norm, images, labels, targets)
    distances = np.where(np.isnan(distances), np.inf, distances).min(axis=1)
    shares = hosts.everyone((mine, distances))
    places, distances = (np.concatenate(part) for part in zip(*shares, strict=True))
    order = places[np.lexsort((places, distances))]
    return _marked(order[: round(NEAR * len(standing))], len(outcome.standing))


def _passes_of_fooled(evaluation: AttackContext, turns: Sequence[Turn]) -> int:
    """Count the passes on images that one of the attacks has fooled, from the ledger."""
    outcome, classes, passes, earlier = evaluation.outcome, evaluation.sample.classes, 0, 0
    for turn in turns:
        name = turn.setting.name
        fooled = outcome.fooled_by == outcome.names.index(name)
        earlier += _ordering(turn)
        steps = int(evaluation.book.rows(name)["steps"][fooled].sum())
        passes += int(fooled.sum()) * earlier + ensembles.passes(turn.setting, classes) * steps
        earlier += ensembles.most_passes(turn.setting, classes)
    return passes


def _run_on(
    evaluation: AttackContext,
    turns: Sequence[Turn],
    meter: Decisions,
    chosen: np.ndarray,
    costs: dict[str, Cost],
) -> None:
    """Run attacks on the chosen images only, and add their costs."""
    outcome = evaluation.outcome
    meter.widen(len(chosen), int((outcome.standing & ~chosen).sum()))
    turns = [turn._replace(images=chosen) for turn in turns]
    for attack, cost in in_turn(evaluation, turns, meter):
        _add(costs, cost)
        for name, text in attack.outcome.flags.items():  # flags from all images take precedence
            outcome.flags.setdefault(name, text)


def _add(costs: dict[str, Cost], cost: Cost) -> None:
    costs[cost.attack] = costs[cost.attack].plus(cost) if cost.attack in costs else cost


def _standing(outcome: Outcome, later: Sequence[str]) -> np.ndarray:
    """Mark the images that survive until the attacks `later`, bool[N]."""
    return np.isin(outcome.fooled_by, [0, *map(outcome.names.index, later)])


def _marked(places: np.ndarray, n: int) -> np.ndarray:
    marked = np.zeros(n, bool)
    marked[places] = True
    return marked


def mean(values: np.ndarray) -> float:
    """Compute the mean, or 0 without values."""
    return float(values.mean()) if len(values) else 0.0


def search_again(
    evaluation: AttackContext, settings: Sequence[Setting]
) -> tuple[Cost, SampledSearch]:
    """Attack a sample of survivors with the deciding network; if one falls, attack all."""
    sample, outcome = evaluation.sample, evaluation.outcome
    evaluation = evaluation._replace(runner=evaluation.runner._replace(search_fn=None))
    survivors = np.flatnonzero(outcome.standing)
    n, count, costs = len(survivors), min(_SAMPLE, len(survivors)), list[Cost]()
    drawn = np.random.default_rng(sample.seed).choice(survivors, count, replace=False)
    chosen = _marked(drawn, len(outcome.standing))

    def attack(images: np.ndarray) -> None:
        turns = [Turn(setting, None, images) for setting in settings]
        with Decisions(
            int(images.sum()), interval=checks.binomial_interval, enabled=False
        ) as meter:
            for attack, cost in in_turn(evaluation, turns, meter, robust=0, suffix=" (full)"):
                outcome.flags.update(attack.outcome.flags)
                costs.append(cost)

    attack(chosen)
    fallen, every = int((chosen & ~outcome.standing).sum()), None
    if fallen and count < n:
        attack(outcome.standing & ~chosen)
        every = int((~outcome.standing[survivors]).sum())
    at_most = fallen / max(count, 1) if count == n else checks.upper_bound(fallen, count)
    unknown = 0 if every is not None else n - count
    least = (int(outcome.standing.sum()) - at_most * unknown) / max(len(outcome.standing), 1)
    text = (
        f"of {count} images that survived the search with search_fn, {fallen} were fooled by a "
        "search with logits_fn itself"
    )
    if count == n:
        text += "; no other images survived"
    elif every is not None:
        text += f", so all {n} were attacked this way, and {every} fell"
    else:
        text += (
            f". With 95% confidence, at most {at_most:.1%} of the other {unknown} would fall this "
            f"way (up to {at_most * unknown:.0f}), so robust accuracy is at least {least:.2%} "
            "under that search; only search_dtype float32 (no search_fn) can show more"
        )
    if fallen:
        text += "; search with logits_fn"
    outcome.flags["search-gap"] = text
    searched: SampledSearch = {
        "survivors": n,
        "sampled": count,
        "fooled": fallen,
        "at_most": at_most,
        "fooled_of_all": every,
        "robust_at_least": least,
    }
    return Cost("full", *(sum(column) for column in list(zip(*costs, strict=True))[1:])), searched
