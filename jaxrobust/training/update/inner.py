"""The inner maximisation: which attack a config trains against, and its radius while that grows.

The radius grows over the first epochs where `attack.warmup_epochs` says so, or after
`attack.delay_epochs` of radius 0; those of several norms grow alike. The host says with every step
which share of the radius the attack has by then, so that one program serves every epoch and every
length.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxrobust import attacks
from jaxrobust.attacks import registry
from jaxrobust.config import AttackSection, Config
from jaxrobust.training.update import objectives, several
from jaxrobust.training.update.norms import steepest
from jaxrobust.training.update.step import keys_alone
from jaxrobust.training.update.value_checks import must_be, one_of
from jaxrobust.types import Attack, Keys, PerImage, check_length, threats


def training_attack(
    config: Config, objective: str, *, more: int = 0, mix: str | None = None
) -> Attack:
    """Build the inner maximisation, or one of `more` steps; for the clean objective, nothing.

    Of several norms it is mixed by the config, or by `mix`, a row of `several.MIXES`.
    """
    own, a = objectives.named(objective), config.attack
    if not own.attacks:
        return lambda logits_fn, key, images, labels: images
    several.check(a)
    several.check_pairs(a, objective, pairs=own.pairs)
    if not (own_mix := a.get("mix")):
        return _of_norm(several.alone(a)[0], objective, more)
    plans = [_planned(each, objective, more) for each in several.trained(a)]
    if several.MIXES[mix or own_mix].steepest:
        return _together(plans, grows=grows(a))
    searches = [_of_plan(plan, grows(a), number) for number, plan in enumerate(plans)]
    return several.mixed(searches, mix or own_mix, own.attack_loss or "ce")


class InnerPlan(NamedTuple):
    """How the attack of one norm is made; its radius may be another one in each step."""

    make: Callable[..., Attack]
    norm: str
    epsilon: float
    steps: int
    length: float | None  # of all steps together, in radii; None: it chooses its steps itself
    size: float | None  # of a step in pixels; None: by `length`
    settings: dict[str, Any]

    def step(self, epsilon: Any, *, whole: float | None = None) -> dict[str, Any]:
        """Write radius and step as an attack takes them; `whole`: the radius that steps are of."""
        if whole == 0:  # one of several norms, which does not grow
            return self.step(0.0)
        if self.length is None:
            return {"epsilon": epsilon}
        of = epsilon if whole is None else whole
        usual = self.length / self.steps * of if whole else self.length * of / self.steps or None
        return {"epsilon": epsilon, "step_size": usual if self.size is None else self.size}


def _planned(a: AttackSection, objective: str, more: int) -> InnerPlan:
    own = objectives.named(objective)
    one_of("attack.labels", a.labels, objectives.ATTACK_LABELS)
    if own.of_probabilities and a.labels != "soft":
        raise ValueError(
            f"objective={objective!r} with attack.labels={a.labels!r}: its attack aims at the "
            "clean probabilities and reads no labels; leave attack.labels='soft'"
        )
    if own.of_probabilities and a.start == "image":
        raise ValueError(
            f"objective={objective!r} with attack.start={a.start!r}: the gradient of its KL term "
            "is zero at the image; set attack.start='random', 'gauss' or 'uniform'"
        )
    row, size = registry.trained(a.name), step_of(a)
    steps = row.steps(a.steps) + more
    if row.single and more:  # one step more is an attack of several
        row, size = registry.trained(row.stronger), None
    assert row.make is not None
    settings: dict[str, Any] = {"random_start": _start(a), "loss": own.attack_loss}
    radius, norm = several.radius(a), str(a.norm)
    return InnerPlan(row.make, norm, radius, steps, row.length, size, settings)


def _of_norm(a: AttackSection, objective: str, more: int) -> Attack:
    return _of_plan(_planned(a, objective, more), grows(a))


def _of_plan(plan: InnerPlan, growing: bool, number: int | None = None) -> Attack:
    """Make the attack of one norm; `number`: which of several it is."""
    make = partial(plan.make, norm=plan.norm, steps=plan.steps, **plan.settings)
    attack = make(**plan.step(plan.epsilon))
    if not growing:
        return attack

    def of_radii(logits_fn: Any, given: Any, images: Any, labels: Any) -> Any:
        radii = given.radii if number is None else given.radii[:, number]
        own = make(**plan.step(radii, whole=plan.epsilon))
        return own(logits_fn, given.keys, images, labels)

    return of_radii


def _together(plans: Sequence[InnerPlan], *, grows: bool) -> Attack:
    """Make one attack whose steps all norms choose together, from the first one's start."""
    first = plans[0]

    def make(balls: Sequence[steepest.SteepestBall]) -> Attack:
        return steepest.msd(balls, steps=first.steps, **first.settings)

    attack = make([steepest.SteepestBall(plan.norm, **plan.step(plan.epsilon)) for plan in plans])
    if not grows:
        return attack

    def of_radii(logits_fn: Any, given: Any, images: Any, labels: Any) -> Any:
        balls = [
            steepest.SteepestBall(plan.norm, **plan.step(radii, whole=plan.epsilon))
            for plan, radii in zip(plans, given.radii.T, strict=True)
        ]
        return make(balls)(logits_fn, given.keys, images, labels)

    return of_radii


