"""Random erasing, MixUp and CutMix on the device: pure functions of (key, batch).

A draw belongs to a row of the global batch, or to a group of consecutive rows, so the number of
devices or hosts does not change the images. No draw loops until it succeeds: across devices, such a
condition would be a collective.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Key

from jaxrobust.types import Array, Batch, Images, Labels, SoftLabels

BatchAugmentation = Callable[[Array, Batch], Batch]
Shape = Sequence[int]
Range = tuple[float, float]


class Mixing(NamedTuple):
    """How to mix the images of a batch and smooth their labels; by default neither happens."""

    num_classes: int
    mixup: float = 0.0  # mixes full images, with a weight from Beta(mixup, mixup)
    # The partner provides a box, of area 1 - Beta(cutmix, cutmix) before clipping at the border.
    cutmix: float = 0.0
    switch: float = 0.5  # probability of CutMix if both are on
    probability: float = 1.0  # of mixing at all
    group: int = 2  # an even divisor of the number of images on a device
    smoothing: float = 0.0  # of the one-hot labels, before mixing


def batch_augmentation(
    mixing: Mixing, *, erasing: float = 0.0, noise: str = "normal"
) -> BatchAugmentation:
    """Build `(key, batch) -> batch`: it erases, then mixes; disabled parts are not compiled."""

    def augment(key: Array, batch: Batch) -> Batch:
        erase_key, mix_key = jax.random.split(key)
        images, targets = batch
        if erasing:
            images = erase(erase_key, images, probability=erasing, noise=noise)
        if mixing.mixup or mixing.cutmix:
            images, targets = mix(mix_key, images, targets, mixing)
        elif mixing.smoothing:
            targets = smoothed(targets, mixing.num_classes, mixing.smoothing)
        return Batch(images, targets)

    return augment


# --- Random erasing ---

NOISES: dict[str, Callable[[Array, int], Array]] = {
    "normal": lambda key, size: jax.random.normal(key, (size,)),  # may leave [0, 1]
    "truncated": lambda key, size: 0.5 + 0.25 * jax.random.truncated_normal(key, -2, 2, (size,)),
}


def erase(
    key: Key[Array, ""],
    images: Images,
    *,
    probability: float,
    noise: str = "normal",
    area: Range = (0.02, 1 / 3),
    aspect: Range = (0.3, 1 / 0.3),
) -> Images:
    """Fill one box in some of the images f32[B,H,W,C] with noise, pixel by pixel.

    Args:
      key: image i uses `fold_in(key, i)`.
      noise: "normal", N(0, 1) whatever the image range; or "truncated", with mean 0.5 and standard
        deviation 0.25 before clipping to [0, 1].
      area: smallest and largest fraction of the image; uniform.
      aspect: smallest and largest height / width; log-uniform.
    Source: Zhong et al. 2020 (arXiv 1708.04896), as in timm: boxes that do not fit are redrawn, at
      most ten times; parity: tests/training/update/test_mixing.py against timm 1.0.9.
    """

    def one(key: Array, image: Array) -> Array:
        height, width, channels = image.shape
        box_key, noise_key = jax.random.split(key)
        erased, *box = _erased_box(box_key, image.shape, probability, area, aspect)
        # A loop over channels fills memory: fused into a mixing that reads each pixel twice, XLA on
        # CPU draws the noise twice and 5 times slower.
        keys = jax.random.split(noise_key, channels)
        values = jax.lax.map(lambda key: NOISES[noise](key, height * width), keys)
        return jnp.where(erased & _inside(image.shape, *box), values.T.reshape(image.shape), image)

    return jax.vmap(one)(_keys(key, images.shape[0]), images)


def _erased_box(
    key: Array, shape: Shape, probability: float, area: Range, aspect: Range, tries: int = 10
) -> tuple[Array, ...]:
    """Draw whether to erase, and the top, bottom, left and right of the first box that fits."""
    height, width, _ = shape
    u = jax.random.uniform(key, (1 + 4 * tries,))
    size, slant, y, x = u[1:].reshape(4, tries)
    size = (area[0] + size * (area[1] - area[0])) * (height * width)
    ratio = jnp.exp(math.log(aspect[0]) + slant * math.log(aspect[1] / aspect[0]))
    h, w = jnp.round(jnp.sqrt(size * ratio)), jnp.round(jnp.sqrt(size / ratio))
    fits = (h < height) & (w < width)
    first = jnp.argmax(fits)
    h, w, y, x = h[first], w[first], y[first], x[first]
    y, x = jnp.floor(y * (height - h + 1)), jnp.floor(x * (width - w + 1))
    return (u[0] < probability) & fits[first], y, y + h, x, x + w


# --- MixUp and CutMix ---


def mix(
    key: Key[Array, ""], images: Images, labels: Labels | SoftLabels, mixing: Mixing
) -> tuple[Images, SoftLabels]:
    """Mix images f32[B,H,W,C] with others; return them and their soft targets f32[B,C].

    Every `group` consecutive images of the batch share one choice, weight and box; the partner of
    the first image is the last one. At most one of `mixup` and `cutmix` may be 0. Group g uses
    `fold_in(key, g)`.
    Source: Zhang et al. 2018 (arXiv 1710.09412), Yun et al. 2019 (arXiv 1905.04899), as timm's
      "batch" mode within a group; parity: tests/training/update/test_mixing.py against timm 1.0.9.
    """
    batch, *shape = images.shape
    classes, group = mixing.num_classes, mixing.group
    drawn = jax.vmap(lambda key: _draw_mixing(key, shape, mixing))(_keys(key, batch // group))
    images, targets = jax.vmap(blend)(
        images.reshape(-1, group, *shape),
        smoothed(labels, classes, mixing.smoothing).reshape(-1, group, classes),
        *drawn,
    )
    return images.reshape(batch, *shape), targets.reshape(batch, classes)


def _draw_mixing(key: Array, shape: Shape, mixing: Mixing) -> tuple[Array, ...]:
    """Draw whether a box is cut, the image's weight (1: not mixed), and the center of the box."""
    height, width, _ = shape
    mixup, cutmix = mixing.mixup, mixing.cutmix
    switch = mixing.switch if mixup and cutmix else float(cutmix > 0)
    u = jax.random.uniform(key, (6,))
    boxes = u[0] < switch
    lam = symmetric_beta(jnp.where(boxes, cutmix, mixup), u[1], u[2])
    lam = jnp.where(u[3] < mixing.probability, lam, 1.0)
    return boxes, lam, jnp.floor(u[4] * height), jnp.floor(u[5] * width)


