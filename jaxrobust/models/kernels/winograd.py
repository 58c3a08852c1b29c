"""3x3 convolutions with fewer products, for networks in the loops of attacks on CPU.

A tile of 4x4 outputs is a product of 36 transformed inputs with 36 transformed weights, channel by
channel, instead of 144; one of 2x2 takes 16 instead of 36, and reads fewer weights (Lavin and Gray
2016, arXiv 1509.09308, section 4: F(4x4, 3x3) and F(2x2, 3x3)). The weights have to be transformed
before the loop: `convolutions.before_a_loop`.

In float32 the rounding of F(4x4, 3x3) is 2e-6 of the largest output, a fifth of that at the paper's
points (a product of patches: 3e-7).
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
CHANNELS = 48  # in and out; with fewer, the transforms of maps cost more than the products save
ROWS = 16  # tiles of a batch, below which transformed weights, which are more, take longer to read
# What is transformed of as many images as fit here stays in the cache until it is added up. 64
# images of 32x32x64 take 0.19 ms each instead of 0.69, of 16x16x320 0.97 instead of 1.47 (one of
# two busy cores of an EPYC Zen 5; between 4 and 16 MiB nothing changes by more than a tenth).
CACHE = 8 * 2**20  # bytes
ROWS_AT_ONCE = 32  # tiles, with fewer of which transformed weights are read too often


class Tile(NamedTuple):
    """The matrices of a tile's m outputs and m + 2 points along an axis, in the paper's letters."""

    weights: np.ndarray  # f64[m + 2, 3], G
    inputs: np.ndarray  # f64[m + 2, m + 2], B^T
    outputs: np.ndarray  # f64[m, m + 2], A^T


def tile(*points: float) -> Tile:
    """Return the matrices for as many outputs as there are points other than 0 and infinity."""

    def powers(count):
        finite = np.vander([0, *points], count, increasing=True)
        return np.vstack([finite, np.eye(count)[-1]])

    size = len(points) + 2
    inputs = np.linalg.inv(powers(size)).T
    inputs[abs(inputs) < 1e-12] = 0  # rounding
    return Tile(powers(3), inputs, powers(len(points)).T)


_NEAR, _FAR = 0.5**0.5, 2**0.5
TILES = {4: tile(_NEAR, -_NEAR, _FAR, -_FAR), 2: tile(1, -1)}  # by the side of its outputs


def growth(m: int) -> float:
    """How many times more transformed weights there are, of both directions, than weights."""
    return 2 * (m + 2) ** 2 / 9


def side(padding: Padding, shape: tuple[int, ...]) -> int | None:
    """Return the side of tiles that takes the fewest products for maps [B,H,W,C], of as many the
    smaller; None: no side has enough tiles. A map of 2x2 is one tile of 2x2, and in one of 4x4 it
    would take more than without tiles.
    """
    tiles = {m: math.prod(-(-size // m) for size in _sizes(padding, shape)) for m in TILES}
    enough = [m for m, count in tiles.items() if shape[0] * count >= ROWS]
    return min(enough, key=lambda m: (tiles[m] * (m + 2) ** 2, m), default=None)


def of_own_type(wanted: Any, x: Any) -> bool:
    """Tell whether a result, whose type may be asked for, has that of `x`.

    `wanted in (None, x.dtype)` would not do: to NumPy, float64 equals None.
    """
    return wanted is None or jnp.dtype(wanted) == x.dtype


def applies(settings: dict[str, Any], x: Any, kernel: Any) -> bool:
    """Tell whether a convolution of f[B,H,W,in] with f[kh,kw,in,out] is one that this speeds up.

    Args:
      settings: what `lax.conv_general_dilated` takes in addition to operands.
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
    """Return the convolution f[B,H',W',out] of f[B,H,W,in] with f[3,3,in,out], differentiable."""
    m = side(padding, x.shape) or 2
    back = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    return _of_transformed(padding, x, kernel, transformed(m, kernel), transformed(m, back))


def values(padding: Padding, x: Array, kernel: Array) -> Array:
    """Return `convolve` without its gradients, for which the weights are transformed once more."""
    return _tiled(padding, x, transformed(side(padding, x.shape) or 2, kernel))


