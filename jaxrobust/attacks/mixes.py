"""The ways to train against several norms, and how many of them attack in a step."""

from typing import Any, NamedTuple

from jaxrobust.types import threats

EXTREME = ("linf", "l1")  # E-AT's norms, whose balls' hull holds much of those between them


class MixRow(NamedTuple):
    """One way to train against several norms."""

    each: bool  # whether every norm attacks in each step; else one of them does
    looks: bool = False  # whether the points found are compared, which takes a pass each
    updates: bool = False  # whether the update passes those of every norm
    extreme: bool = False  # whether only `EXTREME` are trained, by their errors so far
    steepest: bool = False  # whether each step has one gradient, of which every norm makes its own
    pairs: bool = False  # whether two norms attack, whose points one loss compares


MIXES = {
    # MAX and AVG of Tramèr & Boneh 2019 (arXiv 1904.13000).
    "worst": MixRow(each=True, looks=True),
    "average": MixRow(each=True, updates=True),
    "alternate": MixRow(each=False),  # one norm a step, in their order
    # E-AT of Croce & Hein 2022 (arXiv 2105.12508).
    "extreme": MixRow(each=False, extreme=True),
    # MSD of Maini, Wong, Kolter 2020 (arXiv 1909.04068).
    "msd": MixRow(each=True, steepest=True),
    # The pair of norms of RAMP, Jiang & Singh 2024 (arXiv 2402.06827).
    "pair": MixRow(each=True, updates=True, pairs=True),
}


def norms_of(attack: Any) -> list[str]:
    """List the norms that attack in training, of the settings of a config or of a run."""
    own, row = [ball.norm for ball in threats(attack)], MIXES.get(attack.get("mix") or "")
    fewer = row is not None and (row.extreme or (row.pairs and len(own) > 2))
    return [norm for norm in own if norm in EXTREME or not fewer]


def at_once(attack: Any, mix: str | None = None) -> int:
    """Count the norms that attack in each step; `mix`: another one than the settings'."""
    row = MIXES.get(mix or attack.get("mix") or "")
    return len(norms_of(attack)) if row and row.each else 1


def cost(attack: Any) -> float:
    """Compute what a step's attacks cost, where that of one norm is 1: its passes forward and back.

    Of those that step together there is one gradient, and a forward pass, which counts a half, for
    each norm.
    """
    row = MIXES.get(attack.get("mix") or "")
    return 1 + at_once(attack) / 2 if row and row.steepest else at_once(attack)
