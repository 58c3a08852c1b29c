"""XCiT's local patch interaction with its norms and residual, as kernels on TPUs."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.models.kernels import tpu
from jaxrobust.models.kernels.batch_norms import (
    EPS,
    Statistics,
    batch_norm,
    batch_norm_train,
    check_group,
    image_rows,
    norm_of_sums,
    subtracted,
)
from jaxrobust.models.kernels.depthwise import depthwise_conv
from jaxrobust.models.kernels.layers import Path, gelu, layer_norm, residual
from jaxrobust.models.kernels.primitives import takes_xla, widened, with_gradient

Array = jax.Array
EPS_LAYER = 1e-6


class Interaction(NamedTuple):
    """Parameters in the order of their use; kernels f[k,k,1,D], the others f[D]."""

    norm_scale: Array
    norm_shift: Array
    taps1: Array
    bias1: Array
    batch_scale: Array
    batch_shift: Array
    taps2: Array
    bias2: Array
    gamma: Array


def _plain(
    x: Array,
    parameters: Interaction,
    statistics: Statistics | None,
    *,
    path: Path | None,
    width: int,
    group: int,
) -> tuple[Array, Statistics]:
    p = parameters
    normed = layer_norm(x, p.norm_scale, p.norm_shift, eps=EPS_LAYER)
    y = depthwise_conv(normed.reshape(len(x), -1, width, x.shape[2]), p.taps1)
    y = gelu(y, p.bias1)
    affine = p.batch_scale, p.batch_shift
    if statistics is None:
        y, mean, var = batch_norm_train(y, *affine, group=group, eps=EPS)
        statistics = mean, var
    else:
        y = batch_norm(y, *affine, *statistics, eps=EPS)
    y = depthwise_conv(y, p.taps2).reshape(x.shape)
    return residual(x, y, p.bias2, p.gamma, path), statistics


# ---------------------------------------------------------------------------------------- on TPUs


def _scales(gamma: Array, factors: Array | None) -> Array:
    """Return the layer scale f32[B,D] per image, times the branch factors f32[B,1]."""
    (wide,) = widened(gamma[None])
    return wide if factors is None else wide * factors


class _Static(NamedTuple):
    width: int
    group: int
    train: bool


def _forward(static, inputs, p, needed):
    x, statistics, factors = inputs
    operands = x, p.norm_scale, p.norm_shift, p.taps1, p.bias1
    y, sums = tpu.token_interaction.first(*operands, width=static.width, eps=EPS_LAYER)
    norm, new = norm_of_sums(sums, None if static.train else statistics, x.shape[1], static.group)
    factor = widened(p.batch_scale[None])[0] * norm.inverse
    gamma = _scales(p.gamma, factors)
    rows = image_rows(len(x), norm.mean, factor, p.batch_shift, gamma, p.bias2)
    out = tpu.token_interaction.second(x, y, rows, p.taps2, width=static.width)
    return (out, new), (x, statistics, factors, y, norm)


def _backward(static, residuals, p, gradients, needed):
    (x, statistics, factors, y, norm), (g, _) = residuals, gradients
    batch, tokens, _ = x.shape
    gamma, (batch_scale,) = _scales(p.gamma, factors), widened(p.batch_scale[None])
    factor = batch_scale * norm.inverse
    constant = slope = jnp.zeros_like(norm.mean)
    if needed or static.train:
        means = image_rows(batch, norm.mean)
        sums, *every = tpu.token_interaction.sums(
            g, y, means, p.taps2, width=static.width, needed=needed
        )
        total, weighted = sums[:, 0] * gamma, sums[:, 1] * gamma
        if static.train:
            constant, slope = subtracted(total, weighted, norm, tokens, static.group)
    to_x, *first = tpu.token_interaction.gradient(
        *(x, g, image_rows(batch, gamma, norm.mean, factor, constant, slope), (p.taps1, p.taps2)),
        (p.norm_scale, p.norm_shift, p.bias1),
        **{"width": static.width, "eps": EPS_LAYER, "needed": needed},
    )
    to_inputs = to_x, *jax.tree.map(jnp.zeros_like, (statistics, factors))
    if not needed:
        return to_inputs, None
    entries = p.taps1.size // p.gamma.size
    *to_taps1, to_bias1, to_scale, to_shift = first[0].sum(0)
    ones, of_y = every[0][:, :entries], every[0][:, entries:]
    # The gradient of the second convolution's kernel, without the layer scale: f32[B,k*k,D].
    to_kernel = of_y * factor[:, None] + ones * widened(p.batch_shift)[0][None, None]
    (taps2,) = widened(p.taps2.reshape(entries, -1))
    branch = (to_kernel * taps2[None]).sum(1) + widened(p.bias2[None])[0] * ones[:, entries // 2]
    shares = branch if factors is None else branch * factors
    sums = Interaction(
        *(to_scale, to_shift, jnp.stack(to_taps1), to_bias1),
        *((norm.inverse * weighted).sum(0), total.sum(0)),
        *((to_kernel * gamma[:, None]).sum(0), (ones[:, entries // 2] * gamma).sum(0)),
        shares.sum(0),
    )
    return to_inputs, jax.tree.map(lambda a, b: a.reshape(b.shape), sums, p)


_interaction = with_gradient(_forward, _backward)


def local_interaction(
    x: Array,
    parameters: Interaction,
    statistics: Statistics | None,
    path: Path | None = None,
    *,
    width: int,
    group: int = 0,
) -> tuple[Array, Statistics]:
    """Add local patch interaction to tokens f[B,N,D]; also return the statistics.

    The branch is LayerNorm, depthwise convolution, GELU, batch norm, depthwise convolution and
    layer scale.

    Args:
      x: tokens of maps, row after row.
      parameters: of all these layers.
      statistics: mean and variance f[D] for the batch norm; None: those of the images, as in
        `batch_norms.batch_norm_train`, without gradients.
      path: applied to the branch.
      width: tokens in a row.
      group: images per group of statistics; 0: all.

    Raises:
      ValueError: `statistics` is None, and `group` does not divide the number of images.
    """
    if statistics is None:
        check_group(len(x), group)
    plain: Callable[..., Any] = functools.partial(_plain, path=path, width=width, group=group)
    reason = tpu.token_interaction.refused(x, parameters.taps1, width)
    if takes_xla("the local patch interaction", reason):
        return plain(x, parameters, statistics)
    factors = None if path is None else path(jnp.ones((len(x), 1), jnp.float32))

    def kernel(x, parameters, statistics):
        static = _Static(width, group, train=statistics is None)
        return _interaction(static, (x, statistics, factors), parameters)

    return lax.platform_dependent(x, parameters, statistics, tpu=kernel, default=plain)
