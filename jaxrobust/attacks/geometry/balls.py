"""Geometry of the norms: random start, projection and steepest ascent, per image.

Arrays are [B, ...]; radii and steps are f[B], one per image. The order of floating-point operations
follows AutoAttack: for Linf and L2 the iterates are compared with it bit for bit, and for L1 the
rounding residue of `(x + t) + correction` counts as a non-zero entry.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Shaped

from jaxrobust.types import Array, Counts, Geometry, Keys, Mask, PerImage, Points

Rows = Shaped[Array, "B *rest"]  # of any type
AnyPoints = Float[Array | np.ndarray, "B *pixels"]


def per_image(values: Shaped[Array, " B"], images: Shaped[Array, "B ..."]) -> Array:
    """Reshape `values` [B] so that they broadcast against `images` [B, ...]."""
    return values.reshape(values.shape + (1,) * (images.ndim - 1))


def l0_norm(deltas: Points) -> PerImage:
    """Count the entries that are not exactly zero, f[B]."""
    count = jnp.sum(deltas.reshape(deltas.shape[0], -1) != 0, axis=1, dtype=jnp.int32)
    return count.astype(deltas.dtype)


def _total(values: Points) -> PerImage:
    return jnp.sum(values.reshape(values.shape[0], -1), axis=1)


def l1_norm(deltas: Points) -> PerImage:
    """Sum the absolute values per image, f[B]."""
    return _total(jnp.abs(deltas))


def l2_norm(deltas: Points) -> PerImage:
    """Compute the Euclidean norm per image, f[B]."""
    return jnp.sqrt(_total(deltas * deltas))


def linf_norm(deltas: Points) -> PerImage:
    """Return the largest absolute value per image, f[B]."""
    return jnp.max(jnp.abs(deltas.reshape(deltas.shape[0], -1)), axis=1)


def where(mask: Mask, yes: Rows, no: Rows) -> Rows:
    """Choose between two arrays like `jnp.where`, with one decision per image."""
    return jnp.where(per_image(mask, yes), yes, no)


def usable(gradient: Points) -> Points:
    """Replace each image's gradient that is not finite by zeros."""
    return jnp.where(per_image(all_finite(gradient), gradient), gradient, 0)


def all_finite(values: Points) -> Mask:
    """Mark the images whose entries are all finite, bool[B]."""
    return jnp.all(jnp.isfinite(values.reshape(values.shape[0], -1)), axis=1)


# --- Linf ---


def place_linf(uniform: Points, images: Points, epsilon: PerImage) -> Points:
    """Turn a draw from U[0, 1) into AutoAttack's start: one entry is exactly +-epsilon."""
    t = 2 * uniform - 1
    largest = jnp.max(jnp.abs(t.reshape(t.shape[0], -1)), axis=1)
    t = t / (per_image(largest, t) + 1e-12)
    return jnp.clip(images + per_image(epsilon, t) * t, 0, 1)


def _fill_linf(keys: Keys, images: Points, epsilon: PerImage) -> Points:
    uniform = 2 * draw(jax.random.uniform, keys, images) - 1
    return images + per_image(epsilon, images) * uniform


def _project_linf(points: AnyPoints, images: Points, epsilon: PerImage) -> Points:
    epsilon = per_image(epsilon, images)
    return jnp.clip(jnp.minimum(jnp.maximum(points, images - epsilon), images + epsilon), 0, 1)


def _ascend_linf(
    points: Points, gradient: Points, step: PerImage, kept_share: Any = None
) -> Points:
    return points + per_image(step, points) * _sign(gradient)


# --- L2 ---


def place_l2(normal: Points, images: Points, epsilon: PerImage) -> Points:
    """Turn a draw from N(0, 1) into AutoAttack's start: a point on the sphere."""
    direction = normal / (per_image(l2_norm(normal), normal) + 1e-12)
    return jnp.clip(images + per_image(epsilon, normal) * direction, 0, 1)


