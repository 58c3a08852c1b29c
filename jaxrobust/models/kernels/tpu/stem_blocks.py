"""Building blocks of the ConvStem kernels: matrices, norms over rows, pixel moves."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrobust.models.kernels.primitives import error_function
from jaxrobust.models.kernels.tpu.calls import LANES, SUBLANES, dot

Array = jax.Array
HALF = LANES // 2
BLOCK = 4  # pixels of a block's side
TAPS = 5  # columns and rows of the image that a block's four pixels of the first layer read
PACKED = 16  # rows of bfloat16 that a register holds


def rows_shape(height: int, channels: int) -> tuple[int, ...]:
    """Return the shape of what rows of blocks read: two of them start within eight rows."""
    return channels, height // 16, 2, SUBLANES, TAPS * LANES


def selection_matrix(width: int, dtype: Any) -> Array:
    """Make f[2,W,5*128]: which image column goes to which lane, for both halves."""
    column, lane = jnp.arange(width)[:, None], jnp.arange(TAPS * LANES)[None]
    tap, place = lane // LANES, lane % LANES
    block = place % HALF
    there = (column == BLOCK * block + tap - 1) & (block < width // BLOCK)
    return jnp.stack([there & (place // HALF == half) for half in (0, 1)]).astype(dtype)


def first_matrix(kernel: Array, bias: Array) -> Array:
    """Make f[4*C,128]: four pixels of the first layer from 3 channels x 5 columns x 8 rows.

    Two rows of ones multiply the bias, which is split into two terms to avoid rounding.
    """
    none = (0, 0)
    kernel = jnp.stack([jnp.pad(kernel, ((2 * p, 5 - 2 * p), *[none] * 3)) for p in (0, 1)])
    wider = [((2 * q, 2 - 2 * q), none, none) for q in (0, 1)]
    kernel = jnp.stack([jnp.pad(kernel, (none, none, *pad)) for pad in wider], 1)
    # From pixel (p, q), row, column, channel, C to pixel, C, channel, column, row.
    kernel = kernel.transpose(0, 1, 5, 4, 3, 2).reshape(4 * kernel.shape[5], -1)
    high = bias.astype(kernel.dtype)
    low = (bias.astype(jnp.float32) - high.astype(jnp.float32)).astype(kernel.dtype)
    biases = [jnp.tile(part, 4)[:, None] for part in (high, low)]
    missing = LANES - kernel.shape[1] - len(biases)
    return jnp.concatenate([kernel, *biases, jnp.zeros((len(kernel), missing), kernel.dtype)], 1)


def second_matrix(kernel: Array) -> Array:
    """Make f[D,9*C]: a pixel of the second layer from nine of the first."""
    return kernel.reshape(-1, kernel.shape[3]).T


def second_gradient_matrix(kernel: Array) -> Array:
    """Make f[4*C,4*D]: gradients of a block's pixels from those of 2x2 pixels of layer two."""
    zero = jnp.zeros(kernel.shape[2:], kernel.dtype)

    def tap(i: int, j: int) -> Array:
        return kernel[i, j] if 0 <= i < 3 and 0 <= j < 3 else zero

    pixels = [(0, 0), (0, 1), (1, 0), (1, 1)]
    parts = [[tap(p + 1 - 2 * y, q + 1 - 2 * x) for y, x in pixels] for p, q in pixels]
    return jnp.concatenate([jnp.concatenate(row, 1) for row in parts])


def spread(*parameters: Array) -> Array:
    """Make f32[n,C,128] of n parameters f[C]."""
    stack = jnp.stack([p.astype(jnp.float32) for p in parameters])
    return jnp.broadcast_to(stack[..., None], (*stack.shape, LANES))


def gelu(x: Array, exact: bool) -> Array:
    """Compute the GELU in float32: exactly, or from the series above."""
    half = 0.5 * x
    return half + half * error_function(x, exact)


