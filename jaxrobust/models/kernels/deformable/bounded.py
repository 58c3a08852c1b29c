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
from jax import lax

from jaxrobust.models.kernels.deformable import corners
from jaxrobust.models.kernels.deformable.places import REACH, SIDE, GridGeometry
from jaxrobust.models.kernels.primitives import largest_divisor

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


class Bounded:
    """A module's formulas for windows, and gathers for points outside them.

    Images are processed a few at a time, `formulas.TOGETHER` pixels, so intermediate results stay
    in the cores' memory, and gathers compute and hold samples of these images only.
    """

    def __init__(self, formulas: ModuleType) -> None:
        self.formulas = formulas

    def forward(self, geometry: GridGeometry, value: Array, offsets: Array, mask: Array) -> Array:
        """Compute f[B,H,W,C]."""

        def some(*operands: Array) -> Array:
            total, beyond = self.formulas.forward(geometry, *operands)
            with_beyond = lambda t: t + corners.forward_beyond(geometry, *operands)  # noqa: E731
            return lax.cond(beyond, with_beyond, lambda t: t, total)

        return self.by_images(some, value, offsets, mask)

    def backward(
        self, geometry: GridGeometry, value: Array, offsets: Array, mask: Array, g: Array
    ) -> tuple[Array, Array, Array]:
        """Compute the gradients for value, offsets and mask."""

        def some(*operands: Array) -> tuple[Array, Array, Array]:
            totals, beyond = self.formulas.backward(geometry, *operands)
            with_beyond = lambda t: jax.tree.map(  # noqa: E731
                jnp.add, t, corners.backward_beyond(geometry, *operands)
            )
            return lax.cond(beyond, with_beyond, lambda t: t, totals)

        return self.by_images(some, value, offsets, mask, g)

    def by_images(self, formula: Callable, value: Array, *more: Array) -> Any:
        """Apply a formula of f[B,...] to a few images at a time."""
        batch, most = value.shape[0], self.formulas.TOGETHER // math.prod(value.shape[1:3])
        many = largest_divisor(batch, max(most, 1))
        parts = [a.reshape(-1, many, *a.shape[1:]) for a in (value, *more)]
        outs = lax.map(lambda part: formula(*part), parts)
        return jax.tree.map(lambda a: a.reshape(batch, *a.shape[2:]), outs)