def _fill_l2(keys: Keys, images: Points, epsilon: PerImage) -> Points:
    longer = (images[0].size + 2,)
    normal = jax.vmap(lambda key: jax.random.normal(key, longer, images.dtype))(keys)
    return fill_l2(normal, images, epsilon)


def fill_l2(normal: Float[Array, "B longer"], images: Points, epsilon: PerImage) -> Points:
    """Turn draws from N(0, 1) into uniform points in the ball, as foolbox does.

    `normal` is f[B, n + 2], with two more entries than an image: the first n coordinates of a
    uniform point on the sphere in n + 2 dimensions are uniform in the ball.
    """
    inside = (normal / per_image(l2_norm(normal), normal))[:, :-2].reshape(images.shape)
    return images + per_image(epsilon, images) * inside


def _project_l2(points: AnyPoints, images: Points, epsilon: PerImage) -> Points:
    delta = jnp.subtract(points, images)
    norm = l2_norm(delta)
    direction = delta / (per_image(norm, delta) + 1e-12)
    return jnp.clip(images + direction * per_image(jnp.minimum(epsilon, norm), delta), 0, 1)


def _ascend_l2(points: Points, gradient: Points, step: PerImage, kept_share: Any = None) -> Points:
    norm = per_image(l2_norm(gradient), gradient)
    return points + per_image(step, points) * gradient / (norm + 1e-12)


# --- L1 ---


def place_l1(normal: Points, images: Points, epsilon: PerImage) -> Points:
    """Turn a draw from N(0, 1) into AutoAttack's start: its projection, a sparse point."""
    images = jnp.clip(images, 0, 1)
    return jnp.clip((images + normal) + l1_correction(images, normal, epsilon), 0, 1)


def _project_l1(points: AnyPoints, images: Points, epsilon: PerImage) -> Points:
    # Training noise may leave the box, where ball and box need not intersect: center on the nearest
    # image. There is no final clip: it would hide the residue at a saturated pixel (see above).
    images = jnp.clip(images, 0, 1)
    delta = jnp.subtract(points, images)
    return (images + delta) + l1_correction(images, delta, epsilon)


def _ascend_l1(points: Points, gradient: Points, step: PerImage, kept_share: PerImage) -> Points:
    """Step equally far along the fraction `kept_share` f[B] of the largest gradient entries."""
    size = jnp.abs(gradient)
    entries = gradient[0].size
    rank = jnp.clip((1 - kept_share) * entries, 0, entries - 1).astype(jnp.int32)
    signs = jnp.where(size >= per_image(order_statistic(size, rank), size), _sign(gradient), 0)
    return points + per_image(step, points) * signs / (per_image(l1_norm(signs), signs) + 1e-10)


def l1_correction(images: Points, delta: Points, epsilon: PerImage) -> Points:
    """Compute what to add to `delta` for its Euclidean projection onto L1 ball and box.

    Images are f[B, ...] in [0, 1]; `delta`, of any size, plus the result is the nearest v with
    ||v||_1 <= epsilon and 0 <= images + v <= 1. Entries that vanish get exactly -delta.
    Source: Croce & Hein 2021 (arXiv 2103.01208), proposition 2.1: all entries shrink by the same
      alpha, but at least as the box demands and at most to zero.
    """
    shape = delta.shape
    # Flat rows: XLA's CPU loops over a last axis of 3 channels are 20 times slower.
    images, delta = (a.reshape(shape[0], -1) for a in (images, delta))
    most = jnp.abs(delta)
    least = jnp.maximum(0, -jnp.minimum(1 - images - delta, images + delta))
    room = most - least

    def fits(alpha: PerImage) -> Mask:
        # Sum what remains, not what is taken: the latter cancels when delta is large.
        remainder = jnp.minimum(jnp.maximum(most - per_image(alpha, most), 0), room)
        return _total(remainder) <= epsilon

    # Do not sort the 2d breakpoints: XLA's sort is slow on CPU.
    alpha = smallest_float(fits, epsilon)
    shrunk = jnp.minimum(jnp.maximum(per_image(alpha, most), least), most)
    return (-_sign(delta) * shrunk).reshape(shape)


