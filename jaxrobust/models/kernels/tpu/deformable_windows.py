"""DCNv3's sampling inside windows, and its gradients: columns of images in the lanes.

Columns of several images fill the 128 lanes of a row, and a group's channels are rows. The weights
of a window's 49 entries are rows as well, which loads repeat for all channels. A shift by rows is
an address, and the seven shifts by columns are copies of the values, rotated once.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrobust.models.kernels.deformable.bounded import HALF, NEAR, WIDE, entry_weights
from jaxrobust.models.kernels.deformable.places import POINTS, SIDE, GridGeometry, reached
from jaxrobust.models.kernels.primitives import largest_divisor, static_jit
from jaxrobust.models.kernels.tpu.calls import (
    LANES,
    SUBLANES,
    Kernel,
    elementwise,
    fast_memory,
    lane_groups,
    over_images,
    tiled,
    widened_to,
)

Array = jax.Array
_ENTRIES = WIDE * WIDE
_APART = widened_to(_ENTRIES, SUBLANES)  # rows from one cell's first entry to the next one's


class _Block:
    """The sizes of a block of images; a cell is a group of channels in a row of pixels."""

    def __init__(self, value: Any, geometry: GridGeometry) -> None:
        (self.height, self.width, self.channels), self.geometry = value.shape[1:], geometry
        self.depth = self.channels // geometry.groups
        self.cells = widened_to(self.height * geometry.groups, SUBLANES)
        self.pitch = widened_to(self.width, SUBLANES)  # lanes of an image
        self.rows = largest_divisor(self.height, 8)  # of pixels, computed together
        self.vectors, self.rim = self.height * self.channels, HALF * self.channels
        self.inside = pl.ds(self.rim, self.vectors)

    def scratch(self) -> list[tuple[int, ...]]:
        """List shapes: tiles, values, offsets, masks, weights, results; for gradients two more."""
        points, padded = self.cells * POINTS, self.vectors + 2 * self.rim
        lanes = widened_to(max(self.channels, 2 * POINTS * self.geometry.groups), LANES)
        products = self.rows * max(_ENTRIES * SUBLANES, WIDE * self.depth)
        counts = (2 * points, points, self.cells * _APART, self.vectors, padded, products)
        return [(8, LANES, lanes), (WIDE, padded, LANES), *((n, LANES) for n in counts)]

    def per(self, *images: Array) -> int:
        """Count the images that lanes and fast memory can hold at a time."""
        room = fast_memory() - sum(tiled(shape, 4) for shape in self.scratch())
        # Gradients are as large, and the next images arrive in the meantime.
        each = 4 * sum(tiled(i.shape[1:], i.dtype.itemsize) for i in images)
        most = min(room // each, LANES // self.pitch)
        return largest_divisor(len(images[0]), most) if most > 0 else 0

    def each_row(self, body: Callable[[Any, int], None]) -> None:
        @pl.loop(0, self.height, step=(together := 2 - self.height % 2))
        def some(row: Any) -> None:
            for n in range(together):
                body(row + n, n)

    def turn(self, tiles: Any, *moves: tuple[Any, Any]) -> None:
        """Turn images f[n,H,W,c] into rows of lanes; a pixel's channels follow each other."""
        tiles[...] = jnp.zeros_like(tiles)

        def turn_row(row: Any, n: int) -> None:
            for number, (images, out) in enumerate(moves):
                tile, channels = tiles.at[2 * number + n], images.shape[3]
                for i in range(len(images)):
                    columns = pl.ds(i * self.pitch, self.width)
                    tile[columns, :channels] = images[i, row].astype(jnp.float32)
                for lanes in lane_groups(channels):
                    start, count = lanes.start, lanes.stop - lanes.start
                    turned = tile[:, start : start + LANES].T[:count]
                    out[pl.ds(row * channels + start, count), :] = turned

        self.each_row(turn_row)

    def turn_back(self, vectors: Any, images: Any) -> None:
        """Undo `turn`."""
        channels = images.shape[3]

        def turn_row(row: Any, _: int) -> None:
            for lanes in lane_groups(channels):
                count = lanes.stop - lanes.start
                part = vectors[pl.ds(row * channels + lanes.start, count), :]
                part = jnp.pad(part, ((0, LANES - count), (0, 0))).T[:, :count]
                for i in range(len(images)):
                    columns = slice(i * self.pitch, i * self.pitch + self.width)
                    images[i, row, :, lanes] = part[columns].astype(images.dtype)

        self.each_row(turn_row)

    def moves(self) -> list[Callable[[Array], Array]]:
        """Return functions that move a register by the columns of each copy."""
        column = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1) % self.pitch

        def move(x: Array, by: int) -> Array:
            valid = (column + by >= 0) & (column + by < self.width)
            return jnp.where(valid, pltpu.roll(x, -by % LANES, 1), 0) if by else x

        return [functools.partial(move, by=copy - HALF) for copy in range(WIDE)]

    def clear_rim(self, vectors: Any) -> None:
        """Write zeros above and below the images."""
        for start in (0, self.rim + self.vectors):
            vectors[pl.ds(start, self.rim), :] = jnp.zeros((self.rim, LANES), jnp.float32)

    def copy(self, values: Any) -> None:
        """Fill the copies of the middle one."""
        moves, together = self.moves(), largest_divisor(self.vectors // SUBLANES, 16)
        for copy in range(WIDE):
            self.clear_rim(values.at[copy])

        @pl.loop(0, self.vectors, step=together * SUBLANES)
        def some(at: Any) -> None:
            for n in range(together):
                start = pl.multiple_of(self.rim + at + n * SUBLANES, SUBLANES)
                here = pl.ds(start, SUBLANES)
                middle = values[HALF, here, :]
                for copy, move in enumerate(moves):
                    if copy != HALF:
                        values[copy, here, :] = move(middle)

    def points(self, offsets: Any, mask: Any, at: Any) -> Iterator[tuple[Array, ...]]:
        """Yield y, x and mask of a register's cells, and which are near, for each point."""
        scale = self.geometry.scale
        for point, (x_of, y_of, m_of) in enumerate(self.places(at)):
            x, y = (
                scale * offsets[place, :] + (scale - 1) * (k - 1)
                for place, k in zip((x_of, y_of), divmod(point, SIDE), strict=True)
            )
            near = reached(y, x)
            yield *(jnp.where(near, a, 0) for a in (y, x, mask[m_of, :])), near

    def places(self, at: Any) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of a point's offsets, x and y, and mask, of a register's cells."""
        for point in range(POINTS):
            xy = (2 * POINTS * at + 2 * point + n for n in range(2))
            starts = (*((start, 2 * POINTS) for start in xy), (POINTS * at + point, POINTS))
            yield tuple(pl.ds(start, SUBLANES, stride=stride) for start, stride in starts)

    def weigh(self, offsets: Any, mask: Any, weights: Any) -> None:
        """Write each entry's weights for all cells."""

        @pl.loop(0, self.cells, step=SUBLANES)
        def some(at: Any) -> None:
            y, x, m, _ = zip(*self.points(offsets, mask, at), strict=True)
            for entry, weight in enumerate(entry_weights(y, x, m)):
                weights[pl.ds(entry * self.cells + at, SUBLANES), :] = weight

    def each_group(self, body: Callable[[Any, Any], None]) -> None:
        @pl.loop(0, self.height, step=self.rows)
        def some(row: Any) -> None:
            pl.loop(0, self.geometry.groups)(functools.partial(body, row))

    def taps(self) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """Yield each line that the rows' windows reach, with rows and the line in their windows."""
        for line in range(self.rows + WIDE - 1):
            rows = range(max(0, line - WIDE + 1), min(self.rows, line + 1))
            yield line, [(n, line - n) for n in rows]

    def cell(self, row: Any, group: Any) -> Any:
        return row * self.geometry.groups + group

    def of(self, row: Any, group: Any) -> Any:
        start = row * self.channels + group * self.depth
        return pl.ds(pl.multiple_of(start, SUBLANES), self.depth)


def _forward(value, offsets, mask, out, tiles, values, xy, m, weights, vectors, *, geometry):
    block = _Block(value, geometry)
    block.turn(tiles, (value, values.at[HALF, block.inside]), (offsets, xy), (mask, m))
    block.copy(values)
    block.weigh(xy, m, weights)
    zeros = (jnp.zeros((block.depth, LANES), jnp.float32),) * block.rows

    def sample(row: Any, group: Any) -> None:
        def add(copy: Any, totals: tuple[Array, ...]) -> tuple[Array, ...]:
            sums = [*totals]
            for line, rows in block.taps():
                pixels = values[copy, block.of(row + line, group), :]
                for n, a in rows:
                    at = (a * WIDE + copy) * block.cells + block.cell(row + n, group)
                    sums[n] += weights[pl.ds(at, 1), :] * pixels
            return tuple(sums)

        for n, total in enumerate(lax.fori_loop(0, WIDE, add, zeros)):
            vectors[block.of(row + n, group), :] = total

    block.each_group(sample)
    block.turn_back(vectors, out)


def _backward(*refs, geometry):
    value, offsets, mask, g, to_value, to_offsets, to_mask, *scratch = refs
    tiles, values, xy, m, weights, vectors, padded_g, products = scratch
    block = _Block(value, geometry)
    block.clear_rim(padded_g)
    middle = (value, values.at[HALF, block.inside]), (g, padded_g.at[block.inside])
    block.turn(tiles, *middle, (offsets, xy), (mask, m))
    block.copy(values)
    block.weigh(xy, m, weights)
    block.each_group(functools.partial(_spread, block, padded_g, weights, products, vectors))
    block.turn_back(vectors, to_value)
    block.each_group(functools.partial(_multiply, block, values, padded_g, products, weights))
    pl.loop(0, block.cells, step=SUBLANES)(functools.partial(_differentiate, block, weights, xy, m))
    block.turn_back(xy, to_offsets)
    block.turn_back(m, to_mask)


def _spread(block, padded_g, weights, products, vectors, row, group):
    """Write the gradients of values, from the pixels whose windows contain them."""
    last, size = block.height - 1, block.rows * block.depth
    cells = [block.cell(jnp.clip(row + line - HALF, 0, last), group) for line, _ in block.taps()]

    @pl.loop(0, WIDE)
    def sum_rows(copy: Any) -> None:
        sums: list[Any] = [0.0] * block.rows
        for line, rows in block.taps():
            pixels = padded_g[block.of(row + line, group), :]
            for n, a in rows:
                at = ((WIDE - 1 - a) * WIDE + copy) * block.cells + cells[line]
                sums[n] += weights[pl.ds(at, 1), :] * pixels
        for n, total in enumerate(sums):
            start = pl.multiple_of(copy * size + n * block.depth, SUBLANES)
            products[pl.ds(start, block.depth), :] = total

    for at in range(0, size, SUBLANES):
        parts = (products[pl.ds(copy * size + at, SUBLANES), :] for copy in range(WIDE))
        moved = (move(part) for move, part in zip(reversed(block.moves()), parts, strict=True))
        n, channel = divmod(at, block.depth)
        start = block.of(row + n, group).start + channel
        vectors[pl.ds(start, SUBLANES), :] = functools.reduce(jnp.add, moved)


def _multiply(block, values, padded_g, products, weights, row, group):
    """Write the gradients of the entries' weights over the weights, cell after cell."""
    gs = [padded_g[block.of(row + n + HALF, group), :] for n in range(block.rows)]

    @pl.loop(0, WIDE)
    def multiply(copy: Any) -> None:
        for line, rows in block.taps():
            pixels = values[copy, block.of(row + line, group), :]
            for n, a in rows:
                product = (pixels * gs[n]).reshape(-1, SUBLANES, LANES).sum(0)
                at = pl.multiple_of((n * _ENTRIES + a * WIDE + copy) * SUBLANES, SUBLANES)
                products[pl.ds(at, SUBLANES), :] = product

    @pl.loop(0, block.rows)
    def sum_channels(n: Any) -> None:
        starts = (n * _ENTRIES * SUBLANES + k for k in range(SUBLANES))
        parts = (products[pl.ds(at, _ENTRIES, stride=SUBLANES), :] for at in starts)
        at = pl.multiple_of(block.cell(row + n, group) * _APART, SUBLANES)
        weights[pl.ds(at, _ENTRIES), :] = functools.reduce(jnp.add, parts)


def _differentiate(block, to_weights, xy, m, at):
    """Write the gradients of a register's offsets and masks over them."""
    starts = (at * _APART + entry for entry in range(_ENTRIES))
    to = [to_weights[pl.ds(start, SUBLANES, stride=_APART), :] for start in starts]
    found = zip(block.points(xy, m, at), block.places(at), strict=True)
    for point, ((y, x, weight, near), (x_of, y_of, m_of)) in enumerate(found):
        (kx, ky), north, west = divmod(point, SIDE), jnp.floor(y), jnp.floor(x)
        columns = (to[ky * WIDE + kx + b :: WIDE][: len(NEAR)] for b in range(len(NEAR)))
        rows = zip(*(_pick(north, column) for column in columns), strict=True)
        (nw, ne), (sw, se) = (_pick(west, row) for row in rows)
        top, bottom = nw + (x - west) * (ne - nw), sw + (x - west) * (se - sw)
        right = (ne - nw) + (y - north) * ((se - sw) - (ne - nw))
        xy[x_of, :] = block.geometry.scale * weight * right
        xy[y_of, :] = block.geometry.scale * weight * (bottom - top)
        m[m_of, :] = jnp.where(near, top + (y - north) * (bottom - top), 0)


def _pick(floor: Array, values: Any) -> tuple[Array, Array]:
    """Select the value of an offset's neighbor below, and of that above."""
    low, high = values[-2:]
    for n, near in reversed([*enumerate(NEAR[:-2])]):
        low, high = (
            jnp.where(floor == near, values[n], low),
            jnp.where(floor == near, values[n + 1], high),
        )
    return low, high


def refused(geometry: GridGeometry, value: Array, offsets: Array, mask: Array) -> str | None:
    """Say why the kernel does not support these maps; None: it does."""
    _, height, width, channels = value.shape
    depth = channels // geometry.groups
    if value.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{value.dtype} is neither float32 nor bfloat16"
    if depth % SUBLANES:
        return f"{depth} channels in a group are not a multiple of {SUBLANES}"
    if width > LANES:
        return f"{width} columns are more than {LANES}"
    if not _Block(value, geometry).per(value, value, offsets, mask):
        return f"an image of {height}x{width}x{channels} is larger than the fast memory of a chip"
    return None


def _run(geometry: GridGeometry, arrays: Any, outs: Any, name: str, body: Any, passes: int) -> Any:
    value, offsets, mask = arrays[:3]
    block = _Block(value, geometry)
    per = block.per(value, value, offsets, mask)
    # Products and sums with an entry, in each pass; its weights.
    cost = elementwise(block.height * block.channels, LANES, 2 * _ENTRIES * passes)
    cost += elementwise(block.cells, LANES, POINTS * 90 * passes)
    return over_images(
        Kernel(
            name,
            functools.partial(body, geometry=geometry),
            cost * (1 / per),
            [*block.scratch()][: 6 if passes == 1 else None],
        ),
        arrays,
        outs,
        per=per,
    )


@static_jit
def forward(value: Array, offsets: Array, mask: Array, *, geometry: GridGeometry) -> Array:
    """Compute the contribution of points inside windows, f[B,H,W,C]."""
    arrays, outs = [value, offsets, mask], [value.shape[1:]]
    return _run(geometry, arrays, outs, "deformable_windows", _forward, 1)[0]


@static_jit
def backward(
    value: Array, offsets: Array, mask: Array, g: Array, *, geometry: GridGeometry
) -> tuple[Array, ...]:
    """Compute their part of the gradients for value, offsets and mask."""
    outs = [jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in (value, offsets, mask)]
    arrays = [value, offsets, mask, g]
    return tuple(_run(geometry, arrays, outs, "deformable_windows_gradient", _backward, 2))
