"""3x3 convolutions with 4 products where there are 9, for networks in the loops of attacks on CPU.

Each tile of 2x2 outputs is a product of 16 transformed inputs with 16 transformed weights, channel
by channel, instead of 36 (Lavin and Gray 2016, arXiv 1509.09308, section 4.1, F(2x2, 3x3)). The
rounding is that of another order of the sums: 7e-7 of the largest output in float32, as that of a
product of patches. One core, batch 8, milliseconds per image, XLA's blocks and this: 128 channels
at 16x16 1.07 and 0.78, 256 at 8x8 1.12 and 0.73; 64 at 32x32 1.04 and 1.14. A forward pass of a
PreActResNet-18 at 32 px, and one with the input's gradient: 25.2 and 45.8 before, 17.4 and 35.3
with it (PyTorch 16.5 and 38.9). The weights have to be transformed before the loop:
`convolutions.before_a_loop`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrobust.models.primitives import walled
from jaxrobust.types import Array

# Channels in and out: with fewer it does not pay, with more the transformed weights, 3.6 times the
# weights for values and gradients, fill the caches: a ResNet-18 with its 512 channels too was as
# fast as without.
CHANNELS = 128, 256
# Winograd's matrices: of weights (G), of inputs (B^T) and of outputs (A^T), in the paper's letters.
_WEIGHTS = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
Padding = tuple[tuple[int, int], tuple[int, int]]


def applies(settings: dict[str, Any], x: Any, kernel: Any) -> bool:
    """Tell whether a convolution of f[B,H,W,in] with f[kh,kw,in,out] is one that this speeds up.

    Args:
      settings: what `lax.conv_general_dilated` takes beside operands.
      x: its shape and type.
      kernel: the same.
    """
    ones = ("window_strides", "lhs_dilation", "rhs_dilation")
    low = min(min(pair) for pair in settings["padding"])
    return (
        x.dtype in (jnp.float32, jnp.float64)
        and settings["preferred_element_type"] in (None, x.dtype)
        and kernel.shape[:2] == (3, 3)
        and min(kernel.shape[2:]) >= CHANNELS[0]
        and max(kernel.shape[2:]) <= CHANNELS[1]
        and settings["feature_group_count"] == 1
        and all(set(settings[name]) == {1} for name in ones)
        and low >= 0
        and max(max(pair) for pair in settings["padding"]) <= 2
    )


def convolve(padding: Padding, x: Array, kernel: Array) -> Array:
    """Return the convolution f[B,H',W',out] of f[B,H,W,in] with f[3,3,in,out], differentiable."""
    back = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    return _of_transformed(padding, x, kernel, transformed(kernel), transformed(back))


def transformed(kernel: Array) -> Array:
    """Return the weights f[16,in,out] of f[3,3,in,out]."""
    g = _WEIGHTS.astype(kernel.dtype)
    return jnp.einsum("ai,ijco,bj->abco", g, kernel, g).reshape(16, *kernel.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_transformed(padding: Padding, x: Array, kernel: Array, there: Array, back: Array) -> Array:
    """Convolve with weights that are transformed, for the values and for the input's gradient."""
    del kernel, back
    return _tiled(padding, x, there)


def _forward(padding, x, kernel, there, back):
    return _tiled(padding, x, there), (x, kernel, back)


def _backward(padding, residuals, g):
    x, kernel, back = residuals
    (top, bottom), (left, right) = padding
    gradient = _tiled(((2 - top, 2 - bottom), (2 - left, 2 - right)), g, back)
    numbers = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))

    def plain(kernel):
        return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=numbers)

    # XLA drops the weights' gradient, which attacks do not need; what is transformed has none.
    return gradient, jax.linear_transpose(plain, kernel)(g)[0], None, None


_of_transformed.defvjp(_forward, _backward)


def _tiled(padding: Padding, x: Array, weights: Array) -> Array:
    """Return the convolution of f[B,H,W,in] with transformed weights f[16,in,out]."""
    high, wide = (n + sum(pair) - 2 for n, pair in zip(x.shape[1:3], padding, strict=True))
    down, across = -(-high // 2), -(-wide // 2)  # tiles
    points = _inputs(x, padding=padding, down=down, across=across)
    products = lax.dot_general(points, weights, (((2,), (1,)), ((0,), (0,))))
    found = _outputs(products.reshape(4, 4, len(x), down, across, -1))
    return found[:, :high, :wide]


# Walls keep XLA from computing what comes before once for each of the 16 points that read it.
@walled
def _inputs(x: Array, *, padding: Padding, down: int, across: int) -> Array:
    """Return the points f[16,tiles,in] of tiles of 4x4 pixels, which overlap by two."""

    def combined(v):
        return v[0] - v[2], v[1] + v[2], v[2] - v[1], v[1] - v[3]

    (top, _), (left, _) = padding
    edges = ((top, 2 * down + 2 - x.shape[1] - top), (left, 2 * across + 2 - x.shape[2] - left))
    x = jnp.pad(x, ((0, 0), *edges, (0, 0)))
    rows = combined([x[:, i : i + 2 * down - 1 : 2] for i in range(4)])
    columns = [[r[:, :, j : j + 2 * across - 1 : 2] for j in range(4)] for r in rows]
    points = jnp.stack([point for row in columns for point in combined(row)])
    return points.reshape(16, -1, x.shape[3])


@walled
def _outputs(products: Array) -> Array:
    """Return f[B,2T,2U,out] of products f[4,4,B,T,U,out] of T x U tiles."""

    def combined(v):
        return v[0] + v[1] + v[2], v[1] - v[2] - v[3]

    rows = combined(list(products))
    found = [jnp.stack(combined(list(row)), 3) for row in rows]
    tiles = jnp.stack(found, 2)  # B, tile, row, tile, column, out
    batch, down, _, across, _, out = tiles.shape
    return tiles.reshape(batch, 2 * down, 2 * across, out)