def gelu_slope(x: Array, exact: bool) -> Array:
    """Compute the derivative of the GELU."""
    power = jnp.exp2((-0.5 * math.log2(math.e)) * (x * x))
    return 0.5 + 0.5 * error_function(x, exact) + x * (2 * math.pi) ** -0.5 * power


def _normalised(x: Array, eps: float) -> tuple[Array, Array]:
    centred = x - x.mean(0, keepdims=True)
    inverse = lax.rsqrt((centred * centred).mean(0, keepdims=True) + eps)
    return centred * inverse, inverse


def norm_gelu(x: Array, affine: Any, eps: float, exact: bool) -> Array:
    """Compute f32[C,128]; `affine`: scale and shift."""
    return gelu(_normalised(x, eps)[0] * affine[0] + affine[1], exact)


class Gradient(NamedTuple):
    """The gradients of a norm and its GELU for f32[C,128]."""

    to_x: Array
    normed: Array  # the input of the GELU
    to_normed: Array
    normal: Array  # before scale and shift


def norm_gelu_gradient(x: Array, g: Array, affine: Any, eps: float, exact: bool) -> Gradient:
    """Differentiate `norm_gelu` at `x`, given its result's gradient `g`."""
    normal, inverse = _normalised(x, eps)
    normed = normal * affine[0] + affine[1]
    to_normed = g * gelu_slope(normed, exact)
    to_normal = to_normed * affine[0]
    along = (to_normal * normal).mean(0, keepdims=True)
    to_x = inverse * (to_normal - to_normal.mean(0, keepdims=True) - normal * along)
    return Gradient(to_x, normed, to_normed, normal)


def spread_rows(rows: Any, wide: Any) -> None:
    """Turn rows f32[1,n,C] of per-channel values into f32[n,C,128]."""
    columns = rows[0].T
    for i in range(wide.shape[0]):
        wide[i] = jnp.broadcast_to(columns[:, i : i + 1], wide.shape[1:])


def valid(columns: int) -> Array:
    """Make f32[1,128]: the lanes that hold one of these columns of blocks."""
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1) & (HALF - 1)
    return jnp.where(lane < columns, 1.0, 0.0)


def batch_gelu(x: Array, rows: Any, exact: bool) -> Array:
    """Compute the GELU of a batch norm f32[C,128]; `rows`: mean, factor and shift."""
    return gelu((x - rows[0]) * rows[1] + rows[2], exact)


def batch_gelu_gradient(x: Array, g: Array, rows: Any, columns: int, exact: bool) -> Gradient:
    """Differentiate `batch_gelu` at `x`, given its result's gradient `g`.

    `rows` also has what the batch norm's gradient subtracts from its result's gradient: a constant,
    and a share of `normal`, which here is `x` minus the mean.
    """
    centred = x - rows[0]
    normed = centred * rows[1] + rows[2]
    to_normed = g * gelu_slope(normed, exact)
    to_x = rows[1] * (to_normed - rows[3] - centred * rows[4]) * valid(columns)
    return Gradient(to_x, normed, to_normed, centred)


def split(x: Array, count: int) -> list[Array]:
    """Split rows into `count` parts of equal size."""
    size = x.shape[0] // count
    return [x[i * size : (i + 1) * size] for i in range(count)]


def lanes_of(tap: int) -> slice:
    """Return the lanes of one of a block's columns."""
    return slice(tap * LANES, (tap + 1) * LANES)


def shifted(x: Array, by: int) -> Array:
    """Move pixels of f32[C,128] by 1 to the right, or by -1, within each half."""
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1) & (HALF - 1)
    edge = 0 if by == 1 else HALF - 1
    return jnp.where(lane == edge, 0.0, pltpu.roll(x, by % LANES, 1))


