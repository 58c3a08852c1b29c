"""The geometry of the norms: random start, projection and steepest ascent, image by image.

Arrays are [B, ...]; radii and steps are f[B], one per image. The order of floating-point
operations is that of AutoAttack: on Linf and L2 the iterates are compared with it bit for bit,
and on L1 the rounding residue of `(x + t) + correction` counts as a non-zero entry.
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
    """Count the entries that differ from zero exactly, f[B]."""
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
    """Find the largest absolute value per image, f[B]."""
    return jnp.max(jnp.abs(deltas.reshape(deltas.shape[0], -1)), axis=1)


def where(mask: Mask, yes: Rows, no: Rows) -> Rows:
    """Choose between two arrays as `jnp.where` does, with one decision per image."""
    return jnp.where(per_image(mask, yes), yes, no)


def usable(gradient: Points) -> Points:
    """Replace by zeros the gradient of each image for which it is not finite."""
    return jnp.where(per_image(all_finite(gradient), gradient), gradient, 0)


def all_finite(values: Points) -> Mask:
    """Tell whether every entry of an image is finite, bool[B]."""
    return jnp.all(jnp.isfinite(values.reshape(values.shape[0], -1)), axis=1)


# --- Linf ---


def place_linf(uniform: Points, images: Points, epsilon: PerImage) -> Points:
    """Make AutoAttack's start of a draw from U[0, 1): one entry at exactly +-epsilon."""
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
    """Make AutoAttack's start of a draw from N(0, 1): a point on the sphere."""
    direction = normal / (per_image(l2_norm(normal), normal) + 1e-12)
    return jnp.clip(images + per_image(epsilon, normal) * direction, 0, 1)


def _fill_l2(keys: Keys, images: Points, epsilon: PerImage) -> Points:
    longer = (images[0].size + 2,)
    normal = jax.vmap(lambda key: jax.random.normal(key, longer, images.dtype))(keys)
    return fill_l2(normal, images, epsilon)


def fill_l2(normal: Float[Array, "B longer"], images: Points, epsilon: PerImage) -> Points:
    """Make points that are uniform in the ball of draws from N(0, 1), as foolbox does.

    `normal` is f[B, n + 2], two more than an image has entries: the first n coordinates of a
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
    """Make AutoAttack's start of a draw from N(0, 1): its projection, a sparse point."""
    images = jnp.clip(images, 0, 1)
    return jnp.clip((images + normal) + l1_correction(images, normal, epsilon), 0, 1)


def _project_l1(points: AnyPoints, images: Points, epsilon: PerImage) -> Points:
    # Training noise may leave the box, where ball and box need not meet: centre on the nearest
    # image. No box clip afterwards: one at a saturated pixel would hide its residue (see above).
    images = jnp.clip(images, 0, 1)
    delta = jnp.subtract(points, images)
    return (images + delta) + l1_correction(images, delta, epsilon)


def _ascend_l1(points: Points, gradient: Points, step: PerImage, kept_share: PerImage) -> Points:
    """Step equally far along the fraction `kept` f[B] of the largest gradient entries."""
    size = jnp.abs(gradient)
    entries = gradient[0].size
    rank = jnp.clip((1 - kept_share) * entries, 0, entries - 1).astype(jnp.int32)
    signs = jnp.where(size >= per_image(order_statistic(size, rank), size), _sign(gradient), 0)
    return points + per_image(step, points) * signs / (per_image(l1_norm(signs), signs) + 1e-10)


def l1_correction(images: Points, delta: Points, epsilon: PerImage) -> Points:
    """Compute what `delta` lacks to be its Euclidean projection onto L1 ball and box.

    Images are f[B, ...] in [0, 1]; `delta`, of any size, plus the result is the nearest v with
    ||v||_1 <= epsilon and 0 <= images + v <= 1. Entries that shrink to nothing get exactly -delta.
    Source: Croce & Hein 2021 (arXiv 2103.01208), proposition 2.1: every entry shrinks by one and
      the same alpha, but by no less than the box demands and no more than it has.
    """
    shape = delta.shape
    # Flat rows: XLA's CPU loops over a last axis of 3 channels are 20 times slower.
    images, delta = (a.reshape(shape[0], -1) for a in (images, delta))
    most = jnp.abs(delta)
    least = jnp.maximum(0, -jnp.minimum(1 - images - delta, images + delta))
    room = most - least

    def fits(alpha: PerImage) -> Mask:
        # The sum of what is left, not of what is taken: the latter cancels when delta is large.
        remainder = jnp.minimum(jnp.maximum(most - per_image(alpha, most), 0), room)
        return _total(remainder) <= epsilon

    # Not a sort of the 2d breakpoints: XLA's is slow on CPU.
    alpha = smallest_float(fits, epsilon)
    shrunk = jnp.minimum(jnp.maximum(per_image(alpha, most), least), most)
    return (-_sign(delta) * shrunk).reshape(shape)


