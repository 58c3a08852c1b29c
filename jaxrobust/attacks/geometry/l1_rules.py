"""How PGD on L1 starts, steps and projects: sparsely, as APGD-L1, or as ART 1.10 has it.

ART moves every entry in proportion to its gradient, and brings a perturbation back by scaling it.
The projection is not the nearest point, and steps that are no sparser than the gradient reach less
within an L1 ball than sparse ones: it is a weak attack, there to repeat figures that were measured
with it (Tang et al. 2022). Parity: tests/evaluation/engine/test_cifar_attacks.py.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxrobust.attacks.geometry.balls import GEOMETRIES, draw, l1_norm, per_image
from jaxrobust.types import Geometry, Keys, PerImage, Points

_FLOOR = 1e-7
# ART adds it to the norm of the gradient of a batch's mean loss, which is as much as adding it once
# for each image to the norm of that of the sum. No verdict of ours depends on a batch: this is the
# study's.
BATCH = 60


def _sample(keys: Keys, images: Points, epsilon: PerImage) -> Points:
    """Start on the sphere of radius sqrt(U(0, epsilon^2)), uniformly, brought into the box."""
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
    return jnp.clip(points, 0, 1)  # from which rounding may lead


# How attacks of fixed steps move on l1, by the names that `--l1_rule` takes.
L1_RULES: dict[str, Geometry] = {
    "sparse": GEOMETRIES["l1"],
    "art": Geometry(_sample, _project, _ascend, _settle),
}


def geometry_of(norm: str, l1_rule: str) -> Geometry:
    """Choose the geometry of a norm, on L1 by a rule; `ValueError`: there is no such rule of it."""
    if l1_rule not in L1_RULES:
        raise ValueError(f"l1_rule={l1_rule!r} is unknown; choose one of {', '.join(L1_RULES)}")
    if norm == "l1":
        return L1_RULES[l1_rule]
    if l1_rule != "sparse":
        raise ValueError(f"l1_rule={l1_rule!r} is of norm='l1', not of {norm!r}; leave it out")
    return GEOMETRIES[norm]
