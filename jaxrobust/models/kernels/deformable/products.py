"""Windows on TPUs: channels stay in the lanes, and products with zeros and ones move weights there.

On a TPU one of G groups' numbers for each pixel would fill G of 128 lanes. So points stay side by
side, f[B,H,W,G*9]; a product of matrices adds up their shares in each of the seven entries of a
window's row, f[B,H,W,7*G], and another repeats an entry's weights along the channels of each group.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrobust.models.kernels.deformable.bounded import HALF, NEAR, WIDE, shares, shifts, slopes
from jaxrobust.models.kernels.deformable.places import POINTS, SIDE, GridGeometry, reached
from jaxrobust.models.kernels.primitives import widened

Array = jax.Array
_Near = tuple[Array, Array, Array]  # offsets from the grid and masks, f32[B,H,W,G*9]


def _times(x: Array, ones: np.ndarray) -> Array:
    """Multiply f[..,m] by a matrix of zeros and ones; in float32 by six passes, which are exact."""
    dimensions = (((x.ndim - 1,), (0,)), ((), ()))
    how: dict[str, Any] = {
        "precision": lax.Precision.HIGHEST,
        "preferred_element_type": widened(x)[0].dtype,
    }
    return lax.dot_general(x, ones.astype(x.dtype), dimensions, **how)


@functools.cache
def _entries(groups: int, ky: int, column: int) -> np.ndarray:
    """Return f[G*9,7*G]: to which entry of a row of the window the points of row `ky` add, each by
    one of its neighbours.
    """
    ones = np.zeros((groups, POINTS, WIDE, groups), np.float32)
    for kx in range(SIDE):
        ones[np.arange(groups), SIDE * kx + ky, kx + column, np.arange(groups)] = 1
    return ones.reshape(groups * POINTS, -1)


@functools.cache
def _channels(groups: int, channels: int, column: int) -> np.ndarray:
    """Return f[7*G,C]: the weights of one entry of a row, repeated for each group's channels."""
    ones = np.zeros((WIDE, groups, channels), np.float32)
    ones[column] = np.repeat(np.eye(groups), channels // groups, axis=1)
    return ones.reshape(-1, channels)


def _places() -> list[tuple[int, int, int]]:
    """List the row of points, and row and column of the neighbour, of all that points touch."""
    near = range(len(NEAR))
    return [(ky, a, b) for ky in range(SIDE) for a in near for b in near]


def _near(geometry: GridGeometry, offsets: Array, mask: Array) -> tuple[_Near, Array]:
    """Return y, x and mask f32[B,H,W,G*9] with zeros where a window does not reach."""
    (offsets, mask), k = widened(offsets, mask), np.arange(POINTS) % SIDE - 1.0
    grid = {"y": k, "x": np.arange(POINTS) // SIDE - 1.0}
    y, x = (
        geometry.scale * offsets[..., first::2]
        + jnp.asarray((geometry.scale - 1) * np.tile(grid[axis], geometry.groups), mask.dtype)[
            None, None, None
        ]
        for axis, first in (("y", 1), ("x", 0))
    )
    near = reached(y, x)
    return (jnp.where(near, y, 0), jnp.where(near, x, 0), jnp.where(near, mask, 0)), near


def _weights(groups: int, dtype: Any, y: Array, x: Array, mask: Array) -> list[Array]:
    """Return the weights of each row of a window, f[B,H,W,7*G]."""
    zeros = jnp.zeros((*y.shape[:3], WIDE * groups), y.dtype)
    rows, down, right = [zeros] * WIDE, [mask * s for s in shares(y)], shares(x)
    for ky, a, b in _places():
        share = (down[a] * right[b]).astype(dtype)
        rows[ky + a] = rows[ky + a] + _times(share, _entries(groups, ky, b))
    return [row.astype(dtype) for row in rows]


def _to_points(
    groups: int, y: Array, x: Array, mask: Array, to_weights: list[Array]
) -> tuple[Array, ...]:
    """Return the gradients for y, x and mask of those for the weights."""
    to_y, to_x, to_mask = (jnp.zeros_like(mask) for _ in range(3))
    down, right, dy, dx = shares(y), shares(x), slopes(y), slopes(x)
    for ky, a, b in _places():
        back = _times(to_weights[ky + a], _entries(groups, ky, b).T)
        to_mask = to_mask + down[a] * right[b] * back
        to_y = to_y + mask * dy[a] * right[b] * back
        to_x = to_x + mask * down[a] * dx[b] * back
    return to_y, to_x, to_mask


def _padded(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (HALF, HALF), (HALF, HALF), (0, 0)))


def _at(x: Array, row: int, column: int) -> Array:
    height, width = x.shape[1] - 2 * HALF, x.shape[2] - 2 * HALF
    return x[:, row : row + height, column : column + width]


def forward(
    geometry: GridGeometry, value: Array, offsets: Array, mask: Array
) -> tuple[Array, Array]:
    """Compute what the points inside of windows add: f[B,H,W,C]; and whether others are left."""
    points, near = _near(geometry, offsets, mask)
    groups, channels = geometry.groups, value.shape[3]
    rows = _weights(groups, value.dtype, *points)
    total, padded = jnp.zeros(value.shape, points[0].dtype), _padded(value)
    for row, column in shifts():
        repeated = _times(rows[row], _channels(groups, channels, column))
        total = total + repeated * widened(_at(padded, row, column))[0]
    return total, ~near.all()


def backward(
    geometry: GridGeometry, value: Array, offsets: Array, mask: Array, g: Array
) -> tuple[tuple[Array, ...], Array]:
    """Compute their part of the gradients for value, offsets and mask; whether others are left."""
    points, near = _near(geometry, offsets, mask)
    groups, channels, dtype = geometry.groups, value.shape[3], value.dtype
    rows = _weights(groups, dtype, *points)
    to_value = jnp.zeros(value.shape, points[0].dtype)
    to_rows = [jnp.zeros(row.shape, to_value.dtype) for row in rows]
    (wide,), padded = widened(g), _padded(value)
    for row, column in shifts():
        ones = _channels(groups, channels, column)
        to_repeated = (_at(padded, row, column) * g).astype(dtype)
        to_rows[row] = to_rows[row] + _times(to_repeated, ones.T)
        pulled = _padded(_times(rows[row], ones) * wide)
        to_value = to_value + _at(pulled, WIDE - 1 - row, WIDE - 1 - column)
    y, x, m = _to_points(groups, *points, [row.astype(dtype) for row in to_rows])
    to_offsets = jnp.stack([geometry.scale * x, geometry.scale * y], -1).reshape(offsets.shape)
    return (to_value, to_offsets, jnp.where(near, m, 0)), ~near.all()
