"""The inner maximization: the attack to train against, and its radius while it grows.

The radius grows over the first epochs if `attack.warmup_epochs` is set, or after
`attack.delay_epochs` with radius 0; the radii of several norms grow alike. With every step, the
host sends the attack's current share of the radius, so one program serves all epochs and lengths.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxrobust import attacks
from jaxrobust.attacks import mixes, registry
from jaxrobust.config import AttackSection, Config, Values
from jaxrobust.runtime import rooms
from jaxrobust.training.update import attack_losses, objectives
from jaxrobust.training.update.value_checks import must_be, one_of
from jaxrobust.types import Array, Attack, Threat, check_length, threats


def training_attack(
    config: Config, objective: str, *, extra_steps: int = 0, mix: str | None = None
) -> Attack:
    """Build the inner maximization, or one with more steps; for the clean objective, nothing.

    The attack accepts `epsilon_share` f32[], for that share of the full radius and step, and
    requires `turn` i32[] if norms take turns. Several norms are mixed as the config says, or as
    `mix`, a row of `mixes.MIXES`, does.
    """
    row, a = objectives.named(objective), config.attack
    if not row.attacks:
        return lambda logits_fn, keys, images, labels, **options: images
    if row.pairs or mixes.is_mixed(a):
        several_norms("check")(a, objective)
    norms = mixes.norms_of(a)
    plans = [
        _planned(section, objective, extra_steps) for section in by_norm(a) if section.norm in norms
    ]
    if mixes.is_mixed(a):
        return several_norms("attack")(
            plans, mix or a.mix, attack_losses.of_objective(a, objective)
        )
    return attack_of(plans[0])


def several_norms(function: str) -> Callable[..., Any]:
    """Look up a function for training with several norms at once."""
    return rooms.resolve(rooms.entries("SEVERAL_NORMS")[function])


def by_norm(attack: AttackSection) -> list[AttackSection]:
    """Return the section for each norm separately; a single norm's section is unchanged."""
    if isinstance(attack["norm"], str) and not isinstance(attack["step_size"], list | tuple):
        return [attack]
    section = {key: attack[key] for key in attack} | {"mix": None}  # type: ignore[attr-defined]
    return [
        Values(section | ball.settings() | {"step_size": size})  # type: ignore[misc]
        for ball, size in zip(threats(attack), step_sizes(attack), strict=True)
    ]


def step_sizes(attack: AttackSection) -> tuple[float | None, ...]:
    """List each norm's step in pixels, None if not set; reject a single step for several norms."""
    sizes, balls = attack["step_size"], threats(attack)
    if sizes is None:
        return (None,) * len(balls)
    norms = ",".join(ball.norm for ball in balls)
    if not isinstance(sizes, list | tuple):
        if len(balls) > 1:
            raise ValueError(
                f"attack.step_size={sizes:.4g} pixels would apply to all norms {norms}, whose "
                "radii differ; give a step for each, in the same order, or set attack.relative_step"
            )
        sizes = (sizes,)
    if len(sizes) != len(balls):
        listed = ",".join(f"{size:.4g}" for size in sizes)
        raise ValueError(
            f"attack.step_size={listed} does not match attack.norm={norms}; give a step for each "
            "norm, in the same order, or set attack.relative_step"
        )
    return tuple(sizes)


class InnerPlan(NamedTuple):
    """How to build the attack of one norm."""

    make: Callable[..., Attack]
    norm: str
    epsilon: float
    steps: int
    length: float | None  # of all steps together, in radii; None: chosen by the attack
    step_size: float | None  # in pixels; None: from `length`
    settings: dict[str, Any]

    def ball(self, epsilon_share: Array | None = None, images: int = 0) -> dict[str, Any]:
        """Return norm, radius and step as arguments of an attack; a radius of 0 does not grow."""
        ball: dict[str, Any] = {"norm": self.norm, "epsilon": self.epsilon}
        if not self.epsilon:
            epsilon_share = None
        if epsilon_share is not None:
            ball["epsilon"] = jnp.full(images, self.epsilon, jnp.float32) * epsilon_share
        if self.length is None:
            return ball
        if self.step_size is not None:
            return ball | {"step_size": self.step_size}
        if epsilon_share is not None:  # rounds differently than below
            return ball | {"step_size": self.length / self.steps * self.epsilon}
        return ball | {"step_size": self.length * self.epsilon / self.steps or None}


def _planned(a: AttackSection, objective: str, extra_steps: int) -> InnerPlan:
    row = objectives.named(objective)
    one_of("attack.labels", a.labels, objectives.ATTACK_LABELS)
    if row.of_probabilities and a.labels != "soft":
        raise ValueError(
            f"attack.labels={a.labels!r} has no effect with objective={objective!r}, which attacks "
            "the network's outputs for clean images; set attack.labels='soft'"
        )
    if row.of_probabilities and a.start == "image":
        raise ValueError(
            f"objective={objective!r} cannot attack from attack.start={a.start!r}, where the "
            "gradient of its loss is zero; set attack.start='random', 'gauss' or 'uniform'"
        )
    attack, step_size = registry.trained(a.name), step_of(a)
    steps = attack.steps(a.steps) + extra_steps
    if attack.single and extra_steps:  # with one more step, use the iterative attack
        attack, step_size = registry.trained(attack.stronger), None
    assert attack.make is not None
    settings: dict[str, Any] = {"random_start": _start(a)}
    parameters = inspect.signature(attack.make).parameters.values()
    if any(p.name == "loss" or p.kind is p.VAR_KEYWORD for p in parameters):
        settings["loss"] = attack_losses.of_objective(a, objective)
    elif a.get("loss") or row.attack_loss != "ce":
        source = f"attack.loss={a.loss!r}" if a.get("loss") else f"objective={objective!r}"
        raise ValueError(
            f"attack.name={a.name!r} does not accept a loss, but {source} sets one; choose another "
            "attack.name" + (", or leave attack.loss out" if a.get("loss") else "")
        )
    ball = Threat.of(a)
    return InnerPlan(
        attack.make, ball.norm, ball.epsilon, steps, attack.length, step_size, settings
    )


