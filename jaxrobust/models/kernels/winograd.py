"""3x3 convolutions with fewer products, for CPU attack loops.

A tile of 4x4 outputs multiplies 36 transformed inputs with 36 transformed weights, channel by
channel, instead of 144; a tile of 2x2 takes 16 products instead of 36, and reads fewer weights
(Lavin and Gray 2016, arXiv 1509.09308, section 4: F(4x4, 3x3) and F(2x2, 3x3)). Transform the
weights before the loop: `convolutions.before_a_loop`.

In float32, F(4x4, 3x3) has a rounding error of 2e-6 of the largest output, a fifth of the error
with the paper's points (a product of patches: 3e-7).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrobust.models.kernels.primitives import walled
from jaxrobust.types import Array

Padding = tuple[tuple[int, int], ...]
Formula = Callable[[Padding, Array, Array], Array]  # `convolve` or `values`
CHANNELS = 48  # in and out; with fewer, transforming maps costs more than the products save
ROWS = 16  # tiles in a batch; with fewer, reading the larger transformed weights takes longer
# The transforms of as many images as fit here stay in the cache until they are summed. 64 images of
# 32x32x64 take 0.19 ms each instead of 0.69, 16x16x320 0.97 instead of 1.47 (on one of two busy
# cores of an EPYC Zen 5; sizes from 4 to 16 MiB differ by at most a tenth).
CACHE = 8 * 2**20  # bytes
ROWS_AT_ONCE = 32  # tiles; with fewer, transformed weights are read too often


class Tile(NamedTuple):
    """The matrices of a tile with m outputs and m + 2 points per axis, in the paper's notation."""

    weights: np.ndarray  # f64[m + 2, 3], G
    inputs: np.ndarray  # f64[m + 2, m + 2], B^T
    outputs: np.ndarray  # f64[m, m + 2], A^T


def tile(*points: float) -> Tile:
    """Return the matrices for as many outputs as there are finite points other than 0."""

    def powers(count):
        finite = np.vander([0, *points], count, increasing=True)
        return np.vstack([finite, np.eye(count)[-1]])

    size = len(points) + 2
    inputs = np.linalg.inv(powers(size)).T
    inputs[abs(inputs) < 1e-12] = 0  # remove rounding errors
    return Tile(powers(3), inputs, powers(len(points)).T)


_NEAR, _FAR = 0.5**0.5, 2**0.5
TILES = {4: tile(_NEAR, -_NEAR, _FAR, -_FAR), 2: tile(1, -1)}  # by the side of the tile's outputs


def growth(m: int) -> float:
    """Return the ratio of transformed weights, of both directions, to weights."""
    return 2 * (m + 2) ** 2 / 9


