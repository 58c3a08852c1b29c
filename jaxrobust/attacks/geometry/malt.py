"""Which classes are nearest to first order: the order in which MALT targets wrong classes.

Source: Melamed, Yehudai & Shamir 2024 (arXiv 2407.02240), Section 3: the gap between two logits
over the norm of the difference of their gradients. Here it is the dual of the ball's norm, so the
ratio is the distance, in the ball's norm, to where a linear network's two logits are equal.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.types import Array, LogitsFn, check_norm

_DUAL = {"linf": 1, "l2": 2, "l1": jnp.inf}  # order of the norm that bounds a linear function


def first_order_distances(
    logits_fn: LogitsFn, images: Array, labels: Array, targets: Array, *, norm: str
) -> Array:
    """Estimate the distance to the boundary with each target, from the Jacobian at the image.

    It takes one forward pass, and one backward pass per target, one target after the other, so
    memory is that of a single gradient.

    Args:
      logits_fn: f32[B,H,W,C] -> f32[B,K].
      images: f32[B,H,W,C].
      labels: i32[B].
      targets: i32[B,T], wrong classes.
      norm: of the ball.
    Returns:
      f32[B,T]: gap over norm; infinite where the gradients of both logits are equal.
    """
    check_norm(norm)

    def gaps_of(points: Array) -> Array:
        logits = logits_fn(points)
        label_logit = jnp.take_along_axis(logits, labels[:, None], axis=1)
        return label_logit - jnp.take_along_axis(logits, targets, axis=1)

    gaps, pull = jax.vjp(gaps_of, images)

    def slope(chosen: Array) -> Array:
        (gradient,) = pull(jnp.broadcast_to(chosen, gaps.shape))
        norms: Array = jnp.linalg.norm(gradient.reshape(len(gradient), -1), _DUAL[norm], axis=1)
        return norms

    slopes = jax.lax.map(slope, jnp.eye(targets.shape[1], dtype=gaps.dtype)).T
    flat = slopes == 0
    return jnp.where(flat, jnp.inf, gaps / jnp.where(flat, 1, slopes))


def nearest_first(distances: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Sort targets i[n,T] by distances f[n,T]; equal ones keep their order, NaN comes last."""
    finite = np.where(np.isnan(distances), np.inf, distances)
    order = np.argsort(finite, axis=1, kind="stable")
    return np.take_along_axis(targets, order, axis=1)
