"""Attacks of a fixed number of steps of a fixed length, as `--attack` and a config name them.

`fgsm` is one step from the image and `pgd-K` are K, against the cross-entropy. `margin-K` are K
against the margin, and `cw-K` against the margin with a floor, as Huang et al. 2022 (arXiv
2212.11005) evaluate: what is misclassified stays where it is.
"""

import re
from typing import Any, NamedTuple

from jaxrobust import attacks
from jaxrobust.types import Attack, Threat

_LOSSES = {"fgsm": "ce", "pgd": "ce", "cw": "cw-floor", "margin": "cw"}
_NAMED = re.compile(r"(fgsm)|(pgd|cw|margin)-([1-9]\d{0,6})")
# Where they may start; of `uniform`, not boxed, the first gradient is outside of [0, 1] too.
STARTS = ("image", "random", "uniform", "uniform-boxed")
WRITTEN = "fgsm, pgd-K, cw-K, margin-K (K steps)"


class FixedSteps(NamedTuple):
    """One of them."""

    name: str
    steps: int

    @property
    def default_start(self) -> str:
        """Return where it starts unless told otherwise."""
        return "image" if self.name == "fgsm" else "random"

    def length(
        self, epsilon: float, *, step: float | None = None, relative: float | None = None
    ) -> float:
        """Return the length of a step: in pixels, or as a multiple of epsilon / K."""
        if step is not None:
            return step
        return (relative or (1.0 if self.name == "fgsm" else 2.5)) * epsilon / self.steps

    def settings(
        self,
        threat: Threat,
        *,
        length: float,
        start: str | None = None,
        l1_rule: str | None = None,
    ) -> dict[str, Any]:
        """Return the settings for a record, which has a rule of L1 only if it is told one."""
        start = start or self.default_start
        ball = {"name": self.name, **threat.settings()}
        rule = {"l1_rule": l1_rule} if l1_rule else {}
        return ball | {"steps": self.steps, "start": start, "step_size": length} | rule


def is_cascade(attack: str) -> bool:
    """Tell whether `--attack` goes on image by image: AutoAttack, or some of its parts."""
    return not re.fullmatch(r"clean|fgsm|(pgd|cw|margin)-.*", attack)


def parse(attack: str) -> FixedSteps | None:
    """Return the attack of a name; None: it is none of these."""
    if not (match := _NAMED.fullmatch(attack)):
        return None
    return FixedSteps(match[1] or match[2], int(match[3] or 1))


def attack_of(settings: dict[str, Any]) -> Attack:
    """Return the attack of settings.

    Raises:
      ValueError: a start, norm, radius or rule of L1 that cannot be meant.
    """
    rule = {key: settings[key] for key in ("l1_rule",) if key in settings}
    return attacks.pgd(
        norm=settings["norm"],
        epsilon=settings["epsilon"],
        steps=settings["steps"],
        step_size=settings["step_size"] or None,  # a radius of 0 leaves no room, whatever the step
        random_start=attacks.STARTS[settings["start"]],
        loss=_LOSSES[settings["name"]],
        **rule,
    )
