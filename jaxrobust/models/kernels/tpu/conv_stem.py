"""The first two convolutions of a ConvStem as one kernel, with their norms and GELUs.

draft
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.models.kernels.tpu.calls import (
    LANES,
    SUBLANES,
    Cost,
    Kernel,
    dot,
    elementwise,
    over_images,
    product,
)

Array = jax.Array
_HALF = LANES // 2
_TAPS = 5  # columns of an image, and rows, that a 4x4 block's four pixels of the first layer meet
_BLOCK = 4
import os
UNROLL=int(os.environ.get('UNROLL','1'))


def refused(x: Array, *parameters: Array) -> str | None:
    """Say why the kernel does not take such images and layers; None: it does."""
    _, height, width, channels = x.shape
    kernels = parameters[0], parameters[4]
    if x.dtype != jnp.bfloat16:
        return f"{x.dtype} is not bfloat16"
    if any(kernel.shape[:2] != (3, 3) for kernel in kernels) or channels != 3:
        return "its first two convolutions are not 3x3, of 3 channels"
    if height % 32 or width % _BLOCK or width > _BLOCK * _HALF:
        return f"images of {height}x{width} have no 32 n rows and 4 n columns, at most 256"
    if any(kernel.shape[3] % 16 for kernel in kernels):
        return "its channels are no multiples of 16"
    return None


_SERIES = (1.18125479e-06, -3.20649087e-05, -1.13682734e-04, 3.64382789e-02, 7.97852337e-01)


def _tanh_of_cdf(x: Array, exact: bool) -> Array:
    """Compute erf(x / sqrt(2)), unless `exact` within 8e-6 as a hyperbolic tangent."""
    if exact:
        return lax.erf(x * 0.5**0.5)
    square, total = x * x, _SERIES[0]
    for coefficient in _SERIES[1:]:
        total = total * square + coefficient
    return jnp.tanh(x * total)


def _gelu(x: Array, exact: bool) -> Array:
    half = 0.5 * x
    return half + half * _tanh_of_cdf(x, exact)


def _gelu_slope(x: Array, exact: bool) -> Array:
    density = jnp.exp2((-0.5 * math.log2(math.e)) * (x * x))
    return 0.5 + 0.5 * _tanh_of_cdf(x, exact) + (x * (2 * math.pi) ** -0.5) * density


# ------------------------------------------------------------------------- what XLA makes beforehand


def _selection(width: int, dtype: Any) -> Array:
    """Make f[2,W,5*128]: which column of an image goes to which lane, for both halves."""
    column, lane = jnp.arange(width)[:, None], jnp.arange(_TAPS * LANES)[None]
    tap, place = lane // LANES, lane % LANES
    block = place % _HALF
    there = (column == _BLOCK * block + tap - 1) & (block < width // _BLOCK)
    return jnp.stack([there & (place // _HALF == half) for half in (0, 1)]).astype(dtype)


def _first(kernel: Array, bias: Array) -> Array:
    """Make the first layer's matrix f[4*C,128]: four pixels from 3 channels x 5 columns x 8 rows.

    A row of ones meets the bias, in two parts because it is not rounded.
    """
    kernel = jnp.stack([jnp.pad(kernel, ((2 * p, 5 - 2 * p), *[(0, 0)] * 3)) for p in (0, 1)])
    pad = [(0, 0)] * 2
    kernel = jnp.stack([jnp.pad(kernel, (*pad, (2 * q, 2 - 2 * q), *pad)) for q in (0, 1)], 1)
    # [p, q, row, column, channel, C] to [p, q, C, channel, column, row]
    kernel = kernel.transpose(0, 1, 5, 4, 3, 2).reshape(4 * kernel.shape[5], -1)
    high = bias.astype(kernel.dtype)
    low = (bias.astype(jnp.float32) - high.astype(jnp.float32)).astype(kernel.dtype)
    biases = [jnp.tile(part, 4)[:, None] for part in (high, low)]
    rest = LANES - kernel.shape[1] - 2
    return jnp.concatenate([kernel, *biases, jnp.zeros((len(kernel), rest), kernel.dtype)], 1)


def _second(kernel: Array) -> Array:
    """Make the second layer's matrix f[D,9*C]."""
    return kernel.reshape(-1, kernel.shape[3]).T