def attack_of(plan: InnerPlan) -> Attack:
    """Build the attack of one norm."""

    def make(ball: dict[str, Any]) -> Attack:
        return plan.make(**ball, steps=plan.steps, **plan.settings)

    fixed = make(plan.ball())  # rejects conflicting settings before anything compiles

    def attack(
        logits_fn: Any, keys: Any, images: Any, labels: Any, epsilon_share: Any = None
    ) -> Any:
        search = fixed if epsilon_share is None else make(plan.ball(epsilon_share, len(images)))
        return search(logits_fn, keys, images, labels)

    return attack


def _start(a: AttackSection) -> bool | attacks.Noise:
    one_of("attack.start", a.start, attacks.STARTS)
    start = attacks.STARTS[a.start]
    normal = isinstance(start, attacks.Noise) and start.normal
    if a.start_std is not None and not normal:
        raise ValueError(
            f"attack.start_std={a.start_std} has no effect with attack.start={a.start!r}; leave it "
            "out, or set attack.start='gauss'"
        )
    check_length("attack.start_std", a.start_std or 0)
    if not isinstance(start, attacks.Noise):
        return start
    if registry.trained(a.name).length is None:
        names = [repr(row.name) for row in registry.training().values() if row.length is not None]
        raise ValueError(
            f"attack.start={a.start!r} is only for attack.name={', '.join(names)}; "
            f"{a.name.upper()} starts at 'image' or 'random'"
        )
    if not normal:
        return start
    std = step_of(a) if a.start_std is None else a.start_std
    if std is None:
        raise ValueError(
            f"attack.start={a.start!r} needs attack.start_std, its standard deviation in pixels, "
            "or attack.step_size, the default"
        )
    return start._replace(std=std)


def step_of(attack: AttackSection) -> float | None:
    """Return an attack's step in pixels; None: not set, the attack chooses it."""
    (size,), relative = step_sizes(attack), attack.relative_step
    if relative is None:
        return size
    epsilon = Threat.of(attack).epsilon
    if size is not None:
        raise ValueError(
            f"attack.step_size={size:.4g} and attack.relative_step={relative:.4g} are both set; "
            f"set only one, such as attack.relative_step={size / (epsilon or 1):.4g}"
        )
    wanted = "above 0: the step as a multiple of epsilon"
    must_be("attack.relative_step", relative, 0 < relative < math.inf, wanted)
    return relative * epsilon or None  # a radius of 0 has no step


def grows(attack: AttackSection) -> bool:
    """Return whether the attack starts with less than the full radius."""
    return bool(attack.warmup_epochs or attack.get("delay_epochs"))


def share(step: int, steps_per_epoch: int, warmup_epochs: int, delay_epochs: int = 0) -> float:
    """Return the share of the radius after `step` updates; constant within an epoch.

    It is 0 for `delay_epochs`, then grows linearly for `warmup_epochs`, then is 1. With a delay
    this is the hinge of Ngnawé et al. 2025 (arXiv 2509.23325, Epsilon-Scheduling) for starts that
    are not robust: the network learns the task first. Our version changes only at whole epochs.
    """
    epoch = step // steps_per_epoch - delay_epochs
    if epoch < 0:
        return 0.0
    return epoch / warmup_epochs if epoch < warmup_epochs else 1.0


def check(attack: AttackSection, *, epochs: int, phase: str) -> None:
    """Reject an invalid length or step."""
    if mixes.is_mixed(attack):
        several_norms("check")(attack)
    warmup = attack.warmup_epochs
    for ball, size in zip(threats(attack), step_sizes(attack), strict=True):
        inside = size is None or 0 < size < math.inf
        must_be("attack.step_size", size, inside, "above 0, in pixels, such as 2/255")
        check_length("attack.step_size", size or 0, ball.norm)
    wanted = f"at least 0 and below {phase}.epochs={epochs}, so that the radius reaches "
    must_be("attack.warmup_epochs", warmup, 0 <= warmup < epochs, wanted + "attack.epsilon")
    delay = attack.get("delay_epochs") or 0
    wanted = (
        f"at least 0, and with attack.warmup_epochs={warmup} below {phase}.epochs={epochs}, so "
    )
    inside = not delay or 0 <= delay < epochs - warmup
    must_be("attack.delay_epochs", delay, inside, wanted + "that the radius reaches attack.epsilon")
    if grows(attack) and not any(ball.epsilon for ball in threats(attack)):
        key, count = ("warmup", warmup) if warmup else ("delay", delay)
        raise ValueError(
            f"attack.{key}_epochs={count} has no effect with attack.epsilon=0; set "
            f"attack.{key}_epochs=0"
        )