def transformed(m: int, kernel: Array) -> Array:
    """Return the weights f[(m+2)^2,in,out] of f[3,3,in,out] for tiles of m x m outputs."""
    g = TILES[m].weights
    # One product with all nine entries: of 512x512 channels 4 ms, where an einsum takes 106.
    both = np.einsum("ai,bj->baij", g, g).reshape(-1, 9).astype(kernel.dtype)
    out = jnp.matmul(both, kernel.reshape(9, -1), precision="highest")
    return out.reshape(-1, *kernel.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_transformed(padding: Padding, x: Array, kernel: Array, there: Array, back: Array) -> Array:
    """Convolve with weights that are transformed, for the values and for the input's gradient."""
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
    # XLA drops the weights' gradient, which attacks do not need; what is transformed has none.
    return gradient, jax.linear_transpose(plain, kernel)(g)[0], None, None


_of_transformed.defvjp(_forward, _backward)


def _sizes(padding: Padding, shape: tuple[int, ...]) -> list[int]:
    return [n + sum(pair) - 2 for n, pair in zip(shape[1:3], padding, strict=True)]


def _tiled(padding: Padding, x: Array, weights: Array) -> Array:
    """Return the convolution of f[B,H,W,in] with transformed weights f[(m+2)^2,in,out]."""
    size = _images_at_once(padding, x, weights)
    if size == len(x):
        return _of_tiles(padding, x, weights)
    filled = jnp.pad(x, ((0, -len(x) % size), *[(0, 0)] * 3))
    parts = filled.reshape(-1, size, *x.shape[1:])
    y = lax.map(lambda images: _of_tiles(padding, images, weights), parts)
    return y.reshape(-1, *y.shape[2:])[: len(x)]


def _images_at_once(padding: Padding, x: Array, weights: Array) -> int:
    """Count the images whose points and products stay in the cache while they are worked on."""
    m = math.isqrt(len(weights)) - 2
    tiles = math.prod(-(-size // m) for size in _sizes(padding, x.shape))
    bytes_of_image = len(weights) * tiles * sum(weights.shape[1:]) * x.dtype.itemsize
    most = max(CACHE // bytes_of_image, -(-ROWS_AT_ONCE // tiles), 1)
    if most >= len(x):
        return len(x)
    return min(range(most, most // 2, -1), key=lambda size: -len(x) % size)  # the fewest in vain


def _of_tiles(padding: Padding, x: Array, weights: Array) -> Array:
    """Return `_tiled` of all images at once."""
    m = math.isqrt(len(weights)) - 2
    sizes = _sizes(padding, x.shape)
    filled = [(low, high + -size % m) for (low, high), size in zip(padding, sizes, strict=True)]
    x = jnp.pad(x, ((0, 0), *filled, (0, 0)))
    points = _inputs(_inputs(x, axis=1, m=m), axis=3, m=m)
    # In bfloat16 an output of 4x4 tiles is off by 1.2% (rms), five times as much as without tiles.
    points_of = points.reshape(len(weights), -1, x.shape[-1])
    products = jnp.matmul(points_of, weights, precision="highest")
    products = products.reshape(*points.shape[:-1], -1)
    x = _outputs(_outputs(products, axis=4, m=m), axis=2, m=m)
    return x[:, : sizes[0], : sizes[1]]


# Walls keep XLA from computing what comes before once for each of the points that read it.
@walled
def _inputs(x: Array, *, axis: int, m: int) -> Array:
    """Return, on a first axis, the points of tiles of m + 2 pixels; they overlap by two."""
    last = x.shape[axis] - (m + 2)
    pixels = [lax.slice_in_dim(x, i, i + last + 1, m, axis) for i in range(m + 2)]
    return jnp.stack([_combined(row, pixels) for row in TILES[m].inputs])


@walled
def _outputs(products: Array, *, axis: int, m: int) -> Array:
    """Return the pixels, one after the other in an axis, of products at the points of tiles."""
    pixels = jnp.stack([_combined(row, list(products)) for row in TILES[m].outputs], axis)
    return pixels.reshape(*pixels.shape[: axis - 1], -1, *pixels.shape[axis + 1 :])


def _combined(row: np.ndarray, arrays: list[Array]) -> Array:
    """Return the sum of arrays times a row's numbers, of which many are 0, 1 or -1."""
    terms = [(float(c), a) for c, a in zip(row, arrays, strict=True) if c]
    return sum((a * c for c, a in terms[1:]), terms[0][1] * terms[0][0])
