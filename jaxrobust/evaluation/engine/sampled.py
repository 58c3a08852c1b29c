"""A search in lower precision, checked by one in full precision of a sample of its survivors."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.attacks import Setting
from jaxrobust.evaluation.engine.cascade import Attack
from jaxrobust.evaluation.engine.outcome import Cost, Evaluation
from jaxrobust.evaluation.engine.progress import Decisions
from jaxrobust.evaluation.network import checks
from jaxrobust.evaluation.records import parts

_SAMPLE = 64  # survivors that are attacked again


class SearchSample(NamedTuple):
    """What a search with the network that decides found, of survivors of a search with another."""

    survivors: int  # of that search
    sampled: int  # of them, at random, were searched again
    fooled: int  # of these
    at_most: float  # share of all survivors that would be, with 95 % confidence
    fooled_of_all: int | None  # once all of them were searched again; None: they were not
    robust_at_least: float  # accuracy that such a search of all would have left, so far as known

    def as_json(self) -> parts.SampledSearch:
        """Make it a part of a record."""
        fields: Any = self._asdict()
        return fields

    def words(self) -> str:
        """Write it as a sentence."""
        text = (
            f"of {self.sampled} survivors of the search with search_fn, {self.fooled} were fooled "
            "by one with logits_fn itself"
        )
        if self.sampled == self.survivors:
            return f"{text}; there are no others" + self._remedy()
        if self.fooled_of_all is not None:
            text += f", hence all {self.survivors} were attacked so, and {self.fooled_of_all} fell"
            return text + self._remedy()
        rest = self.survivors - self.sampled
        return (
            f"{text}. With 95 % confidence that excludes no more than a share above "
            f"{self.at_most:.1%}: of the other {rest} up to {self.at_most * rest:.0f} may fall so, "
            f"so robust accuracy is at least {self.robust_at_least:.2%} by that search, and only "
            "search_dtype float32 (no search_fn) says more"
        )

    def _remedy(self) -> str:
        return "; search with logits_fn" if self.fooled else ""


def search_again(evaluation: Evaluation, settings: Sequence[Setting]) -> tuple[Cost, SearchSample]:
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
    searched = SearchSample(
        survivors=len(survivors),
        sampled=count,
        fooled=fallen,
        at_most=at_most,
        fooled_of_all=every,
        robust_at_least=(int(outcome.standing.sum()) - at_most * unknown)
        / max(len(outcome.standing), 1),
    )
    outcome.flags["search-gap"] = searched.words()
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
