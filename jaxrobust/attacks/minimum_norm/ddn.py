"""DDN: the nearest adversarial example in L2, by steps whose direction and norm are decoupled.

Each step turns the perturbation along the gradient and rescales it to a norm that shrinks where the
last point was adversarial and grows where it was not.

Source: Rony et al. 2019 (arXiv 1811.09600), algorithm 1. The norm is at most that of the farthest
image, as in the authors' code and foolbox 3.3.4. The authors' code also rounds points to 256
levels, and both step in a random direction where the gradient is zero; this version does neither.
Parity: tests/attacks/test_minimum_norm.py.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxrobust.attacks import inputs
from jaxrobust.attacks.geometry.balls import l2_norm, per_image, usable
from jaxrobust.attacks.losses import Goal, goal_of
from jaxrobust.attacks.machine import as_attack, run
from jaxrobust.attacks.minimum_norm import nearest
from jaxrobust.attacks.minimum_norm.nearest import NearestState
from jaxrobust.types import Array, Attack, GivenImages, Machine, PerImage, Points


def ddn_run(
    network: Any, images: GivenImages, labels: Any, *, steps: int = 100, **settings: Any
) -> NearestState:
    """Run DDN once; return its final state, with `adv` and `norm_best`. Arguments as in `ddn`."""
    machine = ddn_machine(steps=steps, **settings)
    start: NearestState = machine.init(images, labels)
    return run(machine, network, start, gradient_steps=steps)


def ddn_machine(
    *,
    steps: int = 100,
    init_epsilon: float = 1.0,
    gamma: float = 0.05,
    loss: str | Callable[..., Array] | Goal = "ce",
) -> Machine:
    """Make a `types.Machine` for DDN with `steps` evaluations; arguments as in `ddn`."""
    goal = goal_of(loss)
    inputs.check_settings(norm="l2", epsilon=init_epsilon, steps=steps)
    if init_epsilon == 0:
        raise ValueError("init_epsilon=0 must be above 0, such as 1.0")

    def tell(
        state: NearestState, loss: PerImage, score: PerImage, gradient: Points
    ) -> NearestState:
        images, delta = state.images, state.points - state.images
        adversarial, step = goal.reached(score, loss), nearest.annealed(state, 1.0, 0.01)
        state = nearest.keep_nearest(state, adversarial, l2_norm(delta))
        delta = delta + per_image(step, delta) * nearest.direction(usable(gradient))
        epsilon = state.epsilon * jnp.where(adversarial, 1 - gamma, 1 + gamma)
        epsilon = jnp.minimum(epsilon, l2_norm(jnp.maximum(images, 1 - images)))
        delta = delta * per_image(epsilon / jnp.maximum(l2_norm(delta), 1e-12), delta)
        return state._replace(points=jnp.clip(images + delta, 0, 1), epsilon=epsilon)

    return nearest.nearest_machine(goal, tell, epsilon=init_epsilon, steps=steps, gamma=gamma)


def ddn(
    *,
    steps: int = 100,
    init_epsilon: float = 1.0,
    gamma: float = 0.05,
    loss: str | Callable[..., Array] | Goal = "ce",
    info: bool = False,
) -> Attack:
    """Make a DDN attack, which returns the nearest adversarial example in L2.

    If none is found, the image is returned unchanged, clipped to [0, 1]. The attack is
    deterministic; `key` may be None.

    Args:
      steps: K >= 1; costs K forward and K backward passes.
      init_epsilon: the norm of the first step, in units of pixels in [0, 1].
      gamma: the share by which the norm shrinks or grows in each step.
      loss: the name of a loss on labels, or a `Goal` whose score defines what is adversarial.
      info: return `(images_adv, AttackInfo)`, at the cost of one more forward pass.

    >>> import jax, jax.numpy as jnp
    >>> logits_fn = lambda x: x.mean((1, 2)) @ jnp.array([[1.0, 0.0]]) + jnp.array([0, 0.4])
    >>> images, labels = jnp.full((1, 4, 4, 1), 0.5), jnp.array([0])
    >>> images_adv = ddn()(logits_fn, None, images, labels)
    >>> round(float(jnp.linalg.norm(images_adv - images)), 2)  # the boundary is at 0.4
    0.4
    """
    machine = ddn_machine(steps=steps, init_epsilon=init_epsilon, gamma=gamma, loss=loss)
    return as_attack(machine, random_start=False, info=info, gradient_steps=steps)
