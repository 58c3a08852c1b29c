"""All attacks of an evaluation, each on what the ones before left standing, and their result."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxrobust.attacks import Setting, ensembles
from jaxrobust.evaluation.engine import lots
from jaxrobust.evaluation.engine import replay as replays
from jaxrobust.evaluation.engine.cascade import Attack, search_again
from jaxrobust.evaluation.engine.evaluation_progress import Decisions
from jaxrobust.evaluation.engine.outcome import (
    AttackContext,
    Cost,
    logits_of,
    reached,
    refuse_damaged,
)
from jaxrobust.evaluation.engine.result import AutoAttackResult, ResultFacts
from jaxrobust.evaluation.network import checks, reliability, user_attacks
from jaxrobust.evaluation.network.images import Adversarial, Subset
from jaxrobust.evaluation.network.user_attacks import UserAttack
from jaxrobust.evaluation.records import records
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.runtime.processes import hosts


def run(
    evaluation: AttackContext,
    settings: Sequence[Setting],
    meter: Decisions,
    known: replays.KnownVerdicts,
    otherwise: Callable[..., lots.DecidedLots] | None,
    users: Sequence[UserAttack] = (),
) -> tuple[AutoAttackResult, Any]:
    """Run what is replayed, the attacks and the user's, each on what those before left standing.

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
    for user in users:
        costs.append(_tried(evaluation, user))
        accuracy_after[user.name] = _mean(outcome.standing)
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
    norms, classes = np.zeros(n), np.full(n, -1, np.int32)
    for name in (outcome.names[code] for code in present if code > 1):
        which = fooled_by == name
        norms[which] = book.rows(name)["norm"][which]
        classes[which] = book.rows(name)["reached"][which]
    adversarial: Any = Adversarial(sample.images, book, fooled_by)
    if "stopped" in about:
        adversarial = Subset(adversarial, met)
    columns = (sample.ids, sample.labels, sample.clean, fooled_by, norms, classes)
    result = AutoAttackResult(
        clean=clean,
        robust=outcome.standing[met],
        fooled_by=fooled_by[met],
        images_adv=adversarial[:] if isinstance(sample.images, np.ndarray) else adversarial,
        verdicts=Verdicts(*(column[met] for column in columns)),
        flags=flags,
        accuracy_after=accuracy_after,
        attacks=[*(own._asdict() for own in settings), *(user.settings() for user in users)],
        costs=costs,
        about=about,
    )
    return result, met


def _tried(evaluation: AttackContext, user: UserAttack) -> Cost:
    """Try a user's points on all images that stand, from the ledger as far as it knows them."""
    runner, sample, outcome, book, _ = evaluation
    start, met, rows = time.perf_counter(), int(outcome.standing.sum()), book.rows(user.name)
    outcome.names.append(user.name)
    fallen = np.flatnonzero(outcome.standing & rows["fooled"])
    refuse_damaged(evaluation, user.name, 0, fallen)
    outcome.strike(user.name, fallen)
    pending = np.flatnonzero(outcome.standing & ~rows["known"] & user.covers(sample.ids))
    mine = hosts.share(pending)
    key = jax.random.key(sample.seed)
    for first in range(0, len(mine), runner.slots):
        part = mine[first : first + runner.slots]
        images, labels, ids = sample.rows(part)
        own = jax.random.fold_in(key, int(ids[0]))
        how = (runner.logits_fn, own, images, labels, ids, sample.threat)
        points = user_attacks.points_of(user, *how)
        logits = logits_of(runner, points, ids, sample.seed, draw=0)
        sure, norms = checks.verified(points, images, labels, logits, sample.threat)
        others = reached(logits, labels)
        for i, place in enumerate(part.tolist()):
            row: dict[str, Any] = {"attack": user.name, "fooled": bool(sure[i]), "flat": False}
            row |= {"norm": float(norms[i]), "reached": int(others[i])} if sure[i] else {}
            book.add(place, row, points[i] if sure[i] else None)
        outcome.strike(user.name, part[sure])
    fallen = mine[~outcome.standing[mine]]
    for process, (which, theirs) in enumerate(
        hosts.everyone((fallen, book.results(fallen, user.name)))
    ):
        book.take_over(process, which, user.name, theirs)
        outcome.strike(user.name, which)
    fooled = met - int(outcome.standing.sum())
    seconds = time.perf_counter() - start
    return Cost(user.name, fooled, len(pending), 0, 0, seconds, 0.0)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