def _start(a: AttackSection) -> bool | attacks.Noise:
    one_of("attack.start", a.start, attacks.STARTS)
    start = attacks.STARTS[a.start]
    normal = isinstance(start, attacks.Noise) and start.normal
    if a.start_std is not None and not normal:
        raise ValueError(
            f"attack.start_std={a.start_std} has no effect on attack.start={a.start!r}; leave it "
            "out, or set attack.start='gauss'"
        )
    check_length("attack.start_std", a.start_std or 0)
    if not isinstance(start, attacks.Noise):
        return start
    if registry.trained(a.name).length is None:
        able = [repr(row.name) for row in registry.training().values() if row.length is not None]
        raise ValueError(
            f"attack.start={a.start!r} is of attack.name={', '.join(able)}; {a.name.upper()} "
            "starts at 'image' or 'random'"
        )
    if not normal:
        return start
    std = step_of(a) if a.start_std is None else a.start_std
    if std is None:
        raise ValueError(
            f"attack.start={a.start!r} needs attack.start_std, its standard deviation in pixels, "
            "or attack.step_size, which it is by default"
        )
    return start._replace(std=std)


def step_of(attack: AttackSection) -> float | None:
    """Compute the step of an attack in pixels, where it is set; None: the attack's own."""
    (size,), relative = several.step_sizes(attack), attack.relative_step
    if relative is None:
        return size
    epsilon = several.radius(attack)
    if size is not None:
        raise ValueError(
            f"attack.step_size={size:.4g} and attack.relative_step={relative:.4g} are both set; "
            f"give one, such as attack.relative_step={size / (epsilon or 1):.4g}"
        )
    wanted = "above 0: the step as a multiple of epsilon"
    must_be("attack.relative_step", relative, 0 < relative < math.inf, wanted)
    return relative * epsilon or None  # a radius of 0 allows no step


class GrowingRadii(NamedTuple):
    """What an attack of growing radius is given in place of keys."""

    keys: Keys  # [B]
    radii: PerImage  # of several norms f[B, norms], of those that are trained


def grows(attack: AttackSection) -> bool:
    """Tell whether the attack of the first steps has less than the whole radius."""
    return bool(attack.warmup_epochs or attack.get("delay_epochs"))


def share(step: int, steps_per_epoch: int, warmup_epochs: int, delay_epochs: int = 0) -> float:
    """Compute the share of the radius in the update after `step` others: constant in an epoch.

    It is 0 for `delay_epochs`, then grows along a line for `warmup_epochs`, then 1. With a delay
    that is the hinge of Ngnawé et al. 2025 (arXiv 2509.23325, Epsilon-Scheduling) for starts that
    are not robust: the network learns the task first. Ours: it is looked up at whole epochs.
    """
    epoch = step // steps_per_epoch - delay_epochs
    if epoch < 0:
        return 0.0
    return epoch / warmup_epochs if epoch < warmup_epochs else 1.0


def check(attack: AttackSection, *, epochs: int, phase: str) -> None:
    """Refuse a length or a step that cannot work."""
    several.check(attack)
    warmup = attack.warmup_epochs
    for ball, size in zip(threats(attack), several.step_sizes(attack), strict=True):
        inside = size is None or 0 < size < math.inf
        must_be("attack.step_size", size, inside, "above 0, in pixels, such as 2/255")
        check_length("attack.step_size", size or 0, ball.norm)
    wanted = f"at least 0 and below {phase}.epochs={epochs}, so that the radius reaches "
    must_be("attack.warmup_epochs", warmup, 0 <= warmup < epochs, wanted + "attack.epsilon")
    delay = attack.get("delay_epochs") or 0
    wanted = (
        f"at least 0, and with attack.warmup_epochs={warmup} below {phase}.epochs={epochs}, so "
    )
    inside = 0 <= delay < epochs - warmup
    must_be("attack.delay_epochs", delay, inside, wanted + "that the radius reaches attack.epsilon")
    if grows(attack) and not any(ball.epsilon for ball in threats(attack)):
        key, count = ("warmup", warmup) if warmup else ("delay", delay)
        raise ValueError(
            f"attack.{key}_epochs={count} with attack.epsilon=0: there is no radius to grow to; "
            f"set attack.{key}_epochs=0"
        )


def given(config: Config, objective: str) -> Callable[[Keys, Any], Any]:
    """Build (keys [B], share of the radius by now f32[]) -> what `training_attack` reads."""
    if not (objectives.named(objective).attacks and grows(config.attack)):
        return keys_alone
    if config.attack.get("mix"):
        radii = jnp.asarray([several.radius(own) for own in several.trained(config.attack)])
        return lambda keys, share: GrowingRadii(
            keys, jnp.broadcast_to(radii.astype(jnp.float32) * share, (*keys.shape, len(radii)))
        )
    epsilon = several.radius(config.attack)
    return lambda keys, share: GrowingRadii(
        keys, jnp.full(keys.shape, epsilon, jnp.float32) * share
    )
