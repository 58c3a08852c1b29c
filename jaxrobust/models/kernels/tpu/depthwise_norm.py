"""ConvNeXt's depthwise convolution, bias and LayerNorm as one kernel, and its input gradient.

A block reads its images once for both: an image's rows, padded with zeros, are in fast memory in
float32; each output row sums its taps in registers and is normalized there. The gradient of the
LayerNorm is written to such a padded image again, which the flipped taps read.

By the declared costs 88 images of 56 x 56 x 96 take 1.0 M cycles = 0.7 ms of a v5e forward and 1.1
M backward; XLA's convolution alone takes 2.65 ms. Four rows are computed together: they share their
reads, and one row's norm does not wait for another's sums. The compiler then schedules 238 and 279
cycles a row, instead of 382 and 363.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxrobust.models.kernels.primitives import largest_divisor, static_jit
from jaxrobust.models.kernels.tpu.calls import (
    LANES,
    SCOPED,
    SUBLANES,
    Kernel,
    KernelCost,
    elementwise,
    lane_groups,
    over_images,
    tiled,
    widened_to,
)

Array = jax.Array


def refused(x: Array, kernel: Array) -> str | None:
    """Say why the kernel does not support these images; None: it does."""
    _, height, width, channels = x.shape
    side = kernel.shape[0]
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{x.dtype} is neither float32 nor bfloat16"
    if side != kernel.shape[1] or side % 2 == 0:
        return f"a window of {side}x{kernel.shape[1]} is not square and odd"
    # Four arrays of the gradient, twice, because the next ones arrive in the meantime.
    blocks = 8 * tiled(x.shape[1:], x.dtype.itemsize)
    if tiled(padded_shape(side, height, width, channels), 4) + blocks > SCOPED:
        return f"an image of {height}x{width}x{channels} is larger than the fast memory of a chip"
    return None


def padded_shape(side: int, height: int, width: int, channels: int) -> tuple[int, ...]:
    """Return the shape of the padded image: groups of 128 channels, rows, columns, channels."""
    wide = widened_to(width + side - 1, SUBLANES)
    return len(lane_groups(channels)), height + side - 1, wide, LANES


def together(height: int) -> int:
    """Choose how many rows to compute at once; each adds compile time."""
    return largest_divisor(height, 4)


def clear_rim(padded: Any, height: int, width: int, rim: int) -> None:
    """Write zeros around the images."""
    for rows in (slice(rim), slice(rim + height, None)):
        padded[:, rows] = jnp.zeros_like(padded[:, rows])
    for columns in (slice(rim), slice(rim + width, None)):
        padded[:, :, columns] = jnp.zeros_like(padded[:, :, columns])


def put_row(padded: Any, row: Any, rim: int, values: Array) -> None:
    """Write a row f[W,C] into the padded image."""
    for i, group in enumerate(lane_groups(values.shape[1])):
        part = values[:, group].astype(jnp.float32)
        padded[i, row + rim, rim : rim + len(part), : part.shape[1]] = part


def sum_taps(padded: Any, kernel: Any, row: Any, width: int, rows: int) -> list[Array]:
    """Compute rows f32[W,C] of the convolution with f32[side**2,C]; rows share their reads."""
    side, parts = math.isqrt(kernel.shape[0]), []
    for i, group in enumerate(lane_groups(kernel.shape[1])):
        count = group.stop - group.start
        totals = [jnp.zeros((width, count), jnp.float32)] * rows
        for line in range(side + rows - 1):
            for column in range(side):
                pixels = padded[i, row + line, column : column + width, :count]
                for n in range(max(0, line - side + 1), min(rows, line + 1)):
                    tap = (line - n) * side + column
                    totals[n] += pixels * kernel[tap : tap + 1, group]
        parts.append(totals)
    return [jnp.concatenate(row, -1) for row in zip(*parts, strict=True)]


def _row_mean(x: Array) -> Array:
    return x.mean(-1, keepdims=True)


def normalised(
    x: Array, eps: float, mean: Callable[[Array], Array] = _row_mean
) -> tuple[Array, Array]:
    """Normalize f32[N,C]; also return the inverse of its standard deviations.

    `mean` computes means of rows in a shape that broadcasts to `x`.
    """
    centred = x - mean(x)
    inverse = jax.lax.rsqrt(mean(centred * centred) + eps)
    return centred * inverse, inverse


def norm_gradient(
    normal: Array, inverse: Array, to_normal: Array, mean: Callable[[Array], Array] = _row_mean
) -> Array:
    """Compute the gradient of `normalised` for its input from that of its first result."""
    along = mean(to_normal * normal)
    return inverse * (to_normal - mean(to_normal) - normal * along)


def _forward(x, kernel, affine, *outs_and_padded, eps: float) -> None:
    *outs, padded = outs_and_padded
    _, height, width, _ = x.shape
    rim = math.isqrt(kernel.shape[0]) // 2
    bias, scale, shift = (affine[i : i + 1] for i in range(3))
    clear_rim(padded, height, width, rim)

    @pl.loop(0, height)
    def put(row: Any) -> None:
        put_row(padded, row, rim, x[0, row])

    @pl.loop(0, height, step=(rows := together(height)))
    def sum_and_norm(row: Any) -> None:
        for n, total in enumerate(sum_taps(padded, kernel, row, width, rows)):
            z = total + bias
            normed = normalised(z, eps)[0] * scale + shift
            for out, value in zip(outs, (normed, z), strict=False):
                out[0, row + n] = value.astype(out.dtype)


def _backward(z, g, to_residual, kernel, affine, out, padded, *, eps: float) -> None:
    _, height, width, _ = z.shape
    rim = math.isqrt(kernel.shape[0]) // 2
    scale = affine[...]
    clear_rim(padded, height, width, rim)

    @pl.loop(0, height, unroll=together(height))
    def differentiate_norm(row: Any) -> None:
        normal, inverse = normalised(z[0, row].astype(jnp.float32), eps)
        to_normal = g[0, row].astype(jnp.float32) * scale
        put_row(padded, row, rim, norm_gradient(normal, inverse, to_normal))

    @pl.loop(0, height, step=(rows := together(height)))
    def sum_and_add(row: Any) -> None:
        for n, to_x in enumerate(sum_taps(padded, kernel, row, width, rows)):
            total = to_x + to_residual[0, row + n].astype(jnp.float32)
            out[0, row + n] = total.astype(out.dtype)


def _cost(x: Array, side: int, operations: int) -> KernelCost:
    _, height, width, channels = x.shape
    return elementwise(width, channels, 2 * side * side + operations) * height


@static_jit
def forward(
    x: Array, kernel: Array, bias: Array, scale: Array, shift: Array, *, eps: float
) -> list[Array]:
    """Convolve f[B,H,W,C] with f[k,k,1,C]; return the results after and before the norm."""
    side = kernel.shape[0]
    padded, body = [padded_shape(side, *x.shape[1:])], functools.partial(_forward, eps=eps)
    return over_images(
        Kernel("depthwise_norm", body, _cost(x, side, 20), padded),
        [x],
        [x.shape[1:]] * 2,
        parameters=[
            kernel.reshape(side * side, -1).astype(jnp.float32),
            jnp.stack([bias, scale, shift]).astype(jnp.float32),
        ],
    )


@static_jit
def backward(
    z: Array, g: Array, to_residual: Array, kernel: Array, scale: Array, *, eps: float
) -> Array:
    """Compute the gradient for `x` from `z`, before the norm, and `g`; add `to_residual`."""
    side = kernel.shape[0]
    padded, body = [padded_shape(side, *z.shape[1:])], functools.partial(_backward, eps=eps)
    (out,) = over_images(
        Kernel("depthwise_norm_gradient", body, _cost(z, side, 30), padded),
        [z, g, to_residual],
        [z.shape[1:]],
        parameters=[
            kernel.reshape(side * side, -1)[::-1].astype(jnp.float32),
            scale[None].astype(jnp.float32),
        ],
    )
    return out
