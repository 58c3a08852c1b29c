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

    name: str
    steps: int

    @property
    def row(self) -> registry.Row:
        """Look its row up."""
        return registry.ROWS[self.name]

    @property
    def default_start(self) -> str:
        """Name the start of the attack that nothing else was asked of."""
        assert self.row.fixed is not None
        return self.row.fixed.start

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
        """Return the length of a step: in pixels, or as a multiple of epsilon / K."""
        if step is not None:
            return step
        assert self.row.length is not None
        return (relative or self.row.length) * epsilon / self.steps

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


def written() -> str:
    """List them for messages."""
    return registry.written(also=" (K steps)")


def parse(attack: str) -> FixedSteps | None:
    """Return the attack of a name; None: it is none of these."""
    named = registry.parse(attack)
    return FixedSteps(named[0].name, named[1]) if named else None


def attack_of(settings: dict[str, Any]) -> Attack:
    """Return the attack of settings.

    Raises:
      ValueError: a start, norm, radius or rule of L1 that cannot be meant.
    """
    row = registry.ROWS[settings["name"]]
    assert row.fixed is not None and row.make is not None
    rule = {key: settings[key] for key in ("l1_rule",) if key in settings}
    return row.make(
        norm=settings["norm"],
        epsilon=settings["epsilon"],
        steps=settings["steps"],
        step_size=settings["step_size"] or None,  # a radius of 0 leaves no room, whatever the step
        random_start=attacks.STARTS[settings["start"]],
        loss=row.fixed.loss,
        **rule,
    )
