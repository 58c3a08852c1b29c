"""How to train against several norms, and how many of them attack in a step."""

from typing import Any, NamedTuple

from jaxrobust.attacks import registry
from jaxrobust.types import threats

EXTREME = ("linf", "l1")  # E-AT's norms; their balls' hull contains much of the others


class MixRow(NamedTuple):
    """A way to train against several norms."""

    each: bool  # whether every norm attacks in each step; otherwise one of them does
    looks: bool = False  # whether the points found are compared, which takes one pass each
    updates: bool = False  # whether the update uses the points of every norm
    extreme: bool = False  # whether only `EXTREME` are trained, chosen by their errors so far
    steepest: bool = False  # whether all norms make their step from one common gradient
    pairs: bool = False  # whether two norms attack and one loss compares their points


MIXES = {
    # MAX and AVG of Tramèr & Boneh 2019 (arXiv 1904.13000).
    "worst": MixRow(each=True, looks=True),
    "average": MixRow(each=True, updates=True),
    "alternate": MixRow(each=False),  # one norm per step, in order
    # E-AT of Croce & Hein 2022 (arXiv 2105.12508).
    "extreme": MixRow(each=False, extreme=True),
    # MSD of Maini, Wong, Kolter 2020 (arXiv 1909.04068).
    "msd": MixRow(each=True, steepest=True),
    # The pair of norms of RAMP, Jiang & Singh 2024 (arXiv 2402.06827).
    "pair": MixRow(each=True, updates=True, pairs=True),
}


def is_mixed(attack: Any) -> bool:
    """Return True if an attack section has several norms, or mixes them."""
    return attack.get("mix") is not None or len(threats(attack)) > 1


def described(attack: Any) -> str:
    """Name several norms with their mix, for a line of text; "" for a single one."""
    norms = [ball.norm for ball in threats(attack)]
    return f"{attack.get('mix')} of {', '.join(norms)}" if len(norms) > 1 else ""


def norms_of(attack: Any) -> list[str]:
    """List the norms that attack in training, given the settings of a config or a run."""
    norms, row = [ball.norm for ball in threats(attack)], MIXES.get(attack.get("mix") or "")
    fewer = row is not None and (row.extreme or (row.pairs and len(norms) > 2))
    return [norm for norm in norms if norm in EXTREME or not fewer]


def at_once(attack: Any, mix: str | None = None) -> int:
    """Count the norms that attack in each step; `mix` overrides the settings'."""
    row = MIXES.get(mix or attack.get("mix") or "")
    return len(norms_of(attack)) if row and row.each else 1


def cost(attack: Any) -> float:
    """Return the cost of a step's attacks relative to one norm's: its passes forward and back.

    Norms that step together share one gradient, and each takes a forward pass, which counts a half.
    """
    row = MIXES.get(attack.get("mix") or "")
    return 1 + at_once(attack) / 2 if row and row.steepest else at_once(attack)


def passes(attack: Any, mix: str | None = None) -> int:
    """Count the passes per image of a step's attacks: their sum, or if one norm attacks per step,
    their mean, which is that of any norm, as all take the same steps.

    If the points found are compared, each takes one more forward pass. If norms choose steps
    together, there are the passes of one attack plus, in each step, a forward pass per norm. `mix`
    overrides the section's choice for several norms.
    """
    row = MIXES.get((mix or attack.mix) if attack.get("mix") else "")
    alone = registry.passes(attack.name, attack.steps)
    if row and row.steepest:
        return alone + int(attack.steps) * at_once(attack, mix)
    return at_once(attack, mix) * (alone + bool(row and row.looks))


def updates(attack: Any) -> int:
    """Count the norms whose points an update uses: all of them, or one."""
    row = MIXES.get(attack.get("mix") or "")
    return at_once(attack) if row and row.updates else 1
