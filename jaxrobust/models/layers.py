"""Layers as functions, each with the implementation that is fast on the platform it runs on.

On CPU an operation is fast when XLA compiles it alone and slow when XLA fuses it into its
neighbours: the sum of 49 shifted products takes 2.5 ms for 8x56x56x96, and 15 ms once the
normalisation behind it has pulled copies of that sum into its own loops. So every operation here
has a gradient of its own, keeps only its operands, and is compiled on CPU behind a *wall*: a call
that XLA does not inline. ConvNeXt-T at 224 pixels, batch 8, two cores, before and after: forward
pass 465 and 235 ms, input gradient 965 and 480 ms, adversarial training step with two attack steps
3.6 and 2.0 s (PyTorch 3.4 s), its buffers 2376 and 995 MB.
Elsewhere the same formulas are left to XLA's fusion.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.models.primitives import (
    add_bias,
    add_each,
    column_sum,
    matmul,
    per_platform,
    rounded,
    rows,
    widened,
)

Array = jax.Array


# -------------------------------------------------------------------------------------- layer norm


def _normalise(x: Array, eps: Array) -> tuple[Array, Array]:
    (wide,) = widened(x)
    centred = wide - wide.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    inverse = lax.rsqrt(variance + eps)
    return centred * inverse, inverse


@per_platform
def _norm_forward(x: Array, scale: Array, bias: Array, eps: Array) -> Array:
    scale, bias = widened(scale[None], bias[None])
    return (_normalise(x, eps)[0] * scale + bias).astype(x.dtype)


@per_platform
def _norm_input_gradient(x: Array, scale: Array, eps: Array, g: Array) -> Array:
    normal, inverse = _normalise(x, eps)
    g, scale = widened(g, scale[None])
    g = g * scale
    g = g - g.mean(-1, keepdims=True) - normal * (normal * g).mean(-1, keepdims=True)
    return (inverse * g).astype(x.dtype)


@per_platform
def _norm_scale_gradient(x: Array, eps: Array, g: Array) -> Array:
    return (_normalise(x, eps)[0] * widened(g)[0]).sum(0)


@jax.custom_vjp
def _norm(x: Array, scale: Array, bias: Array, eps: Array) -> Array:
    return _norm_forward(x, scale, bias, eps)


def _norm_backward(residuals, g):
    # Statistics are computed again: 0.2 ms for 25088x96, less than reading stored ones back in.
    x, scale, bias, eps = residuals
    return (
        _norm_input_gradient(x, scale, eps, g),
        rounded(_norm_scale_gradient(x, eps, g), scale.dtype),
        rounded(column_sum(g), bias.dtype),
        jnp.zeros_like(eps),
    )


_norm.defvjp(lambda *operands: (_norm_forward(*operands), operands), _norm_backward)


def layer_norm(x: Array, scale: Array, bias: Array, eps: float = 1e-6) -> Array:
    """`x` normalised over its last axis (biased variance), then scaled and shifted."""
    epsilon = jnp.asarray(eps, widened(x)[0].dtype)
    return _norm(rows(x), scale, bias, epsilon).reshape(x.shape)


# ------------------------------------------------------------------------------ GELU and residual


def _normal_cdf(x: Array) -> Array:
    # 2 ms for 25088x384; through `erfc`, as `jax.nn.gelu` has it, 4.7 ms.
    return 0.5 + 0.5 * lax.erf(x * 0.5**0.5)


@per_platform
def _gelu_forward(x: Array, bias: Array) -> Array:
    wide, bias = widened(x, bias[None])
    wide = wide + bias
    return (wide * _normal_cdf(wide)).astype(x.dtype)


@per_platform
def _gelu_input_gradient(x: Array, bias: Array, g: Array) -> Array:
    wide, bias, g = widened(x, bias[None], g)
    wide = wide + bias
    density = 0.3989422804014327 * jnp.exp(-0.5 * wide * wide)
    return (g * (_normal_cdf(wide) + wide * density)).astype(x.dtype)


@jax.custom_vjp
def _gelu(x: Array, bias: Array) -> Array:
    return _gelu_forward(x, bias)


def _gelu_backward(residuals, g):
    x, bias = residuals
    dx = _gelu_input_gradient(x, bias, g)
    return dx, rounded(column_sum(dx), bias.dtype)


_gelu.defvjp(lambda *operands: (_gelu_forward(*operands), operands), _gelu_backward)


def gelu(x: Array, bias: Array | None = None) -> Array:
    """Exact (erf) GELU of `x + bias`; taking the bias along saves a pass over `x`."""
    bias = jnp.zeros(x.shape[-1:], x.dtype) if bias is None else bias
    return _gelu(rows(x), bias).reshape(x.shape)


def relu(x: Array) -> Array:
    """Return the larger of `x` and 0; NaN stays NaN, and the gradient at 0 is 0.

    Not `jax.nn.relu`: where its `maximum` meets a sum, as in pooling, XLA's CPU back end (jaxlib
    0.10.2) makes 0 of NaN, and a network that is broken inside has logits that look whole.
    """
    return jnp.where(x <= 0, jnp.zeros_like(x), x)


@per_platform
def _residual_forward(x: Array, y: Array, bias: Array, gamma: Array) -> Array:
    return x + (y + bias[None]) * gamma[None]


@per_platform
def _residual_branch_gradient(gamma: Array, g: Array) -> Array:
    return g * gamma[None]


@per_platform
def _product_sum(y: Array, g: Array) -> Array:
    y, g = widened(y, g)
    return (y * g).sum(0)


@jax.custom_vjp
def _residual(x: Array, y: Array, bias: Array, gamma: Array) -> Array:
    return _residual_forward(x, y, bias, gamma)


def _residual_backward(residuals, g):
    y, bias, gamma = residuals
    total = column_sum(g)
    wide_bias, wide_gamma = widened(bias, gamma)
    return (
        g,
        _residual_branch_gradient(gamma, g),
        rounded(total * wide_gamma, bias.dtype),
        rounded(_product_sum(y, g) + wide_bias * total, gamma.dtype),
    )


_residual.defvjp(lambda x, *branch: (_residual_forward(x, *branch), branch), _residual_backward)


def scaled_residual(x: Array, y: Array, bias: Array, gamma: Array) -> Array:
    """`x + (y + bias) * gamma` with `bias` and `gamma` f[C]: the end of a ConvNeXt block."""
    return _residual(rows(x), rows(y), bias, gamma).reshape(x.shape)


@jax.custom_vjp
def _scale(x: Array, gamma: Array) -> Array:
    return x * gamma[None]


def _scale_backward(residuals, g):
    x, gamma = residuals
    return _residual_branch_gradient(gamma, g), rounded(_product_sum(x, g), gamma.dtype)


_scale.defvjp(lambda x, gamma: (_scale(x, gamma), (x, gamma)), _scale_backward)


def scale(x: Array, gamma: Array) -> Array:
    """`x * gamma` with `gamma` f[C]."""
    return _scale(rows(x), gamma).reshape(x.shape)


# ----------------------------------------------------------------------------------------- linear


def linear(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """`x @ kernel + bias` over the last axis; `kernel` is f[in,out]."""
    out = matmul(rows(x), kernel).reshape(*x.shape[:-1], kernel.shape[1])
    return add_bias(out, bias)


# -------------------------------------------------------------------------------------- batch norm


def _channels(x: Array, like: Array) -> Array:
    """f[C] or f[G,C] in a shape that broadcasts with `like`."""
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
    # Sums of lines, then of their sums: added up one by one, 1e5 squares are off by 1e-5.
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
    x: Array, scale: Array, bias: Array, mean: Array, var: Array, *, eps: float = 1e-5
) -> Array:
    """`x` f[...,C] normalised by the given statistics f[C], then scaled and shifted."""
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


def batch_norm_train(
    x: Array, scale: Array, bias: Array, *, group: int = 0, eps: float = 1e-5
) -> tuple[Array, Array, Array]:
    """`x` f[B,...,C] normalised by its own statistics, and these: mean and unbiased variance f[C].

    Statistics are over all axes but the last, of the whole batch or of every `group` consecutive
    images; those returned, for running averages, are averages over groups and carry no gradient.
    A running average with torch's momentum 0.1 is `0.9 * running + 0.1 * returned`.

    Raises:
      ValueError: `group` does not divide the batch, or leaves one value for each channel.
    Parity: tests/test_layers.py against torch's BatchNorm2d.
    """
    batch = x.shape[0]
    if group < 0 or (group and batch % group):
        raise ValueError(f"group={group} does not divide the batch of {batch}; give a divisor or 0")
    lines = _lines(x, batch // group if group else 1)
    count = lines.shape[1] * lines.shape[2]
    if count == 1:
        raise ValueError("one value for each channel has no variance: use a larger batch or group")
    epsilon = jnp.asarray(eps, widened(x)[0].dtype)
    y, mean, var = _batch_norm_train(lines, scale, bias, epsilon)
    return y.reshape(x.shape), mean.mean(0), var.mean(0) * (count / (count - 1))


# ------------------------------------------------------------------------- pooling and drop path


def _pool_lines(x: Array, axis: int) -> list[Array]:
    """First, second and third entry of the windows along `axis`."""
    stop = (x.shape[axis] - 3) // 2 * 2 + 1
    return [lax.slice_in_dim(x, i, i + stop, 2, axis) for i in range(3)]


def _pool_axis(x: Array, axis: int) -> Array:
    return functools.reduce(jnp.maximum, _pool_lines(x, axis))


def _pool_axis_gradient(x: Array, g: Array, axis: int) -> Array:
    first, second, third = _pool_lines(x, axis)
    in_first = (first >= second) & (first >= third)
    in_second = ~in_first & (second >= third)
    zero = jnp.zeros((), g.dtype)

    def padded(g, low, high):
        return lax.pad(g, zero, [(low, high, 0) if i == axis else (0, 0, 0) for i in range(4)])

    even = padded(jnp.where(in_first, g, zero), 0, 1)
    even = even + padded(jnp.where(in_first | in_second, zero, g), 1, 0)
    odd = padded(jnp.where(in_second, g, zero), 0, 1)
    both = jnp.stack([even, odd], axis + 1)
    both = both.reshape(*g.shape[:axis], -1, *g.shape[axis + 1 :])
    rest = x.shape[axis] - both.shape[axis]
    return padded(both, 0, rest)


def _pool_padded(x: Array) -> Array:
    pad = [(0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)]
    return lax.pad(x, jnp.array(-jnp.inf, x.dtype), pad)


@per_platform
def _pool_rows(x: Array) -> Array:
    return _pool_axis(_pool_padded(x), 2)


@per_platform
def _pool_columns(x: Array) -> Array:
    return _pool_axis(x, 1)


@per_platform
def _pool_columns_gradient(x: Array, g: Array) -> Array:
    return _pool_axis_gradient(x, g, 1)


@per_platform
def _pool_rows_gradient(x: Array, g: Array) -> Array:
    return _pool_axis_gradient(_pool_padded(x), g, 2)[:, 1:-1, 1:-1]


def _pool_backward(x, g):
    # The first maximum in row-major order is in the first row that has it, first there.
    return (_pool_rows_gradient(x, _pool_columns_gradient(_pool_rows(x), g)),)


@jax.custom_vjp
def max_pool(x: Array) -> Array:
    """Largest value of every 3x3 window of f[B,H,W,C], stride 2, padding 1.

    Among equal values the gradient goes to the first in row-major order, as in torch.
    """
    return _pool_columns(_pool_rows(x))


max_pool.defvjp(lambda x: (max_pool(x), x), _pool_backward)


def drop_path(y: Array, key: Array | None, rate: Array | float) -> Array:
    """`y` f[B,...] with each image zero at probability `rate`, else divided by `1 - rate`.

    `y` itself if `key` is None or `rate` is 0. `key`: one for the batch, or one for each image.
    """
    if key is None or (isinstance(rate, float) and rate == 0):  # a traced rate draws anyway
        return y
    if key.ndim:
        keep = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - rate))(key)
    else:
        keep = jax.random.bernoulli(key, 1 - rate, y.shape[:1])
    keep = keep.reshape(-1, *(1,) * (y.ndim - 1))
    return jnp.where(keep, y / (1 - rate), jnp.zeros((), y.dtype))
