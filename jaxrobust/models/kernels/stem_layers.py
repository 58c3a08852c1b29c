"""The first two convolutions of a stem, norms and GELUs: kernels on TPUs.

A ConvStem has LayerNorms, so that all is one kernel; XCiT's has batch norms.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.models.kernels import tpu
from jaxrobust.models.kernels.batch_norms import (
    ImageNorm,
    Statistics,
    batch_norm,
    batch_norm_train,
    check_group,
    image_rows,
    norm_of_sums,
    subtracted,
)
from jaxrobust.models.kernels.convolutions import conv
from jaxrobust.models.kernels.layers import gelu, layer_norm
from jaxrobust.models.kernels.primitives import as_array, asked_for, rounded, widened

Array = jax.Array
LAYERS, EACH = 2, 4  # parameters: kernel and bias of the convolution, scale and shift of the norm


def _plain(x: Array, *parameters: Array, eps: float) -> Array:
    for i in range(0, LAYERS * EACH, EACH):
        taps, bias, scale, shift = parameters[i : i + EACH]
        x = conv(x, taps, bias, stride=2, padding=1)
        x = gelu(layer_norm(x, scale, shift, eps=eps))
    return x


def _planes(x: Array) -> Array:
    return x.transpose(0, 3, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stem_kernel(eps: float, x: Array, *parameters: Array) -> Array:
    return tpu.conv_stem.forward(_planes(x), *parameters, eps=eps)[0]


def _stem_kernel_forward(eps, x, *parameters):
    perturbed = asked_for(parameters)
    x, *values = (operand.value for operand in (x, *parameters))
    out, kept = tpu.conv_stem.forward(_planes(x), *values, eps=eps)
    return out, (x, kept, values, perturbed)


def _stem_kernel_backward(eps, residuals, g):
    x, kept, values, perturbed = residuals
    g = as_array(g)
    to_planes = tpu.conv_stem.backward(_planes(x), kept, g, *values, eps=eps)
    of_parameters: tuple = (None,) * len(values)
    if perturbed is not None:
        sums = tpu.conv_stem.parameter_gradients(_planes(x), kept, g, *values, eps=eps)
        of_parameters = tuple(rounded(s, p.dtype) for s, p in zip(sums, values, strict=True))
    return to_planes.transpose(0, 2, 3, 1), *of_parameters


_stem_kernel.defvjp(_stem_kernel_forward, _stem_kernel_backward, symbolic_zeros=True)


def stem_layers(x: Array, *parameters: Array, eps: float = 1e-6) -> Array:
    """Compute two layers of a ConvStem: f[B,H,W,3] becomes f[B,H/4,W/4,D].

    Args:
      x: normalised images.
      *parameters: of each layer the kernel f[3,3,in,out] and the bias of the convolution, which
        has stride 2 and padding 1, and scale and shift of the norm; an exact GELU follows.
      eps: of the norms.
    """
    if tpu.calls.plain("a ConvStem", tpu.conv_stem.refused(x, *parameters)):
        return _plain(x, *parameters, eps=eps)
    return lax.platform_dependent(
        x,
        *parameters,
        tpu=functools.partial(_stem_kernel, eps),
        default=functools.partial(_plain, eps=eps),
    )


# ------------------------------------------------------------------------------- with batch norms


class BatchLayer(NamedTuple):
    """Parameters of a convolution without bias and of its batch norm."""

    kernel: Array
    scale: Array
    shift: Array


Layers = tuple[BatchLayer, BatchLayer]
Both = tuple[Statistics, Statistics]  # of the norms


def _plain_batch(
    x: Array, layers: Layers, statistics: Both | None, *, group: int
) -> tuple[Array, Both]:
    found = []
    for i, layer in enumerate(layers):
        x = conv(x, layer.kernel, stride=2, padding=1)
        if statistics is None:
            x, *moved = batch_norm_train(x, layer.scale, layer.shift, group=group)
        else:
            moved = [*statistics[i]]
            x = batch_norm(x, layer.scale, layer.shift, *moved)
        x = gelu(x)
        found.append((moved[0], moved[1]))
    return x, (found[0], found[1])


class _Asked(NamedTuple):
    """What does not change in a call."""

    group: int
    train: bool


def _given(layer: BatchLayer, norm: ImageNorm, *more: Array) -> Array:
    factor = widened(layer.scale[None])[0] * norm.inverse
    return image_rows(len(norm.mean), norm.mean, factor, layer.shift, *more)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _batch_kernel(asked: _Asked, x: Array, layers: Layers, statistics: Both | None):
    return _batch_forward(asked, x, layers, statistics)[0]


def _batch_forward(asked, x, layers, statistics):
    planes, (one, two) = _planes(x), layers
    given = (None, None) if statistics is None else statistics
    batch, height, width, _ = x.shape
    # Sums that statistics make needless are of nothing.
    sums = tpu.batch_stem.first(planes, one.kernel) if asked.train else image_rows(batch, one.scale)
    norm1, moved1 = norm_of_sums(sums, given[0], height * width // 4, asked.group)
    kept, sums = tpu.batch_stem.second(planes, _given(one, norm1), one.kernel, two.kernel)
    norm2, moved2 = norm_of_sums(sums, given[1], height * width // 16, asked.group)
    out = tpu.batch_stem.third(kept, _given(two, norm2), width // 4)
    return (out, (moved1, moved2)), (kept, norm1, norm2)


def _batch_forward_rule(asked, x, layers, statistics):
    perturbed = asked_for(layers)
    x, layers, statistics = jax.tree.map(lambda operand: operand.value, (x, layers, statistics))
    out, kept = _batch_forward(asked, x, layers, statistics)
    return out, (x, layers, statistics, kept, perturbed)


def _batch_backward_rule(asked, residuals, gradients):
    x, (one, two), statistics, (kept, norm1, norm2), perturbed = residuals
    g, needed, planes = gradients[0], perturbed is not None, _planes(x)
    g = as_array(g)
    kernels, pixels = (one.kernel, two.kernel), x.shape[1] * x.shape[2] // 4
    nothing = jax.tree.map(jnp.zeros_like, statistics)
    sums1 = sums2 = zeros1 = zeros2 = jnp.zeros((2, 1, 1))
    less1, less2 = ((jnp.zeros_like(norm.mean),) * 2 for norm in (norm1, norm2))
    if needed or asked.train:
        zeros1, zeros2 = _given(one, norm1, *less1), _given(two, norm2, *less2)
        sums2 = tpu.batch_stem.second_sums(kept, g, zeros2)
        if asked.train:
            less2 = subtracted(sums2[:, 0], sums2[:, 1], norm2, pixels // 4, asked.group)
        rows = zeros1, _given(two, norm2, *less2)
        sums1 = tpu.batch_stem.first_sums(planes, kept, g, rows, kernels)
        if asked.train:
            less1 = subtracted(sums1[:, 0], sums1[:, 1], norm1, pixels, asked.group)
    rows = _given(one, norm1, *less1), _given(two, norm2, *less2)
    to_x = tpu.batch_stem.backward(planes, kept, g, rows, kernels).transpose(0, 2, 3, 1)
    if not needed:
        return to_x, jax.tree.map(lambda _: None, (one, two)), nothing
    to_kernels = tpu.batch_stem.parameter_gradients(planes, kept, g, rows, kernels)
    found = (
        BatchLayer(to_kernel, (norm.inverse * sums[:, 1]).sum(0), sums[:, 0].sum(0))
        for to_kernel, norm, sums in zip(to_kernels, (norm1, norm2), (sums1, sums2), strict=True)
    )
    rounds = jax.tree.map(lambda s, p: rounded(s, p.dtype), (*found,), (one, two))
    return to_x, rounds, nothing


_batch_kernel.defvjp(_batch_forward_rule, _batch_backward_rule, symbolic_zeros=True)


def batch_stem_layers(
    x: Array, layers: Layers, statistics: Both | None, *, group: int = 0
) -> tuple[Array, Both]:
    """Compute two layers of XCiT's stem: f[B,H,W,3] becomes f[B,H/4,W/4,D]; also the statistics.

    Args:
      x: normalised images.
      layers: each a convolution with stride 2 and padding 1, a batch norm and an exact GELU.
      statistics: mean and variance of each norm; None: those of the images, as of
        `batch_norms.batch_norm_train`, which carry no gradient.
      group: images whose statistics are taken together; 0: all.
    """
    if statistics is None:
        check_group(len(x), group)
    plain: Callable[..., Any] = functools.partial(_plain_batch, group=group)
    one, two = layers
    if tpu.calls.plain("XCiT's stem", tpu.batch_stem.refused(x, *one, one.shift, two.kernel)):
        return plain(x, layers, statistics)
    asked = _Asked(group, train=statistics is None)
    on_tpu = functools.partial(_batch_kernel, asked)
    return lax.platform_dependent(x, layers, statistics, tpu=on_tpu, default=plain)