def _second_gradient(kernel: Array) -> Array:
    """Make f[4*C,4*D]: four pixels of the first layer from 2x2 gradients behind the second."""
    zero = jnp.zeros(kernel.shape[2:], kernel.dtype)

    def tap(i: int, j: int) -> Array:
        return kernel[i, j] if 0 <= i < 3 and 0 <= j < 3 else zero

    pairs = [(0, 0), (0, 1), (1, 0), (1, 1)]
    rows = [[tap(p + 1 - 2 * y, q + 1 - 2 * x) for y, x in pairs] for p, q in pairs]
    return jnp.concatenate([jnp.concatenate(row, 1) for row in rows])


def _spread(*parameters: Array, times: int) -> Array:
    """Make f32[n,times*C,128] of n parameters f[C]."""
    stack = jnp.stack([jnp.tile(p.astype(jnp.float32), times) for p in parameters])
    return jnp.broadcast_to(stack[..., None], (*stack.shape, LANES))


# ----------------------------------------------------------------------- formulas in fast memory


def _groups(x: Array, count: int) -> list[Array]:
    size = x.shape[0] // count
    return [x[i * size : (i + 1) * size] for i in range(count)]


def _normalised(x: Array, eps: float) -> tuple[Array, Array]:
    """Normalise f32[C,128] over channels."""
    centred = x - x.mean(0, keepdims=True)
    inverse = lax.rsqrt((centred * centred).mean(0, keepdims=True) + eps)
    return centred * inverse, inverse


def _norm_gelu(x: Array, affine: Any, pixels: int, eps: float, exact: bool) -> Array:
    """Compute f32[pixels*C,128]; `affine` f32[2,C,128]."""
    scale, shift = affine[0], affine[1]
    found = []
    for group in _groups(x, pixels):
        normed = _normalised(group, eps)[0] * scale + shift
        found.append(_gelu(normed, exact))
    return jnp.concatenate(found)


def _norm_gelu_gradient(x: Array, g: Array, affine: Any, pixels: int, eps: float, exact: bool) -> Array:
    scale, shift = affine[0], affine[1]
    found = []
    for group, to_out in zip(_groups(x, pixels), _groups(g, pixels), strict=True):
        normal, inverse = _normalised(group, eps)
        normed = normal * scale + shift
        to_normal = to_out * _gelu_slope(normed, exact) * scale
        along = (to_normal * normal).mean(0, keepdims=True)
        to_x = inverse * (to_normal - to_normal.mean(0, keepdims=True) - normal * along)
        found.append(to_x)
    return jnp.concatenate(found)


def _shifted(x: Array, by: int) -> Array:
    """Move columns of f32[C,128] by one to the right or left, within each half."""
    from jax.experimental.pallas import tpu as pltpu

    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1) & (_HALF - 1)
    edge = 0 if by == 1 else _HALF - 1
    return jnp.where(lane == edge, 0.0, pltpu.roll(x, by % LANES, 1))


def _other_half(x: Array, to: int) -> Array:
    """Move the other half's lanes into half `to`, and zeros into the rest."""
    from jax.experimental.pallas import tpu as pltpu

    upper = lax.broadcasted_iota(jnp.int32, x.shape, 1) >= _HALF
    return jnp.where(upper == bool(to), pltpu.roll(x, _HALF, 1), 0.0)


def _taps_to_lanes(image: Any, selection: Any, rows: Any) -> None:
    """Put the eight rows that a row of blocks meets into f32[3,H/16,2,8,5*128], for each tap."""
    channels, half = image.shape[1], image.shape[2] // 2
    upper = [image[0, channel, :half] for channel in range(channels)]
    lower = [image[0, channel, half:] for channel in range(channels)]
    last = [image[0, channel, half - 16 : half] for channel in range(channels)]
    of_upper = dot(jnp.concatenate(upper), selection[0], "nn")
    of_lower = dot(jnp.concatenate(lower + last), selection[1], "nn")
    for channel in range(channels):
        own = slice(channel * half, (channel + 1) * half)
        chosen, end = of_upper[own] + of_lower[own], channels * half + 16 * (channel + 1)
        even = jnp.concatenate([of_lower[end - 1 : end], chosen[:-1]])
        odd = jnp.concatenate([chosen[3:], jnp.zeros((3, chosen.shape[1]), jnp.float32)])
        for i, value in enumerate((even, odd)):
            rows[channel, :, i] = value.reshape(-1, SUBLANES, value.shape[1])


