"""Samples without gathers inside windows, and with gathers for the points outside them.

A window holds the pixels that the nine points of a pixel touch if no offset reaches two pixels. The
output is then a sum of 49 shifted maps, each weighted by all points of its pixel.
"""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrobust.models.kernels import tpu
from jaxrobust.models.kernels.deformable import corners
from jaxrobust.models.kernels.deformable.places import POINTS, REACH, SIDE, GridGeometry, reached
from jaxrobust.models.kernels.primitives import largest_divisor, takes_xla, widened

Array = jax.Array
WIDE = SIDE + 2 * REACH  # side of a window
HALF = WIDE // 2
NEAR = range(-REACH, REACH + 1)  # the neighbours of a grid point in the window, along an axis


def share(offset: Array, near: Any) -> Array:
    """Return the bilinear weight of a grid point's neighbour along one axis."""
    return jnp.maximum(0, 1 - jnp.abs(offset - near))


def slope(offset: Array, near: Any) -> Array:
    """Return its derivative; at integers, the one to the right, as in the reference."""
    at = jnp.floor(offset)
    one = jnp.ones_like(offset)
    return jnp.where(at == near, -one, jnp.where(at == near - 1, one, 0))


def shares(offset: Array) -> list[Array]:
    """Return the weights of all neighbours."""
    return [share(offset, near) for near in NEAR]


def slopes(offset: Array) -> list[Array]:
    """Return their derivatives."""
    return [slope(offset, near) for near in NEAR]


def shifts() -> list[tuple[int, int]]:
    """List the row and column of each window entry; the first is (0, 0)."""
    return [(row, column) for row in range(WIDE) for column in range(WIDE)]


def entry_weights(y: Any, x: Any, mask: Any) -> list[Array]:
    """Return the weight of each window entry, from offsets and masks of the nine points."""
    total: dict[tuple[int, int], Array] = {}
    for point in range(POINTS):
        kx, ky = divmod(point, SIDE)
        columns = shares(x[point])
        for a, row in enumerate(shares(y[point])):
            for b, column in enumerate(columns):
                weight, at = mask[point] * row * column, (ky + a, kx + b)
                total[at] = total[at] + weight if at in total else weight
    return [total[at] for at in shifts()]


class Bounded:
    """A module's formulas for windows, and gathers for points outside them.

    Images are processed a few at a time, `formulas.TOGETHER` pixels, so intermediate results stay
    in the cores' memory, and gathers compute and hold samples of these images only.
    """

    def __init__(self, formulas: ModuleType) -> None:
        self.formulas = formulas

    def forward(self, geometry: GridGeometry, *operands: Array) -> Array:
        """Compute f[B,H,W,C] from value, offsets and mask."""
        return self.run("forward", geometry, *operands)

    def backward(self, geometry: GridGeometry, *operands: Array) -> tuple[Array, Array, Array]:
        """Compute the gradients for value, offsets and mask, from these and that of the result."""
        return self.run("backward", geometry, *operands)

    def run(self, part: str, geometry: GridGeometry, *operands: Array) -> Any:
        """Compute `part`, a few images at a time."""

        def some(*operands: Array) -> Any:
            totals, beyond = getattr(self.formulas, part)(geometry, *operands)
            return with_beyond(part, geometry, beyond, totals, *operands)

        return self.by_images(some, *operands)

    def by_images(self, formula: Callable, value: Array, *more: Any) -> Any:
        """Apply a formula of f[B,...] to a few images at a time."""
        batch, most = value.shape[0], self.formulas.TOGETHER // math.prod(value.shape[1:3])
        many = largest_divisor(batch, max(most, 1))
        split = lambda a: a.reshape(-1, many, *a.shape[1:])  # noqa: E731
        outs = lax.map(lambda part: formula(*part), jax.tree.map(split, (value, *more)))
        return jax.tree.map(lambda a: a.reshape(batch, *a.shape[2:]), outs)


class OnTpu(Bounded):
    """A kernel for all images at once; images that it does not support take the formulas."""

    def run(self, part: str, geometry: GridGeometry, *operands: Array) -> Any:
        """Compute `part`; images with points outside windows, if any, take gathers as well."""
        kernels = tpu.deformable_windows
        if takes_xla("a deformable convolution", kernels.refused(geometry, *operands[:3])):
            return super().run(part, geometry, *operands)
        totals = getattr(kernels, part)(*operands, geometry=geometry)

        def some(value: Array, totals: Any, *others: Array) -> Any:
            beyond = _beyond(geometry, others[0])
            return with_beyond(part, geometry, beyond, totals, value, *others)

        value, *others = operands
        every = lambda t: self.by_images(some, value, t, *others)  # noqa: E731
        return lax.cond(_beyond(geometry, others[0]), every, lambda t: t, totals)


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
