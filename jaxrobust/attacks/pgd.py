"""Projected gradient ascent with a fixed step, and the single-step case, FGSM."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxrobust.attacks import inputs
from jaxrobust.attacks.geometry.balls import usable
from jaxrobust.attacks.geometry.l1_rules import geometry_of
from jaxrobust.attacks.losses import Goal, goal_of
from jaxrobust.attacks.machine import as_attack
from jaxrobust.attacks.registry import Fixed, MachineFacts, NamedAttack, add
from jaxrobust.runtime.text import spelling
from jaxrobust.types import Array, Attack, Counts, Machine, PerImage, Points, Start


class PgdState(NamedTuple):
    """The state of PGD; the first axis of every array is the image."""

    images: Points
    labels: Any  # i32[B] or f[B, C], or the targets of a loss function
    points: Points  # to evaluate next; after the last step, the result
    epsilon: PerImage
    step: PerImage
    iteration: Counts  # steps taken
    steps: Counts  # steps to take


def fgsm(
    *,
    norm: str = "linf",
    epsilon: float | Array,
    step_size: float | None = None,
    random_start: bool | inputs.Noise = False,
    loss: str | Callable[..., Array] | Goal = "ce",
    kept_fraction: float = 0.05,
    l1_rule: str = "sparse",
    info: bool = False,
) -> Attack:
    """Make a single projected step of steepest ascent (Goodfellow et al. 2014, arXiv 1412.6572).

    Arguments as in `pgd`, except that `step_size` defaults to `epsilon`. With `random_start` and
    1.25 epsilon this is Wong et al. 2020 (arXiv 2001.03994).

    >>> import jax, jax.numpy as jnp
    >>> logits_fn = lambda images: images.mean((1, 2)) @ jnp.array([[1.0, -1.0]])
    >>> images, labels = jnp.full((1, 4, 4, 1), 0.5), jnp.array([0])
    >>> attack = fgsm(epsilon=0.25)
    >>> images_adv = attack(logits_fn, jax.random.key(0), images, labels)
    >>> float(images_adv.max())
    0.25
    """
    if step_size is None:
        if isinstance(epsilon, Array):
            raise ValueError("with one radius per image, pass step_size too")
        step_size = epsilon or None  # a radius of 0 leaves no room for steps
    settings: dict[str, Any] = {"loss": loss, "kept_fraction": kept_fraction, "l1_rule": l1_rule}
    settings |= {"step_size": step_size, "random_start": random_start, "info": info}
    return pgd(norm=norm, epsilon=epsilon, steps=1, **settings)


def pgd(
    *,
    norm: str = "linf",
    epsilon: float | Array,
    steps: int,
    step_size: float | None = None,
    random_start: bool | inputs.Noise = True,
    loss: str | Callable[..., Array] | Goal = "ce",
    kept_fraction: float = 0.05,
    l1_rule: str = "sparse",
    info: bool = False,
) -> Attack:
    """Make projected gradient ascent, returning the last iterate (Madry et al. 2018, 1706.06083).

    Args:
      norm: "linf", "l2" or "l1".
      epsilon: radius, in units of pixels in [0, 1]; inside `jit` it may be an array f[B].
      steps: K >= 1; costs K forward and K backward passes.
      step_size: length of a step in the same norm, default 2.5 epsilon / K.
      random_start: start at AutoAttack's random point, or with `Noise`, instead of the image.
      loss: "ce" (labels i32[B] or f[B,C]), "kl" (f[B,C]), "dlr", "cw", "cw-floor" or "pm" (i32[B]);
        a function or a `Goal`, as in `apgd`.
      kept_fraction: L1 only, the fraction of entries that a step moves.
      l1_rule: L1 only, the rule for start, steps and projection: "sparse" or "art"; see `l1_rules`.
      info: return `(images_adv, AttackInfo)`, at the cost of one more forward pass.
    Returns:
      attack(network, key, images, labels) -> images_adv, as in `apgd`.

    >>> import jax, jax.numpy as jnp
    >>> logits_fn = lambda images: images.mean((1, 2)) @ jnp.array([[1.0, -1.0]])
    >>> images, labels = jnp.full((1, 4, 4, 1), 0.5), jnp.array([0])
    >>> attack = pgd(norm="l2", epsilon=1.0, steps=4, random_start=False)
    >>> images_adv = attack(logits_fn, jax.random.key(0), images, labels)
    >>> round(float(jnp.linalg.norm(images_adv - images)), 4)
    1.0
    """
    inputs.check_noise(random_start, norm)
    settings: dict[str, Any] = {"loss": loss, "kept_fraction": kept_fraction, "l1_rule": l1_rule}
    machine = pgd_machine(norm=norm, epsilon=epsilon, steps=steps, step_size=step_size, **settings)
    return as_attack(machine, random_start=random_start, info=info, gradient_steps=steps)


def pgd_machine(
    *,
    norm: str,
    epsilon: float | Array,
    steps: int,
    step_size: float | None = None,
    loss: str | Callable[..., Array] | Goal = "ce",
    kept_fraction: float = 0.05,
    l1_rule: str = "sparse",
) -> Machine:
    """Make a `types.Machine` for PGD with `steps` evaluations; arguments as in `pgd`."""
    settings: dict[str, Any] = {"step_size": step_size, "kept_fraction": kept_fraction}
    norm, goal = spelling.norm(norm), goal_of(loss)
    inputs.check_settings(norm=norm, epsilon=epsilon, steps=steps, **settings)
    inputs.check_no_targets(goal)
    ball = geometry_of(norm, l1_rule)
    length = 2.5 * epsilon / steps if step_size is None else step_size

    def init(
        images: Any,
        labels: Any,
        *,
        keys: Any = None,
        start: Start | inputs.Noise = "image",
        **_: Any,
    ) -> PgdState:
        images, labels = inputs.check_inputs(images, labels, logits=goal.logits)
        inputs.check_radii(epsilon, images)
        floats, integers = inputs.fillers(images)
        radius = floats(epsilon)
        points = inputs.start_points(ball, start, images, radius, keys)
        if not isinstance(start, inputs.Noise) or start.projected:
            points = ball.project(points, images, radius)  # before the first gradient
        return PgdState(
            images=images,
            labels=labels,
            points=points,
            epsilon=radius,
            step=floats(length),
            iteration=integers(0),
            steps=integers(steps),
        )

    def tell(state: PgdState, loss: Any, score: Any, gradient: Points) -> PgdState:
        kept_share = jnp.full_like(state.step, kept_fraction)
        # Without a usable gradient it stays, except to project a start.
        moved = ball.ascend(state.points, usable(gradient), state.step, kept_share)
        moved = ball.project(moved, state.images, state.epsilon)
        return state._replace(points=moved, iteration=state.iteration + 1)

    return Machine(
        init=init,
        query=lambda state: state.points,
        loss=lambda state, outputs: goal.value(outputs, state.labels, state.epsilon.dtype),
        score=goal.state_score if goal.score else None,
        tell=tell,
        finished=lambda state: state.iteration >= state.steps,
        result=lambda state: ball.settle(state.points, state.images),
        logits=goal.logits,
    )


_FACTS = MachineFacts(
    machine="pgd",
    make=lambda setting, epsilon: pgd_machine(
        norm=setting.norm, epsilon=epsilon, steps=setting.steps
    ),
    rule="a fixed length",
    extra=0,
    least={"steps": 1, "restarts": 1},
)
_PGD: dict[str, Any] = {"make": pgd, "length": 2.5}
add(
    _FACTS,
    NamedAttack(
        *("fgsm", "one step from the image, of length epsilon", _FACTS),
        fixed=Fixed(start="image"),
        trains=True,
        make=lambda steps, **settings: fgsm(**settings),
        length=1.0,
        single=True,
        stronger="pgd",
    ),
    NamedAttack(
        *("pgd", "steps along the gradient of the cross-entropy", _FACTS),
        fixed=Fixed(),
        trains=True,
        **_PGD,
    ),
    # As in the evaluation of Huang et al. 2022 (arXiv 2212.11005): misclassified points stay.
    NamedAttack("cw", "PGD on min(margin, 0)", _FACTS, fixed=Fixed(loss="cw-floor"), **_PGD),
    NamedAttack("margin", "PGD on the margin", _FACTS, fixed=Fixed(loss="cw"), **_PGD),
)