def _settle_l1(points: Points, images: Points) -> Points:
    """Hand out the image's own value where only rounding moved it, and nothing outside the box.

    The residue of entries that a projection gave back is below 8 units in the last place of 1;
    left in, it adds up to more than the tolerance on a small radius.
    """
    images = jnp.clip(images, 0, 1)
    residue = jnp.abs(points - images) <= 8 * jnp.finfo(points.dtype).eps
    return jnp.where(residue, images, jnp.clip(points, 0, 1))


def _settle(points: Points, images: Points) -> Points:
    return points  # the projection ends with the box


def _sample(place: Callable[..., Array], distribution: Callable[..., Array]) -> Any:
    return lambda keys, images, epsilon: place(draw(distribution, keys, images), images, epsilon)


_uniform, _normal = jax.random.uniform, jax.random.normal
# By the norm, the ball of a radius around an image: how to draw in it, project on it, ascend in it.
GEOMETRIES: dict[str, Geometry] = {
    "linf": Geometry(
        _sample(place_linf, _uniform), _project_linf, _ascend_linf, _settle, _fill_linf
    ),
    "l2": Geometry(_sample(place_l2, _normal), _project_l2, _ascend_l2, _settle, _fill_l2),
    "l1": Geometry(_sample(place_l1, _normal), _project_l1, _ascend_l1, _settle_l1),
}


def draw(distribution: Callable[..., Array], keys: Keys, images: Points) -> Points:
    """Make one draw per key, of an image's shape, so that it does not depend on the batch."""
    return jax.vmap(lambda key: distribution(key, images.shape[1:], images.dtype))(keys)


def _sign(values: Array) -> Array:
    """Compute the sign as `jnp.sign` does, but 0 for NaN."""
    return (values > 0).astype(values.dtype) - (values < 0).astype(values.dtype)


def order_statistic(sizes: Points, rank: Counts) -> PerImage:
    """Find entry `rank` i32[B] in ascending order of `sizes` f[B, ...] >= 0, without a sort."""
    sizes = sizes.reshape(sizes.shape[0], -1)

    def too_high(value: PerImage) -> Mask:
        at_most = jnp.sum(sizes <= value[:, None], axis=1, dtype=jnp.int32)
        return at_most > rank

    return smallest_float(too_high, sizes[:, 0])


def largest_pixels(sizes: Float[Array, "B H W 1"], count: Counts) -> Bool[Array, "B H W 1"]:
    """Mark the `count` i32[B] pixels of each image with the largest sizes; of equals the first."""
    order = jnp.argsort(-sizes.reshape(sizes.shape[0], -1), axis=1)
    rank = jnp.argsort(order, axis=1).astype(jnp.int32)
    return rank.reshape(sizes.shape) < per_image(count, sizes)


def smallest_float(holds: Callable[[PerImage], Mask], like: PerImage) -> PerImage:
    """Find the smallest float >= 0 per image at which the monotone `holds`, f[B] to bool[B], gets
    true.

    Floats >= 0 sort like their bits, so this bisects the bits: exact in as many steps as there
    are bits, whatever the magnitudes. `like` gives shape and dtype.
    """
    integer = jnp.dtype(f"int{8 * like.dtype.itemsize}")
    bits = 8 * like.dtype.itemsize - 1  # all but the sign

    def body(i: Array, below: Array) -> Array:
        # `below` is the largest pattern known to fail, plus one, built from the highest bit down.
        candidate = below | (jnp.ones_like(below) << (bits - 1 - i).astype(integer))
        value = jax.lax.bitcast_convert_type(candidate - 1, like.dtype)
        return jnp.where(holds(value), below, candidate)

    below = jnp.zeros_like(like, integer)  # `_like` also takes over shard_map's axes
    below = jax.lax.fori_loop(0, bits, body, below)
    return jax.lax.bitcast_convert_type(below, like.dtype)
