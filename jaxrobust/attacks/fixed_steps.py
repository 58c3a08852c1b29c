"""Attacks of a fixed number of steps of a fixed length, as `--attack` and a config name them.

`fgsm` is one step and `pgd-K` are K. The rows of `registry` say which there are, what each climbs
and where it starts.
"""

from typing import Any, NamedTuple

from jaxrobust import attacks
from jaxrobust.attacks import registry
from jaxrobust.types import Attack, Threat

# Where they may start; of `uniform`, not boxed, the first gradient is outside of [0, 1] too.
STARTS = ("image", "random", "uniform", "uniform-boxed")
is_cascade = registry.goes_image_by_image


class FixedSteps(NamedTuple):
    """One of them."""

    row: registry.NamedAttack
    steps: int

    @property
    def forward(self) -> int:
        """Count the forward passes of its steps, per image."""
        return self.steps * self.row.facts.forward

    @property
    def backward(self) -> int:
        """Count the backward passes of its steps, per image."""
        return self.steps * self.row.facts.backward

    def length(
        self, epsilon: float, *, step: float | None = None, relative: float | None = None
    ) -> float:
        """Compute the length of a step: in pixels, or as a multiple of epsilon / K."""
        if step is not None:
            return step
        assert self.row.length is not None
        return (relative or self.row.length) * epsilon / self.steps

    def settings(
        self, threat: Threat, *, length: float, start: str | None = None, l1_rule: str | None = None
    ) -> dict[str, Any]:
        """Write the settings for a record, which has a rule of L1 only where one is given."""
        assert self.row.fixed is not None
        steps = {"steps": self.steps, "start": start or self.row.fixed.start, "step_size": length}
        rule = {"l1_rule": l1_rule} if l1_rule else {}
        return {"name": self.row.name, **threat.settings()} | steps | rule


def written() -> str:
    """List them for messages."""
    return registry.written(also=" (K steps)")


def parse(attack: str) -> FixedSteps | None:
    """Parse the name of an attack with fixed steps; None if it is another attack."""
    parsed = registry.parse(attack)
    return FixedSteps(*parsed) if parsed else None


def attack_of(settings: dict[str, Any]) -> Attack:
    """Make the attack of settings; `ValueError` where they cannot be meant."""
    row = registry.ROWS[settings["name"]]
    assert row.fixed is not None and row.make is not None
    keys = ("norm", "epsilon", "steps", "l1_rule")
    return row.make(
        **{key: settings[key] for key in keys if key in settings},
        step_size=settings["step_size"] or None,  # a radius of 0 leaves no room, whatever the step
        random_start=attacks.STARTS[settings["start"]],
        loss=row.fixed.loss,
    )
