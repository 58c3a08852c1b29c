"""The cascade lot by lot, in a random order of the images, until a rule says that it is decided.

Every lot goes through all attacks, so what has been seen so far is the standard evaluation of these
images. Where lots end depends on the number of images before them alone, neither on slots nor on
hosts: whoever continues a ledger looks where the others looked, and all processes look after
`Attack.join`, at the same verdicts. A lot has 60 images, later a sixteenth of those before it: what
is seen too late is at most that. Slots stand idle at the end of each lot, fewest where they are 64
or a small part of that.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.attacks import Setting, ensembles
from jaxrobust.evaluation.engine.cascade import Attack
from jaxrobust.evaluation.engine.evaluation_progress import Decisions
from jaxrobust.evaluation.engine.outcome import AttackContext, Cost
from jaxrobust.evaluation.engine.result import ResultFacts
from jaxrobust.evaluation.records import parts, records, sequential, stopping
from jaxrobust.evaluation.records.stopping import StopRule
from jaxrobust.runtime.text.progress import say


class DecidedLots(NamedTuple):
    """What the attacks have come to on the images that were met."""

    met: Any  # i[n], their places, ascending; or a slice of all
    costs: list[Cost]
    accuracy_after: dict[str, float]  # of those images
    about: ResultFacts


def run(
    evaluation: AttackContext,
    settings: Sequence[Setting],
    meter: Decisions,
    rule: StopRule,
    *,
    verbose: bool,
) -> DecidedLots:
    """Attack lot by lot until `rule` has seen enough, or the images end."""
    sample, outcome = evaluation.sample, evaluation.outcome
    order = rule.places(sample.seed, sample.ids)
    costs: dict[str, Cost] = {}
    left = dict.fromkeys((setting.name for setting in settings), 0)  # standing after each
    attacked: dict[str, list[Attack]] = {name: [] for name in left}
    start, met, seen = 0, order[:0], parts.StoppedSequence()
    for end in sequential.lots(len(order)):
        lot, met = order[start:end], order[:end]
        for attack, cost in _attacks(evaluation, settings, meter, lot, order[:start]):
            name = attack.name
            attacked[name].append(attack)
            costs[name] = costs[name].plus(cost) if name in costs else cost
            left[name] += int(outcome.standing[lot].sum())
        start = end
        about = (sample.ids[met], sample.clean[met], outcome.standing[met])
        seen = rule.look(*about, of=len(order))
        if verbose:
            say(stopping.line(seen))
        if "rule" in seen:
            break
    for setting in settings:
        _flag(evaluation, setting, meter, attacked[setting.name])
    seen["order_seed"] = sample.seed
    seen["images"] = records.ranges(np.sort(sample.ids).tolist())
    after = {name: count / len(met) for name, count in left.items()}
    return DecidedLots(np.sort(met), list(costs.values()), after, {"stopped": seen})


def _attacks(
    evaluation: AttackContext,
    settings: Sequence[Setting],
    meter: Decisions,
    lot: np.ndarray,
    before: np.ndarray,
) -> Iterator[tuple[Attack, Cost]]:
    """Run all attacks on the images of a lot alone; yield each that is done, and what it took."""
    sample, outcome = evaluation.sample, evaluation.outcome
    aside = np.ones(len(sample.ids), bool)
    aside[lot] = False
    robust = int(outcome.standing[before].sum())
    meter.widen(len(before) + len(lot), robust)
    for number, setting in enumerate(settings):
        later = sum(ensembles.most_passes(s, sample.classes) for s in settings[number + 1 :])
        own = outcome.without(aside)._replace(aside=robust, flags={})
        attack = Attack(evaluation._replace(outcome=own), setting, meter)
        cost = attack.run(later)
        outcome.take(own, aside)
        yield attack, cost


def _flag(
    evaluation: AttackContext, setting: Setting, meter: Decisions, lots: Sequence[Attack]
) -> None:
    """Flag what an attack makes doubtful on the images of all lots together."""
    whole = Attack(evaluation, setting, meter)
    whole.flat = [flat for attack in lots for flat in attack.flat]
    whole.unconfirmed = sum(attack.unconfirmed for attack in lots)
    whole.flag()
