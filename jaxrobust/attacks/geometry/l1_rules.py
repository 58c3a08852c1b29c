"""How PGD on L1 starts, steps and projects: sparsely, like APGD-L1, or like ART 1.10.

ART moves every entry in proportion to its gradient, and scales a perturbation back into the ball.
This is not the nearest point, and such dense steps reach less within an L1 ball than sparse ones.
The attack is weak and exists to reproduce published figures (Tang et al. 2022). Parity:
tests/evaluation/engine/test_cifar_attacks.py.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxrobust.attacks.geometry.balls import GEOMETRIES, draw, l1_norm, per_image
from jaxrobust.types import Geometry, Keys, PerImage, Points

_FLOOR = 1e-7
# ART adds it to the gradient norm of a batch's mean loss, which equals adding it once per image to
# the gradient norm of the sum. Our verdicts never depend on a batch, so this is the batch size of
# the study.
BATCH = 60


def _sample(keys: Keys, images: Points, epsilon: PerImage) -> Points:
    """Start uniformly on the sphere of radius sqrt(U(0, epsilon^2)), then clip to the box."""
    pairs = jax.vmap(jax.random.split)(keys)
    laplace = draw(jax.random.laplace, pairs[:, 0], images)  # of one norm, it is uniform
    share = jnp.sqrt(jax.vmap(lambda key: jax.random.uniform(key, (), images.dtype))(pairs[:, 1]))
    direction = laplace / per_image(l1_norm(laplace), laplace)
    return jnp.clip(images + per_image(epsilon * share, images) * direction, 0, 1)


def _project(points: Points, images: Points, epsilon: PerImage) -> Points:
    delta = jnp.clip(points, 0, 1) - images
    scale = jnp.minimum(1, epsilon / (l1_norm(delta) + _FLOOR))
    return images + per_image(scale, delta) * delta


def _ascend(points: Points, gradient: Points, step: PerImage, kept_share: Any = None) -> Points:
    length = l1_norm(gradient) + BATCH * _FLOOR
    return points + per_image(step / length, points) * gradient


def _settle(points: Points, images: Points) -> Points:
    return jnp.clip(points, 0, 1)  # rounding may leave the box


# How attacks with fixed steps move on l1, by the names for `--l1_rule`.
L1_RULES: dict[str, Geometry] = {
    "sparse": GEOMETRIES["l1"],
    "art": Geometry(_sample, _project, _ascend, _settle),
}


def geometry_of(norm: str, l1_rule: str) -> Geometry:
    """Return the geometry of a norm, with a rule for L1; `ValueError` if there is no such rule."""
    if l1_rule not in L1_RULES:
        raise ValueError(f"l1_rule={l1_rule!r} is unknown; choose one of {', '.join(L1_RULES)}")
    if norm == "l1":
        return L1_RULES[l1_rule]
    if l1_rule != "sparse":
        raise ValueError(
            f"l1_rule={l1_rule!r} is only for norm='l1', not for {norm!r}; leave it out"
        )
    return GEOMETRIES[norm]
