"""The first two convolutions of a stem, with norms and GELUs: kernels on TPUs.

A ConvStem has LayerNorms, so one kernel suffices; XCiT's stem has batch norms.
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
from jaxrobust.models.kernels.primitives import takes_xla, widened, with_gradient

Array = jax.Array
LAYERS, EACH = 2, 4  # parameters: kernel and bias of the convolution, scale and shift of the norm
EPS = 1e-6  # of the layer norms


def _plain(x: Array, *parameters: Array) -> Array:
    for i in range(0, LAYERS * EACH, EACH):
        taps, bias, scale, shift = parameters[i : i + EACH]
        x = conv(x, taps, bias, stride=2, padding=1)
        x = gelu(layer_norm(x, scale, shift, eps=EPS))
    return x


def _planes(x: Array) -> Array:
    return x.transpose(0, 3, 1, 2)


def _stem_forward(static, x, parameters, needed):
    out, stored = tpu.conv_stem.forward(_planes(x), *parameters, eps=EPS)
    return out, (x, stored)


def _stem_backward(static, residuals, parameters, g, needed):
    x, stored = residuals
    operands = _planes(x), stored, g, *parameters
    to_x = tpu.conv_stem.backward(*operands, eps=EPS).transpose(0, 2, 3, 1)
    if not needed:
        return to_x, None
    return to_x, tuple(tpu.conv_stem.parameter_gradients(*operands, eps=EPS))


_stem_kernel = with_gradient(_stem_forward, _stem_backward)


def stem_layers(x: Array, *parameters: Array) -> Array:
    """Compute two layers of a ConvStem: f[B,H,W,3] becomes f[B,H/4,W/4,D].

    Args:
      x: normalized images.
      *parameters: per layer, the kernel f[3,3,in,out] and bias of the convolution, with stride 2
        and padding 1, and the norm's scale and shift; an exact GELU follows.
    """
    if takes_xla("a ConvStem", tpu.conv_stem.refused(x, *parameters)):
        return _plain(x, *parameters)

    def kernel(x, *parameters):
        return _stem_kernel((), x, parameters)

    return lax.platform_dependent(x, *parameters, tpu=kernel, default=_plain)


# ------------------------------------------------------------------------------- with batch norms


class BatchLayer(NamedTuple):
    """Parameters of a convolution without bias and its batch norm."""

    kernel: Array
    scale: Array
    shift: Array


Layers = tuple[BatchLayer, BatchLayer]
Both = tuple[Statistics, Statistics]  # of the norms


def _plain_batch(
    x: Array, layers: Layers, statistics: Both | None, *, group: int
) -> tuple[Array, Both]:
    new = []
    for i, layer in enumerate(layers):
        x = conv(x, layer.kernel, stride=2, padding=1)
        if statistics is None:
            x, mean, var = batch_norm_train(x, layer.scale, layer.shift, group=group)
        else:
            mean, var = statistics[i]
            x = batch_norm(x, layer.scale, layer.shift, mean, var)
        x = gelu(x)
        new.append((mean, var))
    return x, (new[0], new[1])


def _norm_rows(layer: BatchLayer, norm: ImageNorm, *more: Array) -> Array:
    factor = widened(layer.scale[None])[0] * norm.inverse
    return image_rows(len(norm.mean), norm.mean, factor, layer.shift, *more)


def _batch_forward(static, inputs, layers, needed):
    (group, train), (x, statistics), (one, two) = static, inputs, layers
    planes, running = _planes(x), statistics or (None, None)
    batch, height, width, _ = x.shape
    # With running statistics, the sums are not read.
    sums = tpu.batch_stem.first(planes, one.kernel) if train else image_rows(batch, one.scale)
    norm1, new1 = norm_of_sums(sums, running[0], height * width // 4, group)
    stored, sums = tpu.batch_stem.second(planes, _norm_rows(one, norm1), one.kernel, two.kernel)
    norm2, new2 = norm_of_sums(sums, running[1], height * width // 16, group)
    out = tpu.batch_stem.third(stored, _norm_rows(two, norm2), columns=width // 4)
    return (out, (new1, new2)), (x, statistics, stored, norm1, norm2)


def _batch_backward(static, residuals, layers, gradients, needed):
    (group, train), (one, two), (g, _) = static, layers, gradients
    x, statistics, stored, norm1, norm2 = residuals
    planes, kernels = _planes(x), (one.kernel, two.kernel)
    pixels = x.shape[1] * x.shape[2] // 4
    to_statistics = jax.tree.map(jnp.zeros_like, statistics)
    sums1 = sums2 = jnp.zeros((2, 1, 1))
    less1, less2 = ((jnp.zeros_like(norm.mean),) * 2 for norm in (norm1, norm2))
    if needed or train:
        zeros1, zeros2 = _norm_rows(one, norm1, *less1), _norm_rows(two, norm2, *less2)
        sums2 = tpu.batch_stem.second_sums(stored, g, zeros2)
        if train:
            less2 = subtracted(sums2[:, 0], sums2[:, 1], norm2, pixels // 4, group)
        rows = zeros1, _norm_rows(two, norm2, *less2)
        sums1 = tpu.batch_stem.first_sums(planes, stored, g, rows, kernels)
        if train:
            less1 = subtracted(sums1[:, 0], sums1[:, 1], norm1, pixels, group)
    rows = _norm_rows(one, norm1, *less1), _norm_rows(two, norm2, *less2)
    to_x = tpu.batch_stem.backward(planes, stored, g, rows, kernels).transpose(0, 2, 3, 1)
    if not needed:
        return (to_x, to_statistics), None
    to_kernels = tpu.batch_stem.parameter_gradients(planes, stored, g, rows, kernels)
    to_layers = (
        BatchLayer(to_kernel, (norm.inverse * sums[:, 1]).sum(0), sums[:, 0].sum(0))
        for to_kernel, norm, sums in zip(to_kernels, (norm1, norm2), (sums1, sums2), strict=True)
    )
    return (to_x, to_statistics), (*to_layers,)


_batch_kernel = with_gradient(_batch_forward, _batch_backward)


def batch_stem_layers(
    x: Array, layers: Layers, statistics: Both | None, *, group: int = 0
) -> tuple[Array, Both]:
    """Compute two layers of XCiT's stem: f[B,H,W,3] becomes f[B,H/4,W/4,D]; also the statistics.

    Args:
      x: normalized images.
      layers: each a convolution with stride 2 and padding 1, a batch norm and an exact GELU.
      statistics: mean and variance for each norm; None: those of the images, as in
        `batch_norms.batch_norm_train`, without gradients.
      group: images per group of statistics; 0: all.
    """
    if statistics is None:
        check_group(len(x), group)
    plain: Callable[..., Any] = functools.partial(_plain_batch, group=group)
    one, two = layers
    if takes_xla("XCiT's stem", tpu.batch_stem.refused(x, *one, one.shift, two.kernel)):
        return plain(x, layers, statistics)

    def kernel(x, layers, statistics):
        return _batch_kernel((group, statistics is None), (x, statistics), layers)

    return lax.platform_dependent(x, layers, statistics, tpu=kernel, default=plain)
