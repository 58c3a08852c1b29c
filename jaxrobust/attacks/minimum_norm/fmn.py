"""FMN: find the nearest adversarial example in L0, L1, L2 or Linf, in a ball that adapts.

Each step follows the gradient and is projected onto the ball. Its radius is the estimated distance
to the boundary until a point is adversarial; then it shrinks after adversarial points and grows
after others.

Source: Pintor et al. 2021 (arXiv 2102.12827), algorithm 1. Details follow the authors' code at
1d2e600 and foolbox 3.3.4, except for their bugs: the authors estimate each distance from the loss
of the batch; foolbox does not project on L2 and keeps one entry too many on L0. One deviation from
the paper: the radius grows by at least its share gamma also before any point is adversarial. On
smooth networks the estimates may approach the boundary without ever crossing it; in the test, the
paper's rule fails for a third of the images on L1 and L2.
Parity: tests/attacks/test_minimum_norm.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxrobust.attacks import inputs
from jaxrobust.attacks.geometry import balls
from jaxrobust.attacks.geometry.balls import per_image
from jaxrobust.attacks.losses import Goal, goal_of
from jaxrobust.attacks.machine import as_attack, run
from jaxrobust.attacks.minimum_norm import nearest
from jaxrobust.attacks.minimum_norm.nearest import NearestState
from jaxrobust.runtime.text import spelling
from jaxrobust.types import Array, Attack, GivenImages, Machine, Mask, PerImage, Points

_LAST_GAMMA = 0.001


class _Ball(NamedTuple):
    norm: Callable[[Points], PerImage]
    dual: Callable[[Points], PerImage]
    project: Callable[[Points, Points, PerImage], Points]


def _project_l0(points: Points, images: Points, epsilon: PerImage) -> Points:
    """Keep the `epsilon` >= 1 entries that differ most, and all entries equal to the last."""
    delta = points - images
    size = jnp.abs(delta)
    rank = images[0].size - epsilon.astype(jnp.int32)
    least = per_image(balls.order_statistic(size, rank), size)
    return jnp.clip(images + jnp.where(size >= least, delta, 0), 0, 1)


def _project_l1(points: Points, images: Points, epsilon: PerImage) -> Points:
    """Project onto the ball, then onto the box, as the authors do."""
    delta = points - images

    def shrunk(threshold: PerImage) -> Points:
        return jnp.maximum(jnp.abs(delta) - per_image(threshold, delta), 0)

    fits = lambda threshold: balls.l1_norm(shrunk(threshold)) <= epsilon  # noqa: E731
    threshold = balls.smallest_float(fits, epsilon)
    return jnp.clip(images + jnp.sign(delta) * shrunk(threshold), 0, 1)


_BALLS = {
    "l0": _Ball(balls.l0_norm, balls.l0_norm, _project_l0),  # L0 has no dual norm
    "l1": _Ball(balls.l1_norm, balls.linf_norm, _project_l1),
    "l2": _Ball(balls.l2_norm, balls.l2_norm, balls.GEOMETRIES["l2"].project),
    "linf": _Ball(balls.linf_norm, balls.l1_norm, balls.GEOMETRIES["linf"].project),
}


def fmn_run(
    network: Any, images: GivenImages, labels: Any, *, steps: int = 100, **settings: Any
) -> NearestState:
    """Run FMN once; return its final state, with `adv` and `norm_best`. Arguments as in `fmn`."""
    machine = fmn_machine(steps=steps, **settings)
    start: NearestState = machine.init(images, labels)
    return run(machine, network, start, gradient_steps=steps)


def fmn_machine(
    *,
    norm: str = "linf",
    steps: int = 100,
    step_size: float = 1.0,
    gamma: float = 0.05,
    loss: str | Callable[..., Array] | Goal = "cw",
) -> Machine:
    """Make a `types.Machine` for FMN with `steps` evaluations; arguments as in `fmn`."""
    goal, norm = goal_of(loss), spelling.norm(norm)
    if norm not in _BALLS:
        raise ValueError(f"norm={norm!r} is unknown; choose one of {', '.join(_BALLS)}")
    inputs.check_settings(norm="l2", epsilon=0, steps=steps, step_size=step_size)
    ball, radius = _BALLS[norm], _next_count if norm == "l0" else _next_radius

    def tell(
        state: NearestState, loss: PerImage, score: PerImage, gradient: Points
    ) -> NearestState:
        images, gradient = state.images, balls.usable(gradient)
        adversarial, length = goal.reached(score, loss), ball.norm(state.points - images)
        step = nearest.annealed(state, step_size, step_size / 100)
        change = nearest.annealed(state, gamma, _LAST_GAMMA)
        # Where the linearized loss is 0; NaN only if the loss is.
        boundary = length + jnp.abs(loss) / jnp.maximum(ball.dual(gradient), 1e-30)
        state = nearest.keep_nearest(state, adversarial, length)
        epsilon = radius(state, adversarial, change, jnp.nan_to_num(boundary, nan=jnp.inf))
        epsilon = jnp.minimum(epsilon, ball.norm(jnp.maximum(images, 1 - images)))
        moved = state.points + per_image(step, images) * nearest.direction(gradient)
        return state._replace(points=ball.project(moved, images, epsilon), epsilon=epsilon)

    first = float(norm == "l0")
    return nearest.nearest_machine(goal, tell, epsilon=first, steps=steps, gamma=gamma)


def _next_radius(
    state: NearestState, adversarial: Mask, change: PerImage, boundary: PerImage
) -> PerImage:
    smaller = jnp.minimum(state.epsilon * (1 - change), state.norm_best)
    larger = state.epsilon * (1 + change)
    nothing_yet = jnp.isinf(state.norm_best)
    larger = jnp.where(nothing_yet, jnp.maximum(boundary, larger), larger)
    return jnp.where(adversarial, smaller, larger)


def _next_count(
    state: NearestState, adversarial: Mask, change: PerImage, boundary: PerImage
) -> PerImage:
    count = state.epsilon
    smaller = jnp.minimum(count - 1, jnp.floor(count * (1 - change)))
    larger = jnp.maximum(count + 1, jnp.floor(count * (1 + change)))
    return jnp.maximum(jnp.where(adversarial, jnp.minimum(smaller, state.norm_best), larger), 1)


def fmn(
    *,
    norm: str = "linf",
    steps: int = 100,
    step_size: float = 1.0,
    gamma: float = 0.05,
    loss: str | Callable[..., Array] | Goal = "cw",
    info: bool = False,
) -> Attack:
    """Make an FMN attack, which returns the nearest adversarial example in a norm.

    If none is found, the image is returned unchanged, clipped to [0, 1]. The attack is
    deterministic; `key` may be None.

    Args:
      norm: "l0", "l1", "l2" or "linf"; L0 counts entries, so a pixel of three channels counts up to
        three times.
      steps: K >= 1; costs K forward and K backward passes.
      step_size: the L2 length of the first step, for every norm; it decays to a hundredth.
      gamma: the share by which the radius shrinks or grows in the first step; it decays to 0.001.
      loss: the name of a loss on labels, or a `Goal` whose score defines what is adversarial. The
        first radii are best if the loss is 0 on the boundary, like a margin.
      info: return `(images_adv, AttackInfo)`, at the cost of one more forward pass.

    >>> import jax, jax.numpy as jnp
    >>> logits_fn = lambda x: x.mean((1, 2)) @ jnp.array([[1.0, 0.0]]) + jnp.array([0, 0.4])
    >>> images, labels = jnp.full((1, 4, 4, 1), 0.5), jnp.array([0])
    >>> images_adv = fmn(norm="linf", steps=40)(logits_fn, None, images, labels)
    >>> round(float(jnp.abs(images_adv - images).max()), 2)  # the boundary is at 0.1
    0.1
    """
    settings: dict[str, Any] = {"step_size": step_size, "gamma": gamma, "loss": loss}
    machine = fmn_machine(norm=norm, steps=steps, **settings)
    return as_attack(machine, random_start=False, info=info, gradient_steps=steps)
