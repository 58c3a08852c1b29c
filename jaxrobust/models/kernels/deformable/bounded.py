"""Samples by a TPU's kernel inside windows, and by gathers for the points outside them.

A window holds the pixels that the nine points of a pixel touch if no offset reaches two pixels. The
output is then a sum of 49 shifted maps, each weighted by all points of its pixel.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrobust.models.kernels import tpu
from jaxrobust.models.kernels.deformable import corners
from jaxrobust.models.kernels.deformable.places import POINTS, REACH, SIDE, GridGeometry, reached
from jaxrobust.models.kernels.primitives import takes_xla, widened

Array = jax.Array
WIDE = SIDE + 2 * REACH  # side of a window
HALF = WIDE // 2
NEAR = range(-REACH, REACH + 1)  # the neighbors of a grid point in the window, along an axis


def entry_weights(y: Any, x: Any, mask: Any) -> list[Array]:
    """Return the weight of each window entry, from offsets and masks of the nine points."""
    total: dict[tuple[int, int], Array] = {}
    for point in range(POINTS):
        kx, ky = divmod(point, SIDE)
        columns = _shares(x[point])
        for a, row in enumerate(_shares(y[point])):
            for b, column in enumerate(columns):
                weight, at = mask[point] * row * column, (ky + a, kx + b)
                total[at] = total[at] + weight if at in total else weight
    return [total[row, column] for row in range(WIDE) for column in range(WIDE)]


def _shares(offset: Array) -> list[Array]:
    """Return the bilinear weights of a grid point's neighbors along one axis."""
    return [jnp.maximum(0, 1 - jnp.abs(offset - near)) for near in NEAR]


def forward(geometry: GridGeometry, *operands: Array) -> Array:
    """Compute f[B,H,W,C] from value, offsets and mask."""
    return _run("forward", geometry, *operands)


def backward(geometry: GridGeometry, *operands: Array) -> tuple[Array, Array, Array]:
    """Compute the gradients for value, offsets and mask, from these and that of the result."""
    return _run("backward", geometry, *operands)


def _run(part: str, geometry: GridGeometry, *operands: Array) -> Any:
    kernels = tpu.deformable_windows
    if takes_xla("a deformable convolution", kernels.refused(geometry, *operands[:3])):
        return getattr(corners, part)(geometry, *operands)
    totals = getattr(kernels, part)(*operands, geometry=geometry)

    def one_image(arrays: Any) -> Any:
        operands, totals = jax.tree.map(lambda a: a[None], arrays)
        beyond = _beyond(geometry, operands[1])
        totals = with_beyond(part, geometry, beyond, totals, *operands)
        return jax.tree.map(lambda a: a[0], totals)

    images = lambda totals: lax.map(one_image, (operands, totals))  # noqa: E731
    return lax.cond(_beyond(geometry, operands[1]), images, lambda totals: totals, totals)


def with_beyond(
    part: str, geometry: GridGeometry, beyond: Array, totals: Any, *operands: Array
) -> Any:
    """Add what points outside windows contribute."""

    def add(totals: Any) -> Any:
        more = getattr(corners, f"{part}_beyond")(geometry, *operands)
        return jax.tree.map(lambda t, m: t + m.astype(t.dtype), totals, more)

    return lax.cond(beyond, add, lambda totals: totals, totals)


def _beyond(geometry: GridGeometry, offsets: Array) -> Array:
    """Return whether windows do not reach all points."""
    grid = np.stack(divmod(np.arange(POINTS), SIDE), -1).ravel() - 1
    around = geometry.scale * widened(offsets)[0]
    moved = (geometry.scale - 1) * jnp.asarray(np.tile(grid, geometry.groups), around.dtype)
    around += moved[None, None, None]
    return ~reached(around, around).all()
