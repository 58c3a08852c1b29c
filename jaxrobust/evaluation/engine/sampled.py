"""A search in lower precision, checked by one in full precision of a sample of its survivors."""

from collections.abc import Sequence

import numpy as np

from jaxrobust.attacks import Setting
from jaxrobust.evaluation.engine.cascade import Attack
from jaxrobust.evaluation.engine.outcome import Cost, Evaluation
from jaxrobust.evaluation.engine.progress import Decisions
from jaxrobust.evaluation.network import checks
from jaxrobust.evaluation.records import parts

_SAMPLE = 64  # survivors that are attacked again


def _words(found: parts.SampledSearch) -> str:
    survivors, sampled, every = found["survivors"], found["sampled"], found["fooled_of_all"]
    text = (
        f"of {sampled} survivors of the search with search_fn, {found['fooled']} were fooled "
        "by one with logits_fn itself"
    )
    remedy = "; search with logits_fn" if found["fooled"] else ""
    if sampled == survivors:
        return f"{text}; there are no others{remedy}"
    if every is not None:
        return f"{text}, hence all {survivors} were attacked so, and {every} fell{remedy}"
    rest, at_most = survivors - sampled, found["at_most"]
    return (
        f"{text}. With 95 % confidence that excludes no more than a share above {at_most:.1%}: of "
        f"the other {rest} up to {at_most * rest:.0f} may fall so, so robust accuracy is at least "
        f"{found['robust_at_least']:.2%} by that search, and only search_dtype float32 (no "
        "search_fn) says more"
    )


def search_again(
    evaluation: Evaluation, settings: Sequence[Setting]
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
    evaluation: Evaluation, settings: Sequence[Setting], chosen: np.ndarray
) -> list[Cost]:
    again = evaluation.outcome._replace(standing=chosen.copy())
    interval, count = checks.binomial_interval, int(chosen.sum())
    with Decisions(count, interval=interval, enabled=False) as meter:
        attacked = evaluation._replace(outcome=again)
        costs = [Attack(attacked, setting, meter, suffix=" (full)").run(0) for setting in settings]
    evaluation.outcome.standing[chosen & ~again.standing] = False
    return costs
