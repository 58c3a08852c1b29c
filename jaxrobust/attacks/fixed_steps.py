"""Attacks with a fixed number of fixed-length steps, as named by `--attack` and configs.

`fgsm` takes one step and `pgd-K` takes K. The rows of `registry` define which exist, the loss that
each maximizes and where it starts.
"""

from typing import Any, NamedTuple

from jaxrobust import attacks
from jaxrobust.attacks import registry
from jaxrobust.types import Attack, Threat

# Possible starts; for `uniform`, which is not clipped, the first gradient is also outside [0, 1].
STARTS = ("image", "random", "uniform", "uniform-boxed")


def is_cascade(attack: str) -> bool:
    """Recognize AutoAttack and its parts, which stop at an image once it is fooled."""
    if attack == "clean" or registry.parse(attack):
        return False
    heads = tuple(f"{name}-" for name, row in registry.fixed().items() if not row.single)
    return not attack.startswith(heads) or attack.split(",")[0] in registry.searching()


class FixedSteps(NamedTuple):
    """An attack with a fixed number of steps."""

    row: registry.NamedAttack
    steps: int

    @property
    def forward(self) -> int:
        """Count the forward passes of its steps per image."""
        return self.steps * self.row.facts.forward

    @property
    def backward(self) -> int:
        """Count the backward passes of its steps per image."""
        return self.steps * self.row.facts.backward

    def length(
        self, epsilon: float, *, step: float | None = None, relative: float | None = None
    ) -> float:
        """Return the length of a step, given in pixels or as a multiple of epsilon / K."""
        if step is not None:
            return step
        assert self.row.length is not None
        return (relative or self.row.length) * epsilon / self.steps

    def settings(
        self, threat: Threat, *, length: float, start: str | None = None, l1_rule: str | None = None
    ) -> dict[str, Any]:
        """Return the settings for a record, with the L1 rule only if one is given."""
        assert self.row.fixed is not None
        steps = {"steps": self.steps, "start": start or self.row.fixed.start, "step_size": length}
        rule = {"l1_rule": l1_rule} if l1_rule else {}
        return {"name": self.row.name, **threat.settings()} | steps | rule


def written() -> str:
    """List these attacks for messages."""
    return registry.written(also=" (K steps)")


def parse(attack: str) -> FixedSteps | None:
    """Parse the name of an attack with fixed steps; None for other attacks."""
    parsed = registry.parse(attack)
    return FixedSteps(*parsed) if parsed else None


def attack_of(settings: dict[str, Any]) -> Attack:
    """Make the attack of these settings; `ValueError` if they are invalid."""
    row = registry.ROWS[settings["name"]]
    assert row.fixed is not None and row.make is not None
    keys = ("norm", "epsilon", "steps", "l1_rule")
    return row.make(
        **{key: settings[key] for key in keys if key in settings},
        step_size=settings["step_size"] or None,  # a radius of 0 leaves no room for steps
        random_start=attacks.STARTS[settings["start"]],
        loss=row.fixed.loss,
    )
