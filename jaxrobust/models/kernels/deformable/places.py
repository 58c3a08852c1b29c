"""Where the nine points of a pixel are, and their coordinates."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrobust.models.kernels.primitives import per_platform, widened

Array = jax.Array
SIDE = 3  # of the grid
POINTS = SIDE * SIDE
REACH = 2  # offsets in [-2, 2) pixels are inside the windows of `bounded`


class GridPoints(NamedTuple):
    """Per point, f[9,B,H,W,G]: a row and a column, or offsets from them, and a weight."""

    y: Array
    x: Array
    mask: Array


@per_platform
def points_of(offsets: Array, mask: Array, *, groups: int) -> GridPoints:
    """Convert f[B,H,W,G*18] and f[B,H,W,G*9] to points f32[9,B,H,W,G].

    Each point's column offset comes first.
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
    """Return whether windows reach the offsets from the grid; NaN is outside."""
    return (y >= -REACH) & (y < REACH) & (x >= -REACH) & (x < REACH)


class GridGeometry(NamedTuple):
    """What determines the points' places apart from their offsets."""

    size: tuple[int, ...]  # of the map, height and width
    groups: int
    scale: float = 1.0  # of grid and offsets
    stride: int = 1
    padding: int = 1
    dilation: int = 1

    @property
    def is_plain(self) -> bool:
        """Return whether points surround the pixel of their output."""
        return (self.stride, self.padding, self.dilation) == (1, 1, 1)

    @property
    def out(self) -> tuple[int, ...]:
        """Return the height and width of the output."""
        reach = self.dilation * (SIDE - 1)
        return tuple((n + 2 * self.padding - reach - 1) // self.stride + 1 for n in self.size)

    def from_grid(self, points: GridPoints) -> GridPoints:
        """Convert offsets to offsets from the grid of direct neighbors, in pixels."""
        return self._moved(points, 1)

    def on_map(self, points: GridPoints) -> GridPoints:
        """Convert offsets to rows and columns of the map."""
        around = self._moved(points, 0)
        first = self.dilation - self.padding
        rows, columns = (
            first + self.stride * jnp.arange(n, dtype=points.y.dtype) for n in self.out
        )
        return GridPoints(
            around.y + rows[None, None, :, None, None],
            around.x + columns[None, None, None, :, None],
            points.mask,
        )

    def _moved(self, points: GridPoints, less: int) -> GridPoints:
        """Scale grid and offsets, subtracting `less` times the grid of direct neighbors."""
        grid = jnp.arange(-1, SIDE - 1, dtype=points.y.dtype)
        shape = (POINTS,) + (1,) * (points.y.ndim - 1)
        kx, ky = (k.reshape(shape) for k in (jnp.repeat(grid, SIDE), jnp.tile(grid, SIDE)))
        much = self.scale * self.dilation - less
        return GridPoints(
            self.scale * points.y + much * ky, self.scale * points.x + much * kx, points.mask
        )
