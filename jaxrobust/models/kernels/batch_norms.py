"""Batch norm with running statistics or with the batch's, for `layers`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.models.kernels.primitives import add_each, per_platform, rounded, widened

Array = jax.Array
Statistics = tuple[Array, Array]  # mean and variance
EPS = 1e-5


def _channels(x: Array, like: Array) -> Array:
    """Reshape f[C] or f[G,C] so that it broadcasts with `like`."""
    return x.reshape(*x.shape[:-1], *(1,) * (like.ndim - x.ndim), x.shape[-1])


@per_platform
def _line_sums(x: Array) -> Array:
    return widened(x)[0].sum(2)


@per_platform
def _line_squares(x: Array, mean: Array) -> Array:
    centred = widened(x)[0] - _channels(mean, x)
    return (centred * centred).sum(2)


@per_platform
def _line_products(x: Array, mean: Array, g: Array) -> list[Array]:
    wide, g = widened(x, g)
    products = [g, g * (wide - _channels(mean, x))]
    return lax.reduce(products, [jnp.zeros((), g.dtype)] * 2, add_each, (2,))


def _scaled(x: Array, mean: Array, factor: Array, bias: Array) -> Array:
    (wide,) = widened(x)
    out = (wide - _channels(mean, x)) * _channels(factor, x) + _channels(bias, x)
    return out.astype(x.dtype)


def _lines(x: Array, groups: int) -> Array:
    # Sum lines, then their sums: added one by one, 1e5 squares are off by 1e-5.
    width = x.shape[-2] if x.ndim > 2 else 1
    return x.reshape(groups, -1, width, x.shape[-1])


@jax.custom_vjp
def _batch_norm(x: Array, scale: Array, bias: Array, mean: Array, var: Array, eps: Array) -> Array:
    scale, bias, mean, var = widened(scale, bias, mean, var)
    return _scaled(x, mean, scale * lax.rsqrt(var + eps), bias)


def _batch_norm_backward(residuals, g):
    x, scale, bias, mean, var, eps = residuals
    wide_scale, wide_mean, wide_var = widened(scale, mean, var)
    inverse = lax.rsqrt(wide_var + eps)
    factor = wide_scale * inverse
    products = _line_products(_lines(x, 1), wide_mean[None], _lines(g, 1))
    total, weighted = (product.sum((0, 1)) for product in products)
    return (
        (widened(g)[0] * _channels(factor, g)).astype(x.dtype),
        rounded(weighted * inverse, scale.dtype),
        rounded(total, bias.dtype),
        (-factor * total).astype(mean.dtype),
        (-0.5 * factor * inverse * inverse * weighted).astype(var.dtype),
        jnp.zeros_like(eps),
    )


_batch_norm.defvjp(lambda *operands: (_batch_norm(*operands), operands), _batch_norm_backward)


def batch_norm(
    x: Array, scale: Array, bias: Array, mean: Array, var: Array, *, eps: float = EPS
) -> Array:
    """Normalize `x` f[...,C] by the given statistics f[C], then scale and shift it."""
    return _batch_norm(x, scale, bias, mean, var, jnp.asarray(eps, widened(x)[0].dtype))


@jax.custom_vjp
def _batch_norm_train(x: Array, scale: Array, bias: Array, eps: Array) -> tuple[Array, ...]:
    return _batch_norm_train_forward(x, scale, bias, eps)[0]


def _batch_norm_train_forward(x, scale, bias, eps):
    count = x.shape[1] * x.shape[2]
    mean = _line_sums(x).sum(1) / count
    var = _line_squares(x, mean).sum(1) / count
    wide_scale, wide_bias = widened(scale, bias)
    inverse = lax.rsqrt(var + eps)
    y = _scaled(x, mean, wide_scale[None] * inverse, wide_bias)
    return (y, mean, var), (x, scale, bias, mean, inverse, eps)


def _batch_norm_train_backward(residuals, cotangents):
    x, scale, bias, mean, inverse, eps = residuals
    g, (wide_scale,), count = cotangents[0], widened(scale), x.shape[1] * x.shape[2]
    total, weighted = (sums.sum(1) for sums in _line_products(x, mean, g))
    slope = inverse * inverse * weighted / count
    wide, wide_g = widened(x, g)
    normal = (wide - _channels(mean, x)) * _channels(slope, x)
    dx = _channels(wide_scale[None] * inverse, x) * (wide_g - _channels(total / count, x) - normal)
    return (
        dx.astype(x.dtype),
        rounded((inverse * weighted).sum(0), scale.dtype),
        rounded(total.sum(0), bias.dtype),
        jnp.zeros_like(eps),
    )


_batch_norm_train.defvjp(_batch_norm_train_forward, _batch_norm_train_backward)


def check_group(batch: int, group: int) -> None:
    """Raise `ValueError` if a batch cannot be divided into groups of this many images."""
    if group < 0 or (group and batch % group):
        raise ValueError(f"group={group} does not divide the batch of {batch}; give a divisor or 0")


def batch_norm_train(
    x: Array, scale: Array, bias: Array, *, group: int = 0, eps: float = EPS
) -> tuple[Array, Array, Array]:
    """Normalize `x` f[B,...,C] by its own statistics; also return mean and unbiased variance f[C].

    Statistics cover all axes but the last, of the full batch or of every `group` consecutive
    images. Those returned, for running averages, are averaged over groups and carry no gradient. A
    running average with torch's momentum 0.1 is `0.9 * running + 0.1 * returned`.

    Raises:
      ValueError: `group` does not divide the batch, or leaves one value per channel.
    Parity: tests/models/kernels/test_layers.py against torch's BatchNorm2d.
    """
    batch = x.shape[0]
    check_group(batch, group)
    lines = _lines(x, batch // group if group else 1)
    count = lines.shape[1] * lines.shape[2]
    if count == 1:
        raise ValueError("one value for each channel has no variance: use a larger batch or group")
    epsilon = jnp.asarray(eps, widened(x)[0].dtype)
    y, mean, var = _batch_norm_train(lines, scale, bias, epsilon)
    return y.reshape(x.shape), mean.mean(0), var.mean(0) * (count / (count - 1))


# ------------------------------------------------------------ from kernels' sums over each image


def of_groups(x: Array, group: int) -> Array:
    """Average f32[B,D] over every `group` images; 0: over all."""
    return x.reshape(-1, group or len(x), x.shape[1]).mean(1)


def to_images(x: Array, batch: int) -> Array:
    """Repeat f32[G,D] for the images of each group."""
    return jnp.repeat(x, batch // len(x), axis=0)


class ImageNorm(NamedTuple):
    """The batch norm of each image, f32[B,D]."""

    mean: Array
    inverse: Array


def norm_of_sums(
    sums: Array, statistics: Statistics | None, pixels: int, group: int
) -> tuple[ImageNorm, Statistics]:
    """Compute the batch norm of images f[B,..,D] from f32[B,2,D], each image's mean and its sum of
    squares around that mean; also return the statistics f32[D] for running averages.

    `statistics` are used to normalize; None: compute them from the images.
    """
    batch = len(sums)
    if statistics is not None:
        mean, var = (s[None] for s in widened(*statistics))
        norm = ImageNorm(to_images(mean, batch), to_images(lax.rsqrt(var + EPS), batch))
        return norm, statistics
    of_image, squares = sums[:, 0], sums[:, 1]
    mean = of_groups(of_image, group)
    apart = of_image - to_images(mean, batch)
    var = of_groups(squares / pixels + apart * apart, group)
    count = (group or batch) * pixels
    inverse = lax.rsqrt(var + EPS)
    moved = mean.mean(0), var.mean(0) * (count / (count - 1))
    return ImageNorm(to_images(mean, batch), to_images(inverse, batch)), moved


def image_rows(batch: int, *rows: Array) -> Array:
    """Stack n rows f[D] or f32[B,D] into f32[B,n,D]."""
    rows = widened(*rows)
    return jnp.stack([jnp.broadcast_to(r, (batch, r.shape[-1])) for r in rows], 1)


def subtracted(
    total: Array, weighted: Array, norm: ImageNorm, pixels: int, group: int
) -> tuple[Array, Array]:
    """Compute what a batch norm's gradient subtracts from its result's gradient, before scaling:
    f32[B,D] of a constant and of a share of the centered input.

    `total` and `weighted` f32[B,D]: sums over images of the result's gradient, alone and times the
    centered input.
    """
    batch = len(total)
    constant, along = (to_images(of_groups(s, group) / pixels, batch) for s in (total, weighted))
    return constant, along * norm.inverse * norm.inverse
