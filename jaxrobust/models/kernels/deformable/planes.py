"""Windows without a kernel: rows of pixels are contiguous, so loops run over many neighbours.

Channels precede pixels, and groups follow them, f[B,H,D,W,G]; each of a window's 49 weights has its
own plane.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.models.kernels.deformable.bounded import (
    HALF,
    WIDE,
    entry_weights,
    shares,
    shifts,
    slopes,
)
from jaxrobust.models.kernels.deformable.places import (
    POINTS,
    SIDE,
    GridGeometry,
    GridPoints,
    as_given,
    points_of,
    reached,
)
from jaxrobust.models.kernels.primitives import walled, widened

Array = jax.Array
TOGETHER = 1  # one image at a time


@walled
def _split(value: Array, *, groups: int) -> Array:
    batch, height, width, channels = value.shape
    parts = widened(value)[0].reshape(batch, height, width, groups, channels // groups)
    return parts.transpose(0, 1, 4, 2, 3)


@walled
def _joined(parts: Array) -> Array:
    batch, height, _, width, _ = parts.shape
    return parts.transpose(0, 1, 3, 4, 2).reshape(batch, height, width, -1)


@walled
def _inside(y: Array, x: Array, mask: Array) -> tuple[Array, ...]:
    """Return the points, with zero weight if no window reaches them, and which are reached."""
    near = reached(y, x)
    return *(jnp.where(near, a, 0) for a in (y, x, mask)), near


def _near(geometry: GridGeometry, offsets: Array, mask: Array) -> tuple[GridPoints, Array]:
    points = geometry.from_grid(points_of(offsets, mask, groups=geometry.groups))
    *inside, near = _inside(*points)
    return GridPoints(*inside), near


@walled
def _weights(y: Array, x: Array, mask: Array) -> Array:
    """Return the weight of each window entry, f[49,B,H,W,G]."""
    return jnp.stack(entry_weights(y, x, mask))


@walled
def _to_points(y: Array, x: Array, mask: Array, to_weights: Array) -> tuple[Array, ...]:
    """Return the gradients for y, x and mask, f[9,B,H,W,G]."""
    rows = []
    for point in range(POINTS):
        kx, ky = divmod(point, SIDE)
        (down, right), (dy, dx) = ([f(y[point]), f(x[point])] for f in (shares, slopes))
        # Sums over the window's rows, per column.
        summed, moved = (
            [
                sum(w * to_weights[(ky + a) * WIDE + kx + b] for a, w in enumerate(along))
                for b in range(len(right))
            ]
            for along in (down, dy)
        )
        m = mask[point]
        rows.append(
            [
                m * sum(w * s for w, s in zip(right, moved, strict=True)),
                m * sum(w * s for w, s in zip(dx, summed, strict=True)),
                sum(w * s for w, s in zip(right, summed, strict=True)),
            ]
        )
    return tuple(map(jnp.stack, zip(*rows, strict=True)))


def _padded(parts: Array) -> Array:
    return jnp.pad(parts, ((0, 0), (HALF, HALF), (0, 0), (HALF, HALF), (0, 0)))


def _at(parts: Array, row: int, column: int) -> Array:
    """Return the pixels of padded parts that a window entry covers."""
    height, width = parts.shape[1] - 2 * HALF, parts.shape[3] - 2 * HALF
    return parts[:, row : row + height, :, column : column + width]


@walled
def _summed(parts: Array, weights: Array) -> Array:
    parts = _padded(parts)
    weights = weights[:, :, :, None]
    products = (weights[n] * _at(parts, *at) for n, at in enumerate(shifts()))
    return functools.reduce(jnp.add, products)


@walled
def _to_value(g: Array, weights: Array) -> Array:
    """Return the gradient for the parts: for each pixel, from all windows that contain it."""
    g, total = _padded(g), jnp.zeros((), g.dtype)
    weights = jnp.pad(weights, ((0, 0), (0, 0), (HALF, HALF), (HALF, HALF), (0, 0)))
    for n, (row, column) in enumerate(shifts()):
        at = WIDE - 1 - row, WIDE - 1 - column
        total = total + _at(weights[n][:, :, None], *at) * _at(g, *at)
    return total


@walled
def _to_weights(parts: Array, g: Array) -> Array:
    """Return the gradients for the weights: products of `g` with each shift, summed over D.

    Sixteen explicit terms, in a loop over the 49 shifts: `sum(2)` takes five times as long.
    """
    padded, (batch, height, channels, width, groups) = _padded(parts), parts.shape

    def fill(n: Array, sums: Array) -> Array:
        met = lax.dynamic_slice(padded, (0, n // WIDE, 0, n % WIDE, 0), parts.shape)
        product = functools.reduce(jnp.add, (g[:, :, d] * met[:, :, d] for d in range(channels)))
        return lax.dynamic_update_index_in_dim(sums, product, n, 0)

    zeros = jnp.zeros((WIDE * WIDE, batch, height, width, groups), parts.dtype)
    return lax.fori_loop(0, WIDE * WIDE, fill, zeros)


def forward(
    geometry: GridGeometry, value: Array, offsets: Array, mask: Array
) -> tuple[Array, Array]:
    """Compute the contribution of points inside windows, f[B,H,W,C], and whether others remain."""
    points, near = _near(geometry, offsets, mask)
    parts = _split(value, groups=geometry.groups)
    return _joined(_summed(parts, _weights(*points))), ~near.all()


def backward(
    geometry: GridGeometry, value: Array, offsets: Array, mask: Array, g: Array
) -> tuple[tuple[Array, ...], Array]:
    """Compute their part of the gradients for value, offsets and mask; whether others remain."""
    points, near = _near(geometry, offsets, mask)
    g = _split(g, groups=geometry.groups)
    to_value = _joined(_to_value(g, _weights(*points)))
    y, x, m = _to_points(*points, _to_weights(_split(value, groups=geometry.groups), g))
    gradients = as_given(geometry.scale * y, geometry.scale * x, jnp.where(near, m, 0))
    return (to_value, *gradients), ~near.all()
