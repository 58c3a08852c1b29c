"""All attacks of an evaluation, each on what the ones before left standing, and their result."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxrobust.attacks import Setting, ensembles
from jaxrobust.evaluation.engine import lots
from jaxrobust.evaluation.engine import replay as replays
from jaxrobust.evaluation.engine.cascade import Attack, search_again
from jaxrobust.evaluation.engine.evaluation_progress import Decisions
from jaxrobust.evaluation.engine.outcome import AttackContext
from jaxrobust.evaluation.engine.result import AutoAttackResult, ResultFacts
from jaxrobust.evaluation.network import reliability
from jaxrobust.evaluation.network.images import Adversarial, Subset
from jaxrobust.evaluation.records import records
from jaxrobust.evaluation.records.verdicts import Verdicts


def run(
    evaluation: AttackContext,
    settings: Sequence[Setting],
    meter: Decisions,
    known: replays.KnownVerdicts,
    otherwise: Callable[..., lots.DecidedLots] | None,
) -> tuple[AutoAttackResult, Any]:
    """Run what is replayed, then the attacks, each on what the ones before left standing.

    `otherwise` runs the attacks in another way: lot by lot, or as the fast version. Return the
    places of the images that were met, too: all, unless a rule stopped before.
    """
    runner, sample, outcome, book, how = evaluation
    n, flags = len(sample.images), outcome.flags
    met: Any = slice(None)
    costs, accuracy_after = [], {}
    about: ResultFacts = {}
    once = None if outcome.once is None else outcome.once.copy()
    if known.sources:
        cost, replayed = replays.run(evaluation, known)
        costs, accuracy_after = [cost], {cost.attack: _mean(outcome.standing)}
        about = {"replayed": replayed}
    if otherwise is not None:
        met, own, after, more = otherwise(evaluation, settings, meter)
        costs, accuracy_after, about = costs + own, accuracy_after | after, {**about, **more}
    for number, setting in enumerate(settings if otherwise is None else ()):
        later = sum(ensembles.most_passes(s, sample.classes) for s in settings[number + 1 :])
        aside = known.robust_beyond & (number > 0)
        attacked = outcome.without(aside)
        costs.append(Attack(evaluation._replace(outcome=attacked), setting, meter).run(later))
        outcome.take(attacked, aside)
        accuracy_after[setting.name] = _mean(outcome.standing)
    clean = sample.clean[met]
    flags |= reliability.check_cascade({"clean": _mean(clean), **accuracy_after})
    if runner.search_fn is not None:
        cost, again = search_again(evaluation, settings)
        costs.append(cost)
        about["search_sample"] = again
        accuracy_after[costs[-1].attack] = _mean(outcome.standing)
    if how is not None and once is not None and outcome.once is not None:
        one = records.one_draw(_mean(once), outcome.once)
        about["draws"] = {"rule": how.rule, "draws": how.draws, "one_draw": one}
    present, places = np.unique(outcome.fooled_by, return_inverse=True)
    fooled_by = np.array([outcome.names[code] for code in present], str)[places]
    norms, reached = np.zeros(n), np.full(n, -1, np.int32)
    for name in (outcome.names[code] for code in present if code > 1):
        which = fooled_by == name
        norms[which] = book.rows(name)["norm"][which]
        reached[which] = book.rows(name)["reached"][which]
    adversarial: Any = Adversarial(sample.images, book, fooled_by)
    if "stopped" in about:
        adversarial = Subset(adversarial, met)
    columns = (sample.ids, sample.labels, sample.clean, fooled_by, norms, reached)
    result = AutoAttackResult(
        clean=clean,
        robust=outcome.standing[met],
        fooled_by=fooled_by[met],
        images_adv=adversarial[:] if isinstance(sample.images, np.ndarray) else adversarial,
        verdicts=Verdicts(*(column[met] for column in columns)),
        flags=flags,
        accuracy_after=accuracy_after,
        attacks=[setting._asdict() for setting in settings],
        costs=costs,
        about=about,
    )
    return result, met


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
