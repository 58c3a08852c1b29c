"""Samples with gathers: four rows of values per place, for any offset."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.models.kernels.deformable.places import (
    POINTS,
    GridGeometry,
    GridPoints,
    as_given,
    points_of,
    reached,
)
from jaxrobust.models.kernels.primitives import widened

Array = jax.Array
_PARTS = 16  # of all points: how many of those beyond windows are sampled at once


def _bases(geometry: GridGeometry, cells: Array) -> Array:
    """Return the row index of the first pixel of each cell's image and group, i32."""
    (height, width), (rows, columns), groups = geometry.size, geometry.out, geometry.groups
    images = cells // (rows * columns * groups)
    return images * (height * width * groups) + cells % groups


def _sampled(geometry: GridGeometry, values: Array, bases: Array, places: GridPoints) -> Array:
    """Sample `values` f[B*H*W*G,D] bilinearly and weight the samples: f[..,D] for places f[..]."""
    (height, width), groups = geometry.size, geometry.groups
    y, x, mask = places
    mask = jnp.where(jnp.isfinite(y + x), mask, jnp.nan)  # an invalid place shows up in the output
    north, west = jnp.floor(y), jnp.floor(x)
    down, right, total = y - north, x - west, jnp.zeros((*y.shape, values.shape[1]), values.dtype)
    for row, of_row in ((north, 1 - down), (north + 1, down)):
        for column, of_column in ((west, 1 - right), (west + 1, right)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            at = jnp.where(inside, row * width + column, 0).astype(jnp.int32)
            weight = mask * jnp.where(inside, of_row * of_column, 0)
            pixels = values.at[bases + groups * at].get(mode="promise_in_bounds")
            total = total + weight[..., None] * pixels
    return total


def _prepared(geometry: GridGeometry, value: Array) -> tuple[Array, Array]:
    """Return values as rows f[B*H*W*G,D], and the base rows of all cells i32[B,H',W',G]."""
    shape = (value.shape[0], *geometry.out, geometry.groups)
    cells = jnp.arange(shape[0] * shape[1] * shape[2] * shape[3], dtype=jnp.int32)
    values = widened(value)[0].reshape(-1, value.shape[3] // geometry.groups)
    return values, _bases(geometry, cells).reshape(shape)


def forward(geometry: GridGeometry, value: Array, offsets: Array, mask: Array) -> Array:
    """Compute f[B,H',W',C], processing one of the nine points at a time."""
    values, bases = _prepared(geometry, value)

    def add(total: Array, places: GridPoints) -> tuple[Array, None]:
        return total + _sampled(geometry, values, bases, places), None

    zeros = jnp.zeros((*bases.shape, values.shape[1]), values.dtype)
    points = points_of(offsets, mask, groups=geometry.groups)
    total, _ = lax.scan(add, zeros, geometry.on_map(points))
    return total.reshape(len(value), *geometry.out, -1)


def backward(
    geometry: GridGeometry, value: Array, offsets: Array, mask: Array, g: Array
) -> tuple[Array, Array, Array]:
    """Compute the gradients for value, offsets and mask, with the points in the same order."""
    values, bases = _prepared(geometry, value)
    wide = widened(g)[0].reshape(*bases.shape, -1)

    def add(total: Array, places: GridPoints) -> tuple[Array, GridPoints]:
        sampled = lambda *operands: _sampled(geometry, operands[0], bases, operands[1])  # noqa: E731
        to_values, to_places = jax.vjp(sampled, values, places)[1](wide)
        return total + to_values, to_places

    points = points_of(offsets, mask, groups=geometry.groups)
    total, places = lax.scan(add, jnp.zeros_like(values), geometry.on_map(points))
    return total.reshape(value.shape), *_scaled(geometry, places)


def _scaled(geometry: GridGeometry, places: GridPoints) -> tuple[Array, Array]:
    """Convert gradients for places into gradients for offsets and mask."""
    return as_given(geometry.scale * places.y, geometry.scale * places.x, places.mask)


# --------------------------------------------------------------------- of what windows do not reach


def _beyond(geometry: GridGeometry, points: GridPoints) -> tuple[Any, Array]:
    """Return a function of (part, values, places) that sums these points, a part at a time; and
    the number of parts.
    """
    around = geometry.from_grid(points)
    chosen = ~reached(around.y, around.x)
    shape, size = chosen.shape[1:], chosen.size
    cells, part_size = size // POINTS, -(-size // _PARTS)
    numbers = jnp.nonzero(chosen.ravel(), size=part_size * _PARTS, fill_value=size)[0]
    numbers = numbers.astype(jnp.int32)

    def added(part: Array, values: Array, places: GridPoints) -> Array:
        at = lax.dynamic_slice_in_dim(numbers, part * part_size, part_size)
        some = GridPoints(*(a.ravel().at[at].get(mode="fill", fill_value=0) for a in places))
        sampled = _sampled(geometry, values, _bases(geometry, at % cells), some)
        zeros = jnp.zeros((cells, values.shape[1]), values.dtype)
        return zeros.at[at % cells].add(sampled).reshape(*shape, -1)

    return added, (chosen.sum() + part_size - 1) // part_size


def forward_beyond(geometry: GridGeometry, value: Array, offsets: Array, mask: Array) -> Array:
    """Compute what points beyond the windows add to `forward`."""
    points = points_of(offsets, mask, groups=geometry.groups)
    added, parts = _beyond(geometry, points)
    values, bases = _prepared(geometry, value)
    places = geometry.on_map(points)
    zeros = jnp.zeros((*bases.shape, values.shape[1]), values.dtype)
    total = lax.fori_loop(0, parts, lambda n, t: t + added(n, values, places), zeros)
    return total.reshape(value.shape)


def backward_beyond(
    geometry: GridGeometry, value: Array, offsets: Array, mask: Array, g: Array
) -> tuple[Array, Array, Array]:
    """Compute what points beyond the windows add to `backward`."""
    points = points_of(offsets, mask, groups=geometry.groups)
    added, parts = _beyond(geometry, points)
    values, bases = _prepared(geometry, value)
    places, wide = geometry.on_map(points), widened(g)[0].reshape(*bases.shape, -1)

    def add(part: Array, totals: tuple[Array, GridPoints]) -> tuple[Array, GridPoints]:
        new = jax.vjp(lambda *operands: added(part, *operands), values, places)[1](wide)
        return jax.tree.map(jnp.add, totals, new)

    zeros = jax.tree.map(jnp.zeros_like, (values, places))
    total, of_places = lax.fori_loop(0, parts, add, zeros)
    return total.reshape(value.shape), *_scaled(geometry, of_places)