def _lanes_to_rows(totals: Any, channel: int) -> Array:
    """Add what rows of blocks give to the same row of a channel: f32[H/2,5*128], both halves."""
    even, odd = (totals[channel, :, i].reshape(-1, totals.shape[4]) for i in (0, 1))
    lanes = [slice(tap * LANES, (tap + 1) * LANES) for tap in range(_TAPS)]
    last = jnp.concatenate([_other_half(even[:SUBLANES, s], 0)[:1] for s in lanes], 1)
    zero = jnp.zeros((3, even.shape[1]), jnp.float32)
    return jnp.concatenate([even[1:], last]) + jnp.concatenate([zero, odd[:-3]])


def _met(rows: Any, block: Any, dtype: Any) -> Array:
    """Read what a row of blocks meets, f[128,128], with rows of ones at the end."""
    parts = [
        rows[channel, block >> 1, block & 1, :, tap * LANES : (tap + 1) * LANES]
        for channel in range(rows.shape[0])
        for tap in range(_TAPS)
    ]
    parts.append(jnp.ones((LANES - SUBLANES * len(parts), LANES), jnp.float32))
    return jnp.concatenate(parts).astype(dtype)


def _forward(
    image, selection, first, second, affine1, affine2, identity, out, kept, rows, met, *, eps
) -> None:
    from jax.experimental import pallas as pl

    dtype = image.dtype
    exact = dtype == jnp.float32
    blocks, columns = kept.shape[1], out.shape[2]
    _taps_to_lanes(image, selection, rows)

    def pixels(block: Any) -> list[Array]:
        z = dot(first[...], _met(rows, block, dtype), "nn")
        return _groups(_norm_gelu(z, affine1, 4, eps, exact), 4)

    def window(left: Array, right: Array) -> Array:
        return jnp.concatenate([_shifted(right, 1), left, right])

    size = met.shape[0] // 3

    def put(block: Any) -> None:
        y = pixels(block)
        met[size : 2 * size], met[2 * size :] = window(y[0], y[1]), window(y[2], y[3])

    _, _, left, right = pixels(blocks - 1)
    met[:size] = window(_other_half(left, 1), _other_half(right, 1))
    put(0)

    # The next row of blocks is under way meanwhile: no operation waits for the one before it.
    @pl.loop(0, blocks, unroll=UNROLL)
    def convolve(block: Any) -> None:
        seen = met[...]
        z = (dot(second[...], seen.astype(dtype), "nn") + affine2[2]).astype(dtype)
        met[:size] = seen[2 * size :]
        put(jnp.minimum(block + 1, blocks - 1))
        kept[0, block] = z
        value = _norm_gelu(z.astype(jnp.float32), affine2, 1, eps, exact).astype(dtype)
        value = dot(identity[...], value, "nt").astype(dtype)
        out[0, block] = value[:columns]
        out[0, block + blocks] = value[_HALF : _HALF + columns]


