"""Windows on TPUs: channels stay in the lanes, and products with zeros and ones move weights there.

On a TPU one of G groups' numbers for each pixel would fill G of 128 lanes. So points stay side by
side, f[B,H,W,G*9]; a product of matrices adds up their shares in each entry of the window,
f[B,H,W,49*G], and another repeats an entry's weights along the channels of each group.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrobust.models.kernels.deformable.bounded import HALF, NEAR, WIDE, shares, shifts, slopes
from jaxrobust.models.kernels.deformable.places import POINTS, SIDE, Geometry, reached
from jaxrobust.models.kernels.primitives import widened

Array = jax.Array
_ENTRIES = WIDE * WIDE


def _times(x: Array, ones: np.ndarray) -> Array:
    """Multiply f[..,m] by a matrix of zeros and ones; in float32 by six passes, which are exact."""
    dimensions = (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(
        x, jnp.asarray(ones, x.dtype), dimensions, precision=lax.Precision.HIGHEST
    )


def _entries(groups: int, row: int, column: int) -> np.ndarray:
    """Return f[G*9,49*G]: to which entry of the window a neighbour of each point adds."""
    ones = np.zeros((groups, POINTS, _ENTRIES, groups), np.float32)
    for point in range(POINTS):
        kx, ky = divmod(point, SIDE)
        entry = (ky + row) * WIDE + kx + column
        ones[np.arange(groups), point, entry, np.arange(groups)] = 1
    return ones.reshape(groups * POINTS, -1)


def _channels(groups: int, channels: int, entry: int) -> np.ndarray:
    """Return f[49*G,C]: the weights of one entry, repeated for the channels of each group."""
    ones = np.zeros((_ENTRIES, groups, channels), np.float32)
    ones[entry] = np.repeat(np.eye(groups), channels // groups, axis=1)
    return ones.reshape(-1, channels)


def _near(geometry: Geometry, offsets: Array, mask: Array) -> tuple[tuple[Array, ...], Array]:
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
    return tuple(jnp.where(near, a, 0) for a in (y, x, mask)), near


def _weights(groups: int, y: Array, x: Array, mask: Array) -> Array:
    total = jnp.zeros((*y.shape[:3], _ENTRIES * groups), y.dtype)
    columns = shares(x)
    for a, row in enumerate(shares(y)):
        for b, column in enumerate(columns):
            total = total + _times(mask * row * column, _entries(groups, a, b))
    return total


def _to_points(groups: int, y: Array, x: Array, mask: Array, g: Array) -> tuple[Array, ...]:
    """Return the gradients for y, x and mask of those for the weights, f[B,H,W,49*G]."""
    to_y, to_x, to_mask = (jnp.zeros_like(mask) for _ in range(3))
    down, right, dy, dx = shares(y), shares(x), slopes(y), slopes(x)
    for a, b in ((a, b) for a in range(len(NEAR)) for b in range(len(NEAR))):
        back = _times(g, _entries(groups, a, b).T)
        to_mask = to_mask + down[a] * right[b] * back
        to_y = to_y + mask * dy[a] * right[b] * back
        to_x = to_x + mask * down[a] * dx[b] * back
    return to_y, to_x, to_mask


def _padded(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (HALF, HALF), (HALF, HALF), (0, 0)))


def _at(x: Array, row: int, column: int) -> Array:
    height, width = x.shape[1] - 2 * HALF, x.shape[2] - 2 * HALF
    return x[:, row : row + height, column : column + width]


def forward(geometry: Geometry, value: Array, offsets: Array, mask: Array) -> tuple[Array, Array]:
    """Compute what the points inside of windows add: f[B,H,W,C]; and whether others are left."""
    points, near = _near(geometry, offsets, mask)
    weights, channels = _weights(geometry.groups, *points).astype(value.dtype), value.shape[3]
    total, padded = jnp.zeros(value.shape, points[0].dtype), _padded(value)
    for n, at in enumerate(shifts()):
        repeated = _times(weights, _channels(geometry.groups, channels, n))
        total = total + repeated * widened(_at(padded, *at))[0]
    return total, ~near.all()


def backward(
    geometry: Geometry, value: Array, offsets: Array, mask: Array, g: Array
) -> tuple[tuple[Array, ...], Array]:
    """Compute their part of the gradients for value, offsets and mask; whether others are left."""
    points, near = _near(geometry, offsets, mask)
    groups, channels = geometry.groups, value.shape[3]
    weights = _weights(groups, *points).astype(value.dtype)
    to_value, to_weights = jnp.zeros(value.shape, points[0].dtype), jnp.zeros_like(weights)
    (wide,), padded = widened(g), _padded(value)
    for n, (row, column) in enumerate(shifts()):
        ones = _channels(groups, channels, n)
        to_repeated = (_at(padded, row, column) * g).astype(value.dtype)
        to_weights = to_weights + _times(to_repeated, ones.T)
        pulled = _padded(_times(weights, ones) * wide)
        to_value = to_value + _at(pulled, WIDE - 1 - row, WIDE - 1 - column)
    y, x, m = _to_points(groups, *points, widened(to_weights)[0])
    to_offsets = jnp.stack([geometry.scale * x, geometry.scale * y], -1).reshape(offsets.shape)
    return (to_value, to_offsets, jnp.where(near, m, 0)), ~near.all()
