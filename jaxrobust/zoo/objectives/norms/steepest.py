"""Multi steepest descent: each step uses the norm that hurts most from the same point."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrobust.attacks import Goal, Noise, pgd
from jaxrobust.attacks.inputs import check_noise
from jaxrobust.attacks.machine import as_attack, checked
from jaxrobust.attacks.pgd import PgdState, pgd_machine
from jaxrobust.types import Array, Attack, Logits, LogitsFn, Machine, PerImage, Points


class SteepestBall(NamedTuple):
    """One of the balls: its norm, and its radius and step size in pixels."""

    norm: str
    epsilon: float | Array  # of all images, or f[B]
    step_size: float | None = None  # default: 2.5 epsilon / steps, as of `pgd`


def msd(
    balls: Sequence[SteepestBall],
    *,
    steps: int,
    random_start: bool | Noise = False,
    loss: str | Callable[..., Array] | Goal = "ce",
    kept_fraction: float = 0.05,
) -> Attack:
    """Make multi steepest descent, to its last iterate (Maini, Wong, Kolter 2020, "Adversarial
    Robustness Against the Union of Multiple Perturbation Models", arXiv 1909.04068, algorithm 1).

    Each step computes one gradient. From its point, every norm makes a PGD step into its own ball
    and the box; for each image, the candidate with the highest loss is the next point. It costs
    `steps` passes forward and backward, and one forward pass per norm and step. With a single ball
    it equals `pgd`.

    Ours: a step is 2.5 epsilon / steps by default, while the authors' code for CIFAR-10 has 50
    steps of 0.003 on linf, 0.05 on l2 and 1 on l1. On l1, a step changes a fixed fraction of the
    entries, while theirs draws how many, 5 to 20. The last point is returned, as in the paper's
    algorithm, while their code returns the point with the highest loss.

    Args:
      balls: one or several, of different norms.
      random_start: start at a random point of the first ball, instead of at the image as in the
        paper.
    Other arguments and the result are as in `pgd`.
    Parity: tests/zoo/objectives/norms/test_steepest.py, against NumPy.
    """
    settings: dict[str, Any] = {"steps": steps, "loss": loss, "kept_fraction": kept_fraction}
    check_noise(random_start, balls[0].norm)
    if len(balls) == 1:
        return pgd(**balls[0]._asdict(), random_start=random_start, **settings)
    first, *others = (pgd_machine(**ball._asdict(), **settings) for ball in balls)
    drive = partial(_together, others=others)
    return as_attack(first, random_start=random_start, drive=drive, steps=steps)


def _together(
    machine: Machine, logits_fn: LogitsFn, state: PgdState, *, others: Sequence[Machine], steps: int
) -> PgdState:
    """Drive the first norm's machine from its start, with candidate steps of all norms."""
    network = checked(machine, logits_fn, state)
    states = [state, *(other.init(state.images, state.labels) for other in others)]
    machines = [machine, *others]

    def losses(points: Points) -> tuple[PerImage, Logits]:
        logits = network(points, 0)
        return machine.loss(state, logits), logits

    def total(points: Points) -> tuple[Array, PerImage]:
        values, _ = losses(points)
        return values.sum(), values

    def step(points: Points, _: None) -> tuple[Points, None]:
        slope, values = jax.grad(total, has_aux=True)(points)
        candidates = [
            norm_machine.tell(norm_state._replace(points=points), values, None, slope).points
            for norm_machine, norm_state in zip(machines, states, strict=True)
        ]
        best = jnp.stack([losses(candidate)[0] for candidate in candidates], axis=1).argmax(1)
        index = best.reshape(-1, *[1] * points.ndim)
        return jnp.take_along_axis(jnp.stack(candidates, axis=1), index, axis=1)[:, 0], None

    points, _ = jax.lax.scan(step, state.points, None, length=steps)
    for norm_machine, norm_state in zip(machines, states, strict=True):  # on l1, undo rounding
        points = norm_machine.result(norm_state._replace(points=points))
    return state._replace(points=points)
