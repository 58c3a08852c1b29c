"""Sampling by gathers: four rows of values for each place, whatever its offset."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.models.kernels.primitives import per_platform, widened

Array = jax.Array
SIDE = 3  # of the grid
POINTS = SIDE * SIDE
_PARTS = 16  # of all points, the size in which those beyond windows are sampled
REACH = 2  # pixels: offsets from -2 to below 2 lie inside the windows of `windows`


class GridPoints(NamedTuple):
    """Of each point, f[9,B,H,W,G]: a row and a column, or offsets from them, and a weight."""

    y: Array
    x: Array
    mask: Array


@per_platform
def points_of(offsets: Array, mask: Array, *, groups: int) -> GridPoints:
    """Return the points f32[9,B,H,W,G] of f[B,H,W,G*18] and f[B,H,W,G*9].

    Of a point the column's offset comes first.
    """
    shape = (*mask.shape[:3], groups, POINTS)
    xy = jnp.moveaxis(widened(offsets)[0].reshape(*shape, 2), (5, 4), (0, 1))
    return GridPoints(xy[1], xy[0], jnp.moveaxis(widened(mask)[0].reshape(shape), 4, 0))


@per_platform
def as_given(y: Array, x: Array, mask: Array) -> tuple[Array, Array]:
    """Undo `points_of`, for gradients: f[B,H,W,G*18] and f[B,H,W,G*9]."""
    offsets = jnp.moveaxis(jnp.stack([x, y]), (0, 1), (5, 4))
    shape = (*mask.shape[1:4], -1)
    return offsets.reshape(shape), jnp.moveaxis(mask, 0, 4).reshape(shape)


def reached(y: Array, x: Array) -> Array:
    """Tell the offsets from the grid that windows reach; NaN lies outside."""
    return (y >= -REACH) & (y < REACH) & (x >= -REACH) & (x < REACH)


class GridGeometry(NamedTuple):
    """The grid that offsets are added to."""

    size: tuple[int, ...]  # of the map, height and width
    groups: int
    scale: float = 1.0  # of grid and offsets
    stride: int = 1
    padding: int = 1
    dilation: int = 1

    @property
    def is_plain(self) -> bool:
        """Whether points surround the pixel of their output."""
        return (self.stride, self.padding, self.dilation) == (1, 1, 1)

    @property
    def out(self) -> tuple[int, ...]:
        """The height and width of the output."""
        reach = self.dilation * (SIDE - 1)
        return tuple((n + 2 * self.padding - reach - 1) // self.stride + 1 for n in self.size)

    def from_grid(self, points: GridPoints) -> GridPoints:
        """Turn offsets into those from the grid of direct neighbours, in pixels."""
        return self._moved(points, 1)

    def on_map(self, points: GridPoints) -> GridPoints:
        """Turn offsets into rows and columns of the map."""
        y, x, mask = self._moved(points, 0)
        start = self.dilation - self.padding
        rows, columns = (start + self.stride * jnp.arange(n, dtype=y.dtype) for n in self.out)
        y = y + rows[None, None, :, None, None]
        return GridPoints(y, x + columns[None, None, None, :, None], mask)

    def _moved(self, points: GridPoints, less: int) -> GridPoints:
        """Scale grid and offsets, `less` times the grid of direct neighbours."""
        grid = jnp.arange(-1, SIDE - 1, dtype=points.y.dtype)
        shape = (POINTS,) + (1,) * (points.y.ndim - 1)
        kx, ky = (k.reshape(shape) for k in (jnp.repeat(grid, SIDE), jnp.tile(grid, SIDE)))
        step = self.scale * self.dilation - less
        return GridPoints(
            self.scale * points.y + step * ky, self.scale * points.x + step * kx, points.mask
        )


def _bases(geometry: GridGeometry, cells: Array) -> Array:
    """Return the row of values of the first pixel of each cell's image and group, i32."""
    (height, width), (rows, columns), groups = geometry.size, geometry.out, geometry.groups
    images = cells // (rows * columns * groups)
    return images * (height * width * groups) + cells % groups