def side(padding: Padding, shape: tuple[int, ...]) -> int | None:
    """Return the tile side with the fewest products for maps [B,H,W,C], the smaller one if equal;
    None: no side has enough tiles. A map of 2x2 is one tile of 2x2; in a tile of 4x4 it would take
    more products than without tiles.
    """
    tiles = {m: math.prod(-(-size // m) for size in _sizes(padding, shape)) for m in TILES}
    enough = [m for m, count in tiles.items() if shape[0] * count >= ROWS]
    return min(enough, key=lambda m: (tiles[m] * (m + 2) ** 2, m), default=None)


def of_own_type(wanted: Any, x: Any) -> bool:
    """Return whether a result, whose type may be specified, has the type of `x`.

    `wanted in (None, x.dtype)` would be wrong: NumPy considers float64 equal to None.
    """
    return wanted is None or jnp.dtype(wanted) == x.dtype


def applies(settings: dict[str, Any], x: Any, kernel: Any) -> bool:
    """Return whether this speeds up a convolution of f[B,H,W,in] with f[kh,kw,in,out].

    Args:
      settings: arguments of `lax.conv_general_dilated` other than the operands.
      x: its shape and type.
      kernel: the same.
    """
    ones = ("window_strides", "lhs_dilation", "rhs_dilation")
    padding, wanted = settings["padding"], settings["preferred_element_type"]
    return (
        x.dtype in (jnp.float32, jnp.float64)
        and of_own_type(wanted, x)
        and kernel.shape[:2] == (3, 3)
        and min(kernel.shape[2:]) >= CHANNELS
        and settings["feature_group_count"] == 1
        and all(set(settings[name]) == {1} for name in ones)
        and min(map(min, padding)) >= 0
        and max(map(max, padding)) <= 2
        and side(padding, x.shape) is not None
    )


def convolve(padding: Padding, x: Array, kernel: Array) -> Array:
    """Convolve f[B,H,W,in] with f[3,3,in,out] to f[B,H',W',out], differentiably."""
    m = side(padding, x.shape) or 2
    back = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    return _of_transformed(padding, x, kernel, transformed(m, kernel), transformed(m, back))


def values(padding: Padding, x: Array, kernel: Array) -> Array:
    """Compute `convolve` without gradients, which would need a second weight transform."""
    return _tiled(padding, x, transformed(side(padding, x.shape) or 2, kernel))


def transformed(m: int, kernel: Array) -> Array:
    """Transform weights f[3,3,in,out] to f[(m+2)^2,in,out], for tiles of m x m outputs."""
    g = TILES[m].weights
    # One product with all nine entries: 4 ms for 512x512 channels; an einsum takes 106.
    both = np.einsum("ai,bj->baij", g, g).reshape(-1, 9).astype(kernel.dtype)
    out = jnp.matmul(both, kernel.reshape(9, -1), precision="highest")
    return out.reshape(-1, *kernel.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_transformed(padding: Padding, x: Array, kernel: Array, there: Array, back: Array) -> Array:
    """Convolve with transformed weights, for the values and for the input gradient."""
    del kernel, back
    return _tiled(padding, x, there)


def _forward(padding, x, kernel, there, back):
    return _tiled(padding, x, there), (x, kernel, back)


def _backward(padding, residuals, g):
    x, kernel, back = residuals
    numbers = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))

    def plain(kernel):
        return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=numbers)

    gradient = _tiled(tuple((2 - low, 2 - high) for low, high in padding), g, back)
    # XLA drops the weight gradient, which attacks do not use; transformed weights have none.
    return gradient, jax.linear_transpose(plain, kernel)(g)[0], None, None


_of_transformed.defvjp(_forward, _backward)


def _sizes(padding: Padding, shape: tuple[int, ...]) -> list[int]:
    return [n + sum(pair) - 2 for n, pair in zip(shape[1:3], padding, strict=True)]


def _tiled(padding: Padding, x: Array, weights: Array) -> Array:
    """Convolve f[B,H,W,in] with transformed weights f[(m+2)^2,in,out]."""
    size = _images_at_once(padding, x, weights)
    if size == len(x):
        return _of_tiles(padding, x, weights)
    filled = jnp.pad(x, ((0, -len(x) % size), *[(0, 0)] * 3))
    parts = filled.reshape(-1, size, *x.shape[1:])
    y = lax.map(lambda images: _of_tiles(padding, images, weights), parts)
    return y.reshape(-1, *y.shape[2:])[: len(x)]


def _images_at_once(padding: Padding, x: Array, weights: Array) -> int:
    """Count the images whose points and products stay in the cache while in use."""
    m = math.isqrt(len(weights)) - 2
    tiles = math.prod(-(-size // m) for size in _sizes(padding, x.shape))
    bytes_of_image = len(weights) * tiles * sum(weights.shape[1:]) * x.dtype.itemsize
    most = max(CACHE // bytes_of_image, -(-ROWS_AT_ONCE // tiles), 1)
    if most >= len(x):
        return len(x)
    return min(range(most, most // 2, -1), key=lambda size: -len(x) % size)  # the least padding


def _of_tiles(padding: Padding, x: Array, weights: Array) -> Array:
    """Compute `_tiled` for all images at once."""
    m = math.isqrt(len(weights)) - 2
    sizes = _sizes(padding, x.shape)
    filled = [(low, high + -size % m) for (low, high), size in zip(padding, sizes, strict=True)]
    x = jnp.pad(x, ((0, 0), *filled, (0, 0)))
    points = _inputs(_inputs(x, axis=1, m=m), axis=3, m=m)
    # In bfloat16, 4x4 tiles have an error of 1.2% (rms), five times as much as without tiles.
    points_of = points.reshape(len(weights), -1, x.shape[-1])
    products = jnp.matmul(points_of, weights, precision="highest")
    products = products.reshape(*points.shape[:-1], -1)
    x = _outputs(_outputs(products, axis=4, m=m), axis=2, m=m)
    return x[:, : sizes[0], : sizes[1]]


# Walls keep XLA from recomputing the inputs for each point that reads them.
@walled
def _inputs(x: Array, *, axis: int, m: int) -> Array:
    """Return, along a new first axis, the points of tiles of m + 2 pixels, overlapping by two."""
    last = x.shape[axis] - (m + 2)
    pixels = [lax.slice_in_dim(x, i, i + last + 1, m, axis) for i in range(m + 2)]
    return jnp.stack([_combined(row, pixels) for row in TILES[m].inputs])


@walled
def _outputs(products: Array, *, axis: int, m: int) -> Array:
    """Return pixels, in order along an axis, from the products at the points of tiles."""
    pixels = jnp.stack([_combined(row, list(products)) for row in TILES[m].outputs], axis)
    return pixels.reshape(*pixels.shape[: axis - 1], -1, *pixels.shape[axis + 1 :])


def _combined(row: np.ndarray, arrays: list[Array]) -> Array:
    """Sum arrays weighted by a row's numbers, many of which are 0, 1 or -1."""
    terms = [(float(c), a) for c, a in zip(row, arrays, strict=True) if c]
    return sum((a * c for c, a in terms[1:]), terms[0][1] * terms[0][0])