def blend(
    images: Array, targets: Array, boxes: Array, lam: Array, y: Array, x: Array
) -> tuple[Array, Array]:
    """Mix each image f32[group,H,W,C] in a group, and its targets f32[group,C], with its partner's.

    `boxes` bool[]: replace a box around the integers (y, x), or mix full images; `lam` f32[]: the
    weight of the image itself.
    """
    _, height, width, _ = images.shape
    side = jnp.sqrt(1 - lam)
    h, w = (jnp.floor(jnp.floor(length * side) / 2) for length in (height, width))
    rows = jnp.maximum(y - h, 0), jnp.minimum(y + h, height)
    columns = jnp.maximum(x - w, 0), jnp.minimum(x + w, width)
    inside = _inside(images.shape[1:], *rows, *columns)
    # Multiplying by exactly 0 and 1 copies pixels: one expression serves both.
    weight = jnp.where(boxes, 1 - inside.astype(lam.dtype), lam)[None]
    area = height * width
    outside = (area - (rows[1] - rows[0]) * (columns[1] - columns[0])) / area
    return (
        _weighted(weight, images, images[::-1]),
        _weighted(jnp.where(boxes, outside, lam), targets, targets[::-1]),
    )


def _weighted(weight: Array, a: Array, b: Array) -> Array:
    """Compute weight * a + (1 - weight) * b, rounding the products before the sum.

    Compilers choose fused multiply-adds by the shape on a device; these would round differently.
    """
    lowest = jnp.finfo(a.dtype).min  # bounds nothing, but separates product and sum
    return jnp.maximum(weight * a, lowest) + jnp.maximum((1 - weight) * b, lowest)


def smoothed(labels: Labels | SoftLabels, num_classes: int, smoothing: float) -> SoftLabels:
    """Compute one-hot labels f32[B,C] (f64 in x64 mode) and spread `smoothing` of them over all
    classes, including their own; soft labels are smoothed alike.
    """
    off, dtype = smoothing / num_classes, jnp.result_type(float)
    if labels.ndim == 2:
        return labels.astype(dtype) * jnp.asarray(1 - smoothing, dtype) + jnp.asarray(off, dtype)
    is_label = labels[:, None] == jnp.arange(num_classes, dtype=labels.dtype)[None]
    return jnp.where(is_label, jnp.asarray(1 - smoothing + off, dtype), jnp.asarray(off, dtype))


def symmetric_beta(a: Array, u: Array, v: Array) -> Array:
    """Return an exact draw from Beta(a, a), a > 0, for u and v from U[0, 1), without rejection.

    Source: Bailey 1994 (Math. Comp. 62): sqrt(nu (u^(-2/nu) - 1)) cos(2 pi v) is Student's t with
    nu degrees of freedom; its T / sqrt(nu + T^2), moved to [0, 1], is Beta(nu/2, nu/2).
    """
    t = jnp.sqrt(jnp.expm1(-jnp.log1p(-u) / a)) * jnp.cos(2 * math.pi * v)  # T / sqrt(nu)
    root = jnp.sqrt(1 + t * t)
    nearer = 0.5 / (root * (root + jnp.abs(t)))  # to the nearer end: not a difference from 1
    return jnp.where(t < 0, nearer, 1 - nearer)


# --- Both ---


def _keys(key: Array, count: int) -> Array:
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(count, dtype=jnp.uint32))


def _inside(shape: Shape, y0: Array, y1: Array, x0: Array, x1: Array) -> Array:
    y, x = jnp.arange(shape[0], dtype=jnp.float32), jnp.arange(shape[1], dtype=jnp.float32)
    rows, columns = (y >= y0) & (y < y1), (x >= x0) & (x < x1)
    return (rows[:, None] & columns[None, :])[..., None]