def _sampled(geometry: GridGeometry, values: Array, bases: Array, places: GridPoints) -> Array:
    """Sample `values` f[B*H*W*G,D] bilinearly and weigh the samples: f[..,D] for places f[..]."""
    (height, width), groups = geometry.size, geometry.groups
    y, x, mask = places
    mask = jnp.where(jnp.isfinite(y + x), mask, jnp.nan)  # the output shows NaN and infinity
    top, left = jnp.floor(y), jnp.floor(x)
    down, right, total = y - top, x - left, jnp.zeros((*y.shape, values.shape[1]), values.dtype)
    for row, of_row in ((top, 1 - down), (top + 1, down)):
        for column, of_column in ((left, 1 - right), (left + 1, right)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            at = jnp.where(inside, row * width + column, 0).astype(jnp.int32)
            weight = mask * jnp.where(inside, of_row * of_column, 0)
            corner = values.at[bases + groups * at].get(mode="promise_in_bounds")
            total = total + weight[..., None] * corner
    return total


def _prepared(geometry: GridGeometry, value: Array) -> tuple[Array, Array]:
    """Return values as rows f[B*H*W*G,D], and the bases of all cells i32[B,H',W',G]."""
    shape = (value.shape[0], *geometry.out, geometry.groups)
    cells = jnp.arange(shape[0] * shape[1] * shape[2] * shape[3], dtype=jnp.int32)
    values = widened(value)[0].reshape(-1, value.shape[3] // geometry.groups)
    return values, _bases(geometry, cells).reshape(shape)


def forward(geometry: GridGeometry, value: Array, offsets: Array, mask: Array) -> Array:
    """Compute f[B,H',W',C], one point of all pixels after the other."""
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
    """Compute the gradients for value, offsets and mask, in the same order of points."""
    values, bases = _prepared(geometry, value)
    wide = widened(g)[0].reshape(*bases.shape, -1)

    def add(total: Array, places: GridPoints) -> tuple[Array, GridPoints]:
        def sampled(values, places):
            return _sampled(geometry, values, bases, places)

        to_values, to_places = jax.vjp(sampled, values, places)[1](wide)
        return total + to_values, to_places

    points = points_of(offsets, mask, groups=geometry.groups)
    total, places = lax.scan(add, jnp.zeros_like(values), geometry.on_map(points))
    return total.reshape(value.shape), *to_offsets(geometry, places)


def to_offsets(geometry: GridGeometry, places: GridPoints) -> tuple[Array, Array]:
    """Turn gradients for places into those for offsets and mask."""
    return as_given(geometry.scale * places.y, geometry.scale * places.x, places.mask)


# --------------------------------------------------------------- points that windows do not reach


def _beyond(geometry: GridGeometry, points: GridPoints) -> tuple[Any, Array]:
    """Return a function that sums a part of these points, and the number of parts."""
    around = geometry.from_grid(points)
    chosen = ~reached(around.y, around.x)
    shape, size = chosen.shape[1:], chosen.size
    cells, each = size // POINTS, -(-size // _PARTS)
    numbers = jnp.nonzero(chosen.ravel(), size=each * _PARTS, fill_value=size)[0]
    numbers = numbers.astype(jnp.int32)

    def added(part: Array, values: Array, places: GridPoints) -> Array:
        at = lax.dynamic_slice_in_dim(numbers, part * each, each)
        some = GridPoints(*(a.ravel().at[at].get(mode="fill", fill_value=0) for a in places))
        sampled = _sampled(geometry, values, _bases(geometry, at % cells), some)
        zeros = jnp.zeros((cells, values.shape[1]), values.dtype)
        return zeros.at[at % cells].add(sampled).reshape(*shape, -1)

    return added, (chosen.sum() + each - 1) // each


def forward_beyond(geometry: GridGeometry, value: Array, offsets: Array, mask: Array) -> Array:
    """Compute what the points that windows do not reach add to `forward`."""
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
    """Compute what they add to `backward`."""
    points = points_of(offsets, mask, groups=geometry.groups)
    added, parts = _beyond(geometry, points)
    values, bases = _prepared(geometry, value)
    places, wide = geometry.on_map(points), widened(g)[0].reshape(*bases.shape, -1)

    def add(part: Array, totals: tuple[Array, GridPoints]) -> tuple[Array, GridPoints]:
        new = jax.vjp(functools.partial(added, part), values, places)[1](wide)
        return jax.tree.map(jnp.add, totals, new)

    zeros = jax.tree.map(jnp.zeros_like, (values, places))
    total, to_places = lax.fori_loop(0, parts, add, zeros)
    return total.reshape(value.shape), *to_offsets(geometry, to_places)