def _backward(
    image, kept, g, selection, first, second, affine1, affine2, identity,
    out, rows, totals, met, met_g, *, eps
) -> None:  # fmt: skip
    from jax.experimental import pallas as pl

    dtype = image.dtype
    exact = dtype == jnp.float32
    blocks, columns = kept.shape[1], g.shape[2]
    half = image.shape[2] // 2
    _taps_to_lanes(image, selection, rows)
    met_g[...] = jnp.zeros_like(met_g)

    def behind(block: Any) -> Array:
        """Gradients of the second convolution's result, and those a column to the right."""
        met_g[:columns] = g[0, block].astype(jnp.float32)
        met_g[_HALF : _HALF + columns] = g[0, block + blocks].astype(jnp.float32)
        to_out = dot(identity[...], met_g[...].astype(dtype), "nt")
        z = kept[0, block].astype(jnp.float32)
        return _norm_gelu_gradient(z, to_out, affine2, 1, eps, exact)

    def window(to_z: Array) -> Array:
        return jnp.concatenate([to_z, _shifted(to_z, -1)])

    size = met.shape[0] // 2
    met[:size] = window(behind(blocks - 1))
    met[size:] = window(_other_half(behind(0), 0))

    @pl.loop(0, blocks, unroll=UNROLL)
    def convolve(i: Any) -> None:
        block = blocks - 1 - i
        seen = met[...]
        to_y = dot(second[...], seen.astype(dtype), "nn")
        met[size:] = seen[:size]
        met[:size] = window(behind(jnp.maximum(block - 1, 0)))
        z = dot(first[...], _met(rows, block, dtype), "nn")
        to_z = _norm_gelu_gradient(z, to_y, affine1, 4, eps, exact).astype(dtype)
        parts = dot(first[...], to_z, "tn")
        for n in range(totals.shape[0] * _TAPS):
            channel, tap = divmod(n, _TAPS)
            lanes = slice(tap * LANES, (tap + 1) * LANES)
            part = parts[n * SUBLANES : (n + 1) * SUBLANES]
            totals[channel, block >> 1, block & 1, :, lanes] = part

    value = [_lanes_to_rows(totals, channel) for channel in range(totals.shape[0])]
    whole = jnp.concatenate(value).astype(dtype)
    for i in (0, 1):
        found = dot(whole, selection[i], "nt").astype(out.dtype)
        for channel in range(totals.shape[0]):
            part = found[channel * half : (channel + 1) * half]
            out[0, channel, i * half : (i + 1) * half] = part


def _rows_shape(height: int, channels: int) -> tuple[int, ...]:
    return channels, height // 16, 2, SUBLANES, _TAPS * LANES


def forward(
    x: Array, *parameters: Array, eps: float, interpret: bool = False
) -> list[Array]:
    """Compute both layers of planes f[B,3,H,W] as f[B,H/4,W/4,D]; also return what the second
    convolution makes, as the kernel has it.
    """
    kernel1, bias1, scale1, shift1, kernel2, bias2, scale2, shift2 = parameters
    _, channels, height, width = x.shape
    c, d = kernel2.shape[2:]
    body = functools.partial(_forward, eps=eps)
    scratch = [_rows_shape(height, channels), (9 * c, LANES)]
    return over_images(
        Kernel("conv_stem", body, Cost(), scratch, beside=8 * 2**20),
        [x],
        [(height // 4, width // 4, d), (height // 8, d, LANES)],
        parameters=[
            _selection(width, x.dtype),
            _first(kernel1, bias1),
            _second(kernel2),
            _spread(scale1, shift1, times=1),
            _spread(scale2, shift2, bias2, times=1),
            jnp.eye(LANES, dtype=x.dtype),
        ],
        interpret=interpret,
    )


def backward(
    x: Array, kept: Array, g: Array, *parameters: Array, eps: float, interpret: bool = False
) -> Array:
    """Compute the gradient for the planes from that of the result, and what `forward` kept."""
    kernel1, bias1, scale1, shift1, kernel2, _, scale2, shift2 = parameters
    _, channels, height, width = x.shape
    d = kernel2.shape[3]
    body = functools.partial(_backward, eps=eps)
    rows = _rows_shape(height, channels)
    (out,) = over_images(
        Kernel(
            "conv_stem_gradient", body, Cost(), [rows, rows, (4 * d, LANES), (LANES, d)],
            beside=8 * 2**20,
        ),
        [x, kept, g],
        [x.shape[1:]],
        parameters=[
            _selection(width, x.dtype),
            _first(kernel1, bias1),
            _second_gradient(kernel2),
            _spread(scale1, shift1, times=1),
            _spread(scale2, shift2, times=1),
            jnp.eye(d, dtype=x.dtype),
        ],
        interpret=interpret,
    )
    return out
