"""What is different in APGD on L1: the sparsity of the best point decides about steps and restarts.

Source: Croce & Hein 2021 (arXiv 2103.01208), section 3.2; parity: tests/attacks/test_apgd.py.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxrobust.attacks.geometry.balls import l0_norm
from jaxrobust.types import Mask, PerImage, Points

State = TypeVar("State")  # of `apgd`


def follow_sparsity(state: State, due: Mask) -> tuple[State, Mask]:
    """Go back to the full step where the best point got sparser, else shorten it.

    Later steps move two thirds as many entries as the best point does. Returns the state and who
    restarts from the best point.
    """
    s: Any = state
    sparsity = l0_norm(s.x_best - s.images)
    sparser = sparsity / s.sparsity < 0.95  # 0/0 is not
    step = jnp.where(sparser, s.epsilon, _divide(s.step, 1.5))
    step = jnp.clip(step, _divide(s.epsilon, 10), s.epsilon)
    state = s._replace(
        step=jnp.where(due, step, s.step),
        kept=jnp.where(due, kept_of(sparsity, s.images), s.kept),
        sparsity=jnp.where(due, sparsity, s.sparsity),
    )
    return state, due & sparser


def kept_of(sparsity: PerImage, images: Points) -> PerImage:
    """Compute the fraction of entries to move, of a best point that differs in `sparsity` f[B]."""
    return _divide(_divide(sparsity, images[0].size), 1.5)


def _divide(values: PerImage, divisor: float) -> PerImage:
    """Divide by a constant for good.

    XLA would multiply by the rounded reciprocal, and join two divisions into one; a unit in the
    last place of `kept` can move one entry more or less.
    """
    values, divisors = jax.lax.optimization_barrier((values, jnp.full_like(values, divisor)))
    return values / divisors