def other_half(x: Array, to: int) -> Array:
    """Move the other half's pixels into half `to`, and zeros into that one."""
    lower = lax.broadcasted_iota(jnp.int32, x.shape, 1) >= HALF
    return jnp.where(lower == bool(to), pltpu.roll(x, HALF, 1), 0.0)


def columns_to_lanes(image: Any, selection: Any, rows: Any) -> None:
    """Fill `rows`: a row of blocks reads five rows, starting one above it."""
    channels, half = image.shape[1], image.shape[2] // 2
    planes = [image[0, channel] for channel in range(channels)]

    def chosen(start: int, stop: int, to: int) -> Array:
        part = jnp.concatenate([plane[start:stop] for plane in planes])
        return dot(part, selection[to], "nn")

    both = split(chosen(0, half, 0) + chosen(half, 2 * half, 1), channels)
    above = split(chosen(half - PACKED, half, 1), channels)  # the lower half's first row
    for channel, last in enumerate(above):
        plane = both[channel]
        even = jnp.concatenate([last[-1:], plane[:-1]])
        odd = jnp.concatenate([plane[3:], jnp.zeros((3, plane.shape[1]), jnp.float32)])
        for i, value in enumerate((even, odd)):
            rows[channel, :, i] = value.reshape(-1, SUBLANES, value.shape[1])


def lanes_to_columns(totals: Any, selection: Any, out: Any) -> None:
    """Sum the contributions of rows of blocks to a row of the image, and restore its columns."""
    channels, half = out.shape[1], out.shape[2] // 2
    sums = []
    for channel in range(channels):
        even, odd = (totals[channel, :, i].reshape(half, -1) for i in (0, 1))
        above = [other_half(even[:SUBLANES, lanes_of(tap)], 0)[:1] for tap in range(TAPS)]
        zero = jnp.zeros((3, even.shape[1]), jnp.float32)
        even = jnp.concatenate([even[1:], jnp.concatenate(above, 1)])
        sums.append(even + jnp.concatenate([zero, odd[:-3]]))
    summed = jnp.concatenate(sums).astype(out.dtype)
    for i in (0, 1):
        parts = split(dot(summed, selection[i], "nt").astype(out.dtype), channels)
        for channel, part in enumerate(parts):
            out[0, channel, i * half : (i + 1) * half] = part


def read_met(rows: Any, block: Any, dtype: Any) -> Array:
    """Read what a row of blocks covers, and ones, f[128,128]."""
    place = block >> 1, block & 1, slice(None)
    taps = [(channel, tap) for channel in range(rows.shape[0]) for tap in range(TAPS)]
    parts = [rows[(channel, *place, lanes_of(tap))] for channel, tap in taps]
    parts.append(jnp.ones((LANES - SUBLANES * len(parts), LANES), jnp.float32))
    return jnp.concatenate(parts).astype(dtype)


def window(even: Array, odd: Array) -> Array:
    """Join what a pixel of the second layer reads from a row of the first, f32[3*C,128]."""
    return jnp.concatenate([shifted(odd, 1), even, odd])


def each_window(
    blocks: int, met: Any, pixels: Callable[[Any], list[Array]], use: Callable[..., None]
) -> None:
    """Call `use(block, window)` with the second convolution's input at each row of blocks.

    `met` holds it; `pixels` makes the first layer's row of blocks, four pixels f32[C,128] each.
    """
    size = met.shape[0] // 3

    def put(block: Any) -> None:
        y = pixels(block)
        met[size : 2 * size], met[2 * size :] = window(*y[:2]), window(*y[2:])

    met[:size] = window(*(other_half(y, 1) for y in pixels(blocks - 1)[2:]))
    put(0)

    @pl.loop(0, blocks)
    def convolve(block: Any) -> None:
        pixels_met = met[...]
        met[:size] = pixels_met[2 * size :]
        # Computing the next row's first layer fills the time in which this one waits.
        put(jnp.minimum(block + 1, blocks - 1))
        use(block, pixels_met)