def _settle_l1(points: Points, images: Points) -> Points:
    """Restore the image's own value where only rounding moved it, and clip to the box."""
    # The residue of entries that a projection restored is below 8 units in the last place of 1; if
    # kept, it adds up to more than the tolerance for a small radius.
    images = jnp.clip(images, 0, 1)
    residue = jnp.abs(points - images) <= 8 * jnp.finfo(points.dtype).eps
    return jnp.where(residue, images, jnp.clip(points, 0, 1))


def _settle(points: Points, images: Points) -> Points:
    return points  # the projection already includes the box


def _sample(place: Callable[..., Array], distribution: Callable[..., Array]) -> Any:
    return lambda keys, images, epsilon: place(draw(distribution, keys, images), images, epsilon)


_uniform, _normal = jax.random.uniform, jax.random.normal
# The ball around an image, by norm: how to draw in it, project onto it, ascend in it.
GEOMETRIES: dict[str, Geometry] = {
    "linf": Geometry(
        _sample(place_linf, _uniform), _project_linf, _ascend_linf, _settle, _fill_linf
    ),
    "l2": Geometry(_sample(place_l2, _normal), _project_l2, _ascend_l2, _settle, _fill_l2),
    "l1": Geometry(_sample(place_l1, _normal), _project_l1, _ascend_l1, _settle_l1),
}


def draw(distribution: Callable[..., Array], keys: Keys, images: Points) -> Points:
    """Draw once per key, with an image's shape, so the draws do not depend on the batch."""
    return jax.vmap(lambda key: distribution(key, images.shape[1:], images.dtype))(keys)


def _sign(values: Array) -> Array:
    """Compute the sign like `jnp.sign`, but 0 for NaN."""
    return (values > 0).astype(values.dtype) - (values < 0).astype(values.dtype)


def order_statistic(sizes: Points, rank: Counts) -> PerImage:
    """Return entry `rank` i32[B] in ascending order of `sizes` f[B, ...] >= 0, without sorting."""
    sizes = sizes.reshape(sizes.shape[0], -1)

    def too_high(value: PerImage) -> Mask:
        at_most = jnp.sum(sizes <= value[:, None], axis=1, dtype=jnp.int32)
        return at_most > rank

    return smallest_float(too_high, sizes[:, 0])


def largest_pixels(sizes: Float[Array, "B H W 1"], count: Counts) -> Bool[Array, "B H W 1"]:
    """Mask each image's `count` i32[B] pixels with the largest sizes; the first of equal ones."""
    order = jnp.argsort(-sizes.reshape(sizes.shape[0], -1), axis=1)
    rank = jnp.argsort(order, axis=1).astype(jnp.int32)
    return rank.reshape(sizes.shape) < per_image(count, sizes)


def smallest_float(holds: Callable[[PerImage], Mask], like: PerImage) -> PerImage:
    """Return per image the smallest float >= 0 for which the monotone `holds`, f[B] to bool[B], is
    true.

    Floats >= 0 sort like their bits, so this bisects the bits: exact in as many steps as there are
    bits, at any magnitude. `like` provides shape and dtype.
    """
    integer = jnp.dtype(f"int{8 * like.dtype.itemsize}")
    bits = 8 * like.dtype.itemsize - 1  # all but the sign

    def body(i: Array, below: Array) -> Array:
        # `below` is the largest pattern known to fail, plus one, built from the highest bit down.
        candidate = below | (jnp.ones_like(below) << (bits - 1 - i).astype(integer))
        value = jax.lax.bitcast_convert_type(candidate - 1, like.dtype)
        return jnp.where(holds(value), below, candidate)

    below = jnp.zeros_like(like, integer)  # `_like` also copies shard_map's axes
    below = jax.lax.fori_loop(0, bits, body, below)
    return jax.lax.bitcast_convert_type(below, like.dtype)
