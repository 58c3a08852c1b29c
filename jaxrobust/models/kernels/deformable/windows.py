"""Sampling without gathers inside of windows, and by gathers for the points outside of them.

A window holds the pixels that the nine points of a pixel touch where no offset reaches two pixels:
the output is then a sum of 49 shifted maps, each times a weight that all points of its pixel make.

Rows of pixels lie side by side, so that every loop runs along 224 neighbours on CPUs: channels
stand before pixels and groups behind them, f[B,H,D,W,G], and the weights of a window's 49 entries
in planes of their own. Of 8x56x56x64, processor ms of value and gradients on two loaded cores: 32
and 88, PyTorch's grid_sample 110 and 149. With channels last the gradients of half as many images
took 220.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.models.kernels.deformable import gathers
from jaxrobust.models.kernels.deformable.gathers import (
    POINTS,
    REACH,
    SIDE,
    GridGeometry,
    GridPoints,
)
from jaxrobust.models.kernels.primitives import largest_divisor, walled, widened

Array = jax.Array
WIDE = SIDE + 2 * REACH  # the side of a window
HALF = WIDE // 2
NEAR = range(-REACH, REACH + 1)  # the neighbours of a grid point in the window, along an axis
SHIFTS = [(row, column) for row in range(WIDE) for column in range(WIDE)]  # of a window's entries
# Pixels of the images that are computed together, one image at least, so that what lies between
# stays in the memory of the cores: of 8x56x56x64 the value takes 33 processor ms instead of 83,
# gradients 86 instead of 118.
TOGETHER = 1


def _shares(offset: Array) -> list[Array]:
    """Return the bilinear weights, along one axis, of the neighbours of a grid point."""
    return [jnp.maximum(0, 1 - jnp.abs(offset - near)) for near in NEAR]


def _slopes(offset: Array) -> list[Array]:
    """Return their derivatives; at whole numbers those to the right, as the reference's."""
    at, one = jnp.floor(offset), jnp.ones_like(offset)
    return [jnp.where(at == near, -one, jnp.where(at == near - 1, one, 0)) for near in NEAR]


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
    """Return points, zero where no window reaches them, and where one does."""
    near = gathers.reached(y, x)
    return *(jnp.where(near, a, 0) for a in (y, x, mask)), near


def _near(geometry: GridGeometry, offsets: Array, mask: Array) -> tuple[GridPoints, Array]:
    points = gathers.points_of(offsets, mask, groups=geometry.groups)
    *inside, near = _inside(*geometry.from_grid(points))
    return GridPoints(*inside), near


@walled
def _weights(y: Array, x: Array, mask: Array) -> Array:
    """Return the weight of each entry of a window, f[49,B,H,W,G]."""
    total: dict[tuple[int, int], Array] = {}
    for point in range(POINTS):
        kx, ky = divmod(point, SIDE)
        columns = _shares(x[point])
        for a, row in enumerate(_shares(y[point])):
            for b, column in enumerate(columns):
                weight, at = mask[point] * row * column, (ky + a, kx + b)
                total[at] = total[at] + weight if at in total else weight
    return jnp.stack([total[at] for at in SHIFTS])


@walled
def _to_points(y: Array, x: Array, mask: Array, to_weights: Array) -> tuple[Array, ...]:
    """Return the gradients for y, x and mask, f[9,B,H,W,G]."""
    rows = []
    for point in range(POINTS):
        kx, ky = divmod(point, SIDE)
        (down, right), (dy, dx) = ([f(y[point]), f(x[point])] for f in (_shares, _slopes))
        # Sums over the window's rows, of each of its columns.
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
    """Return the pixels that an entry of the window meets, of padded parts."""
    height, width = parts.shape[1] - 2 * HALF, parts.shape[3] - 2 * HALF
    return parts[:, row : row + height, :, column : column + width]


@walled
def _summed(parts: Array, weights: Array) -> Array:
    parts = _padded(parts)
    weights = weights[:, :, :, None]
    products = (weights[n] * _at(parts, *at) for n, at in enumerate(SHIFTS))
    return functools.reduce(jnp.add, products)


@walled
def _to_value(g: Array, weights: Array) -> Array:
    """Return the gradient for the parts: each pixel's from all windows that hold it."""
    g, total = _padded(g), jnp.zeros((), g.dtype)
    weights = jnp.pad(weights, ((0, 0), (0, 0), (HALF, HALF), (HALF, HALF), (0, 0)))
    for n, (row, column) in enumerate(SHIFTS):
        at = WIDE - 1 - row, WIDE - 1 - column
        total = total + _at(weights[n][:, :, None], *at) * _at(g, *at)
    return total


@walled
def _to_weights(parts: Array, g: Array) -> Array:
    """Return the gradients for the weights: products of `g` with each shift, summed over D.

    Sixteen terms written out, in a loop over the 49 shifts: `sum(2)` takes five times as long.
    """
    padded, (batch, height, channels, width, groups) = _padded(parts), parts.shape

    def fill(n: Array, sums: Array) -> Array:
        met = lax.dynamic_slice(padded, (0, n // WIDE, 0, n % WIDE, 0), parts.shape)
        product = functools.reduce(jnp.add, (g[:, :, d] * met[:, :, d] for d in range(channels)))
        return lax.dynamic_update_index_in_dim(sums, product, n, 0)

    zeros = jnp.zeros((WIDE * WIDE, batch, height, width, groups), parts.dtype)
    return lax.fori_loop(0, WIDE * WIDE, fill, zeros)


def _by_images(formula: Callable, value: Array, *more: Array) -> Any:
    """Compute a formula of f[B,...] for a few images at a time."""
    batch, most = value.shape[0], TOGETHER // math.prod(value.shape[1:3])
    count = largest_divisor(batch, max(most, 1))
    parts = [a.reshape(-1, count, *a.shape[1:]) for a in (value, *more)]
    outs = lax.map(lambda part: formula(*part), parts)
    return jax.tree.map(lambda a: a.reshape(batch, *a.shape[2:]), outs)


def forward(geometry: GridGeometry, value: Array, offsets: Array, mask: Array) -> Array:
    """Compute f[B,H,W,C]."""

    def of_images(value, offsets, mask):
        points, near = _near(geometry, offsets, mask)
        total = _joined(_summed(_split(value, groups=geometry.groups), _weights(*points)))

        def with_others(total):
            return total + gathers.forward_beyond(geometry, value, offsets, mask)

        return lax.cond(~near.all(), with_others, lambda total: total, total)

    return _by_images(of_images, value, offsets, mask)


def backward(
    geometry: GridGeometry, value: Array, offsets: Array, mask: Array, g: Array
) -> tuple[Array, Array, Array]:
    """Compute the gradients for value, offsets and mask."""

    def of_images(value, offsets, mask, g):
        points, near = _near(geometry, offsets, mask)
        parts, to_parts = (_split(a, groups=geometry.groups) for a in (value, g))
        to_value = _joined(_to_value(to_parts, _weights(*points)))
        y, x, to_mask = _to_points(*points, _to_weights(parts, to_parts))
        to_points = GridPoints(y, x, jnp.where(near, to_mask, 0))
        totals = to_value, *gathers.to_offsets(geometry, to_points)

        def with_others(totals):
            others = gathers.backward_beyond(geometry, value, offsets, mask, g)
            return jax.tree.map(jnp.add, totals, others)

        return lax.cond(~near.all(), with_others, lambda totals: totals, totals)

    return _by_images(of_images, value, offsets, mask, g)
