"""The first two convolutions of a ConvStem, with their norms and GELUs, as one kernel.

An attack differentiates for the image, so these layers run in both directions in each of its steps,
on maps of 48 channels that XLA lays into 128 lanes, with sums over channels in passes of their own.
Here an image comes in, what the second layer makes goes out, and in between nothing leaves the fast
memory; the gradient's kernel computes the first layer again.

Pixels lie in the lanes and channels in the rows, so that a sum over channels adds registers. Four
by four pixels of the image are a *block*: four pixels of the first layer and one of the second. A
row of 56 blocks takes 64 lanes; the other 64 are those of the row of blocks as far down in the
lower half of the image. A product with a matrix of ones and zeros brings each fourth column of the
image into its lane, five of them as neighbours of a block overlap, which is exact; then a row of
blocks is a product f[4*C,128] @ f[128,128] of 3 channels x 5 columns x 8 rows, and the second
convolution one with the nine groups of channels that a block meets.

By hand, for an image of 224 x 224 x 3 and 48 and 96 channels on a v5e: the columns take 720 rows x
10 tiles / 4 units = 1,800 cycles; each of 28 rows of blocks then 48 + 96 + 32 for its products and
36 registers x (29 vector operations / 4 + 1 for the tangent) = 297 for its norms and GELUs; in the
gradient 48 + 144 + 24 + 64 and 36 x (45 / 4 + 2) = 477, and the columns 1,680 more. So 88 images
take 1.3 and 2.2 M cycles. The compiler schedules 2,227 + 28 x 476 for an image in one direction and
3,436 + 28 x 713 in the other, 1.4 and 2.1 M.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.models.kernels.tpu.calls import (
    LANES,
    SCOPED,
    SUBLANES,
    Cost,
    Kernel,
    dot,
    elementwise,
    over_images,
    product,
    tiled,
)

Array = jax.Array
_HALF = LANES // 2
_BLOCK = 4  # pixels of a block's side
_TAPS = 5  # columns of the image, and rows, that a block's four pixels of the first layer meet
_PACKED = 16  # rows of bfloat16 that a register holds


def refused(x: Array, *parameters: Array) -> str | None:
    """Say why the kernel does not take such images and layers; None: it does."""
    _, height, width, channels = x.shape
    kernels = parameters[0], parameters[4]
    if x.dtype != jnp.bfloat16:
        return f"{x.dtype} is not bfloat16"
    if channels != 3 or any(kernel.shape[:2] != (3, 3) for kernel in kernels):
        return "its first two convolutions are not 3x3, of images with 3 channels"
    if any(kernel.shape[3] % _PACKED for kernel in kernels):
        return f"its channels are no multiples of {_PACKED}"
    if height % (2 * _PACKED) or width % _BLOCK or width > _BLOCK * _HALF:
        return f"{height}x{width} px are no multiples of 32 and 4, the latter at most 256"
    if _needed(x.shape[1:], *(kernel.shape[3] for kernel in kernels)) > SCOPED:
        return f"{height}x{width} px are too large for the fast memory of a chip"
    return None


def _needed(image: tuple[int, ...], c: int, d: int) -> int:
    """Count the bytes that the gradient's kernel takes."""
    height, width, channels = image
    planes = tiled((channels, height, width), 2)
    maps = tiled((height // 4, width // 4, d), 2) + tiled((height // 8, d, LANES), 2)
    beside = tiled((2, width, _TAPS * LANES), 2) + tiled((4 * c, 4 * d + LANES), 2)
    return 2 * (2 * planes + maps + beside) + 3 * tiled(_rows_shape(height, channels), 4)


def _rows_shape(height: int, channels: int) -> tuple[int, ...]:
    """Return the shape of what rows of blocks meet: two of them start in eight rows."""
    return channels, height // 16, 2, SUBLANES, _TAPS * LANES


# ------------------------------------------------------------------ matrices, which XLA makes once


def _selection(width: int, dtype: Any) -> Array:
    """Make f[2,W,5*128]: which column of an image goes to which lane, for both halves."""
    column, lane = jnp.arange(width)[:, None], jnp.arange(_TAPS * LANES)[None]
    tap, place = lane // LANES, lane % LANES
    block = place % _HALF
    there = (column == _BLOCK * block + tap - 1) & (block < width // _BLOCK)
    return jnp.stack([there & (place // _HALF == half) for half in (0, 1)]).astype(dtype)


def _first(kernel: Array, bias: Array) -> Array:
    """Make f[4*C,128]: four pixels of the first layer from 3 channels x 5 columns x 8 rows.

    Two rows of ones meet the bias, as two summands because it is not rounded.
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
    rest = LANES - kernel.shape[1] - len(biases)
    return jnp.concatenate([kernel, *biases, jnp.zeros((len(kernel), rest), kernel.dtype)], 1)


def _second(kernel: Array) -> Array:
    """Make f[D,9*C]: a pixel of the second layer from nine of the first."""
    return kernel.reshape(-1, kernel.shape[3]).T


def _second_gradient(kernel: Array) -> Array:
    """Make f[4*C,4*D]: gradients of a block's pixels from those of 2x2 pixels of the second."""
    zero = jnp.zeros(kernel.shape[2:], kernel.dtype)

    def tap(i: int, j: int) -> Array:
        return kernel[i, j] if 0 <= i < 3 and 0 <= j < 3 else zero

    pixels = [(0, 0), (0, 1), (1, 0), (1, 1)]
    parts = [[tap(p + 1 - 2 * y, q + 1 - 2 * x) for y, x in pixels] for p, q in pixels]
    return jnp.concatenate([jnp.concatenate(row, 1) for row in parts])


def _spread(*parameters: Array) -> Array:
    """Make f32[n,C,128] of n parameters f[C]."""
    stack = jnp.stack([p.astype(jnp.float32) for p in parameters])
    return jnp.broadcast_to(stack[..., None], (*stack.shape, LANES))


# ------------------------------------------------------------- norm and GELU over channels in rows


# Of tanh(x * P(x**2)) for erf(x / sqrt(2)), which it meets within 7e-6 (GELU within 4e-6, a 500th
# of a step of bfloat16 at 1): 10 vector operations and a tangent instead of some 35.
_SERIES = (1.18125479e-06, -3.20649087e-05, -1.13682734e-04, 3.64382789e-02, 7.97852337e-01)


def _error_function(x: Array, exact: bool) -> Array:
    """Compute erf(x / sqrt(2))."""
    if exact:
        return lax.erf(x * 0.5**0.5)
    square, (first, *rest) = x * x, _SERIES
    total = first * square + rest[0]
    for coefficient in rest[1:]:
        total = total * square + coefficient
    return jnp.tanh(x * total)


def _gelu(x: Array, exact: bool) -> Array:
    half = 0.5 * x
    return half + half * _error_function(x, exact)


def _gelu_slope(x: Array, exact: bool) -> Array:
    power = jnp.exp2((-0.5 * math.log2(math.e)) * (x * x))
    return 0.5 + 0.5 * _error_function(x, exact) + x * (2 * math.pi) ** -0.5 * power


def _normalised(x: Array, eps: float) -> tuple[Array, Array]:
    centred = x - x.mean(0, keepdims=True)
    inverse = lax.rsqrt((centred * centred).mean(0, keepdims=True) + eps)
    return centred * inverse, inverse


def _norm_gelu(x: Array, affine: Any, eps: float, exact: bool) -> Array:
    """Compute f32[C,128]; `affine`: scale and shift."""
    return _gelu(_normalised(x, eps)[0] * affine[0] + affine[1], exact)


class _Gradient(NamedTuple):
    """What a norm and its GELU give back for f32[C,128]."""

    to_x: Array
    normed: Array  # what the GELU takes
    to_normed: Array
    normal: Array  # before scale and shift


def _norm_gelu_gradient(x: Array, g: Array, affine: Any, eps: float, exact: bool) -> _Gradient:
    normal, inverse = _normalised(x, eps)
    normed = normal * affine[0] + affine[1]
    to_normed = g * _gelu_slope(normed, exact)
    to_normal = to_normed * affine[0]
    along = (to_normal * normal).mean(0, keepdims=True)
    to_x = inverse * (to_normal - to_normal.mean(0, keepdims=True) - normal * along)
    return _Gradient(to_x, normed, to_normed, normal)


# ------------------------------------------------------------------------------- moving of pixels


def _parts(x: Array, count: int) -> list[Array]:
    size = x.shape[0] // count
    return [x[i * size : (i + 1) * size] for i in range(count)]


def _lanes(tap: int) -> slice:
    return slice(tap * LANES, (tap + 1) * LANES)


def _shifted(x: Array, by: int) -> Array:
    """Move pixels of f32[C,128] by 1 to the right, or by -1, within each half."""
    from jax.experimental.pallas import tpu as pltpu

    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1) & (_HALF - 1)
    edge = 0 if by == 1 else _HALF - 1
    return jnp.where(lane == edge, 0.0, pltpu.roll(x, by % LANES, 1))


def _other_half(x: Array, to: int) -> Array:
    """Move the other half's pixels into half `to`, and zeros into the other."""
    from jax.experimental.pallas import tpu as pltpu

    lower = lax.broadcasted_iota(jnp.int32, x.shape, 1) >= _HALF
    return jnp.where(lower == bool(to), pltpu.roll(x, _HALF, 1), 0.0)


def _columns_to_lanes(image: Any, selection: Any, rows: Any) -> None:
    """Fill `rows`: those that a row of blocks meets start one above it, and are five."""
    channels, half = image.shape[1], image.shape[2] // 2
    planes = [image[0, channel] for channel in range(channels)]

    def chosen(start: int, stop: int, to: int) -> Array:
        part = jnp.concatenate([plane[start:stop] for plane in planes])
        return dot(part, selection[to], "nn")

    both = _parts(chosen(0, half, 0) + chosen(half, 2 * half, 1), channels)
    above = _parts(chosen(half - _PACKED, half, 1), channels)  # the lower half's first row
    for channel, last in enumerate(above):
        own = both[channel]
        even = jnp.concatenate([last[-1:], own[:-1]])
        odd = jnp.concatenate([own[3:], jnp.zeros((3, own.shape[1]), jnp.float32)])
        for i, value in enumerate((even, odd)):
            rows[channel, :, i] = value.reshape(-1, SUBLANES, value.shape[1])


def _lanes_to_columns(totals: Any, selection: Any, out: Any) -> None:
    """Add up what rows of blocks give to a row of the image, and put columns into their places."""
    channels, half = out.shape[1], out.shape[2] // 2
    found = []
    for channel in range(channels):
        even, odd = (totals[channel, :, i].reshape(half, -1) for i in (0, 1))
        above = [_other_half(even[:SUBLANES, _lanes(tap)], 0)[:1] for tap in range(_TAPS)]
        zero = jnp.zeros((3, even.shape[1]), jnp.float32)
        even = jnp.concatenate([even[1:], jnp.concatenate(above, 1)])
        found.append(even + jnp.concatenate([zero, odd[:-3]]))
    whole = jnp.concatenate(found).astype(out.dtype)
    for i in (0, 1):
        parts = _parts(dot(whole, selection[i], "nt").astype(out.dtype), channels)
        for channel, part in enumerate(parts):
            out[0, channel, i * half : (i + 1) * half] = part


def _met(rows: Any, block: Any, dtype: Any) -> Array:
    """Read what a row of blocks meets, and ones, f[128,128]."""
    place = block >> 1, block & 1, slice(None)
    taps = [(channel, tap) for channel in range(rows.shape[0]) for tap in range(_TAPS)]
    parts = [rows[(channel, *place, _lanes(tap))] for channel, tap in taps]
    parts.append(jnp.ones((LANES - SUBLANES * len(parts), LANES), jnp.float32))
    return jnp.concatenate(parts).astype(dtype)


def _window(left: Array, right: Array) -> Array:
    """Join what a pixel of the second layer meets of a row of the first, f32[3*C,128]."""
    return jnp.concatenate([_shifted(right, 1), left, right])


# ------------------------------------------------------------------------------------- the kernels


def _forward(
    image, selection, first, second, affine1, affine2, identity, out, kept, rows, met, *, eps
) -> None:
    from jax.experimental import pallas as pl

    dtype, blocks, columns, size = image.dtype, kept.shape[1], out.shape[2], met.shape[0] // 3
    activate = functools.partial(_norm_gelu, eps=eps, exact=dtype == jnp.float32)
    _columns_to_lanes(image, selection, rows)

    def pixels(block: Any) -> list[Array]:
        z = dot(first[...], _met(rows, block, dtype), "nn")
        return [activate(part, affine1) for part in _parts(z, 4)]

    def put(block: Any) -> None:
        y = pixels(block)
        met[size : 2 * size], met[2 * size :] = _window(*y[:2]), _window(*y[2:])

    met[:size] = _window(*(_other_half(y, 1) for y in pixels(blocks - 1)[2:]))
    put(0)

    @pl.loop(0, blocks)
    def convolve(block: Any) -> None:
        seen = met[...]
        met[:size] = seen[2 * size :]
        # The next row's first layer fills the time in which this one's operations wait.
        put(jnp.minimum(block + 1, blocks - 1))
        z = (dot(second[...], seen.astype(dtype), "nn") + affine2[2]).astype(dtype)
        kept[0, block] = z
        y = activate(z.astype(jnp.float32), affine2).astype(dtype)
        across = dot(identity[...], y, "nt").astype(dtype)
        out[0, block] = across[:columns]
        out[0, block + blocks] = across[_HALF : _HALF + columns]


class _Row(NamedTuple):
    """Gradients at a row of blocks."""

    block: Any
    second: _Gradient  # of the second layer
    below: Array  # of what the second convolution makes in the next row
    met: Array
    first: list[_Gradient]  # of a block's four pixels


def _each_row(refs: Sequence[Any], rows: Any, below: Any, across: Any, eps: float, use: Callable):
    """Call `use` with the gradients at each row of blocks, from the last to the first."""
    from jax.experimental import pallas as pl

    image, kept, g, selection, first, second, affine1, affine2, identity = refs
    dtype, blocks, (columns, d) = image.dtype, kept.shape[1], g.shape[2:]
    gradient = functools.partial(_norm_gelu_gradient, eps=eps, exact=dtype == jnp.float32)
    _columns_to_lanes(image, selection, rows)
    across[...] = jnp.zeros_like(across)

    def behind(block: Any) -> _Gradient:
        across[:columns] = g[0, block].astype(jnp.float32)
        across[_HALF : _HALF + columns] = g[0, block + blocks].astype(jnp.float32)
        to_y = dot(identity[...], across[...].astype(dtype), "nt")
        return gradient(kept[0, block].astype(jnp.float32), to_y, affine2)

    def window(to_z: Array) -> Array:
        return jnp.concatenate([to_z, _shifted(to_z, -1)])

    below[...] = window(_other_half(behind(0).to_x, 0))

    @pl.loop(0, blocks)
    def differentiate(i: Any) -> None:
        block = blocks - 1 - i
        behind_it, seen = behind(block), below[...]
        here = window(behind_it.to_x)
        to_y = dot(second[...], jnp.concatenate([here, seen]).astype(dtype), "nn")
        below[...] = here
        met = _met(rows, block, dtype)
        pairs = zip(_parts(dot(first[...], met, "nn"), 4), _parts(to_y, 4), strict=True)
        pixels = [gradient(z, to_pixel, affine1) for z, to_pixel in pairs]
        use(_Row(block, behind_it, seen[:d], met, pixels))


def _backward(*refs, eps: float) -> None:
    *operands, out, rows, totals, below, across = refs
    _, _, _, selection, first, *_ = operands

    def use(row: _Row) -> None:
        to_z = jnp.concatenate([pixel.to_x for pixel in row.first])
        to_rows = dot(first[...], to_z.astype(out.dtype), "tn")
        for n in range(totals.shape[0] * _TAPS):
            place = n // _TAPS, row.block >> 1, row.block & 1, slice(None), _lanes(n % _TAPS)
            totals[place] = to_rows[n * SUBLANES : (n + 1) * SUBLANES]

    _each_row(operands, rows, below, across, eps, use)
    _lanes_to_columns(totals, selection, out)


def _sums(*refs, eps: float) -> None:
    """Sum gradients for the two matrices, and, still apart by lanes, for the parameters of norms
    and the second bias.
    """
    *operands, to_first, to_second, to_affine1, to_affine2, rows, below, across = refs
    dtype = operands[0].dtype
    for out in (to_first, to_second, to_affine1, to_affine2):
        out[...] = jnp.zeros_like(out)

    def use(row: _Row) -> None:
        to_z = jnp.concatenate([pixel.to_x for pixel in row.first])
        to_first[0] += dot(to_z.astype(dtype), row.met, "nt")
        y = [_gelu(pixel.normed, dtype == jnp.float32) for pixel in row.first]
        middle, lowest = (_window(*pair).astype(dtype) for pair in (y[:2], y[2:]))
        here, below = row.second.to_x.astype(dtype), row.below.astype(dtype)
        for i, (g, met) in enumerate(((below, lowest), (here, middle), (here, lowest))):
            to_second[0, i] += dot(g, met, "nt")
        for pixel in row.first:
            to_affine1[0, 0] += pixel.to_normed * pixel.normal
            to_affine1[0, 1] += pixel.to_normed
        to_affine2[0, 0] += row.second.to_normed * row.second.normal
        to_affine2[0, 1] += row.second.to_normed
        to_affine2[0, 2] += row.second.to_x

    _each_row(operands, rows, below, across, eps, use)


def _columns_cost(image: tuple[int, ...]) -> Cost:
    channels, height, width = image
    return product(channels * (height + _PACKED), width, _TAPS * LANES)


def _gradient_cost(c: int, d: int) -> Cost:
    """Count what `_each_row` does in a row."""
    products = product(4 * c, LANES, LANES) + product(4 * c, 4 * d, LANES) + product(d, d, LANES)
    return products + elementwise(4 * c + d, LANES, 45, 2)


def forward(x: Array, *parameters: Array, eps: float, interpret: bool = False) -> list[Array]:
    """Compute both layers of planes f[B,3,H,W] as f[B,H/4,W/4,D], and f[B,H/8,D,128].

    The latter is what the second convolution makes, for `backward`.
    """
    kernel1, bias1, scale1, shift1, kernel2, bias2, scale2, shift2 = parameters
    _, channels, height, width = x.shape
    c, d = kernel2.shape[2:]
    products = product(4 * c, LANES, LANES) + product(d, 9 * c, LANES) + product(LANES, LANES, d)
    row = products + elementwise(4 * c + d, LANES, 29, 1)
    cost = _columns_cost(x.shape[1:]) + row * (height // 8)
    scratch = [_rows_shape(height, channels), (9 * c, LANES)]
    body = functools.partial(_forward, eps=eps)
    return over_images(
        Kernel("conv_stem", body, cost, scratch, tiled(_rows_shape(height, channels), 4)),
        [x],
        [(height // 4, width // 4, d), (height // 8, d, LANES)],
        parameters=[
            _selection(width, x.dtype),
            _first(kernel1, bias1),
            _second(kernel2),
            _spread(scale1, shift1),
            _spread(scale2, shift2, bias2),
            jnp.eye(LANES, dtype=x.dtype),
        ],
        interpret=interpret,
    )


def _operands(x: Array, kernel1, bias1, scale1, shift1, kernel2, _, scale2, shift2) -> list[Array]:
    """Make what both kernels of gradients read beside images."""
    return [
        _selection(x.shape[3], x.dtype),
        _first(kernel1, bias1),
        _second_gradient(kernel2),
        _spread(scale1, shift1),
        _spread(scale2, shift2),
        jnp.eye(kernel2.shape[3], dtype=x.dtype),
    ]


def backward(
    x: Array, kept: Array, g: Array, *parameters: Array, eps: float, interpret: bool = False
) -> Array:
    """Compute the gradient for planes from that of the result, and from what `forward` kept."""
    _, channels, height, width = x.shape
    c, d = parameters[4].shape[2:]
    row = _gradient_cost(c, d) + product(LANES, 4 * c, LANES)
    back = product(channels * height, _TAPS * LANES, width)
    cost = _columns_cost(x.shape[1:]) + back + row * (height // 8)
    rows = _rows_shape(height, channels)
    scratch = [rows, rows, (2 * d, LANES), (LANES, d)]
    body = functools.partial(_backward, eps=eps)
    (out,) = over_images(
        Kernel("conv_stem_gradient", body, cost, scratch, tiled(rows, 4)),
        [x, kept, g],
        [x.shape[1:]],
        parameters=_operands(x, *parameters),
        interpret=interpret,
    )
    return out


def parameter_gradients(
    x: Array, kept: Array, g: Array, *parameters: Array, eps: float, interpret: bool = False
) -> list[Array]:
    """Compute the gradients for the parameters, in float32; operands as those of `backward`."""
    _, channels, height, _ = x.shape
    c, d = parameters[4].shape[2:]
    products = product(4 * c, LANES, LANES) + product(d, LANES, 3 * c) * 3
    row = _gradient_cost(c, d) + products + elementwise(4 * c + d, LANES, 5)
    rows = _rows_shape(height, channels)
    sums = over_images(
        Kernel(
            "conv_stem_sums",
            functools.partial(_sums, eps=eps),
            _columns_cost(x.shape[1:]) + row * (height // 8),
            [rows, (2 * d, LANES), (LANES, d)],
            tiled(rows, 4),
        ),
        [x, kept, g],
        [(4 * c, LANES), (3, d, 3 * c), (2, c, LANES), (3, d, LANES)],
        parameters=_operands(x, *parameters),
        dtype=jnp.float32,
        interpret=interpret,
    )
    to_first, to_second, to_affine1, to_affine2 = (s.sum(0) for s in sums)
    to_kernel1, to_bias1 = (
        jax.linear_transpose(
            lambda kernel: _first(kernel, jnp.zeros(c)), jnp.zeros(parameters[0].shape)
        )(to_first)[0],
        to_first[:, _TAPS * SUBLANES * channels].reshape(4, c).sum(0),
    )
    to_kernel2 = to_second.reshape(3, d, 3, c).transpose(0, 2, 3, 1)
    to_scale2, to_shift2, to_bias2 = to_affine2.sum(-1)
    to_scale1, to_shift1 = to_affine1.sum(-1)
    return [
        *(to_kernel1, to_bias1, to_scale1, to_shift1),
        *(to_kernel2, to_bias2, to_scale2, to_shift2),
    ]
