"""XCiT's first two convolutions, with their batch norms and GELUs, as kernels on planes.

Blocks of pixels lie as in `conv_stem`. A batch norm needs the sums of all images, so an image
passes three kernels on its way there (sums of the first layer; the second convolution, and its
sums; norm and GELU of that) and three on its way back (sums of the second norm's gradient, of the
first's, the gradient). What the first layer makes is computed again in each of them and never
leaves the fast memory; between kernels stands one array, what the second convolution makes.

Operations are those of `conv_stem`, but that a batch norm takes 3 vector operations instead of 11,
and its gradient 7 instead of 16. For an image of 224 x 224 x 3 and 48 and 96 channels on a v5e:
1,800 cycles for the columns in four of the kernels and 1,680 back; for each of 28 rows of blocks 96
for products of the first kernel, 144 and 24 x (21 / 4 + 1) = 150 of the second, 28 and 12 x 6.25 =
75 of the third; 28 and 12 x 9.25 of sums, 208 and 36 x (36 / 4 + 2) = 396 of the other sums, and 64
more of the gradient. So 88 images take 1.9 M cycles forward and 4.2 M backward.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.models.kernels.tpu.calls import (
    LANES,
    Kernel,
    KernelCost,
    dot,
    elementwise,
    over_images,
    product,
    tiled,
)
from jaxrobust.models.kernels.tpu.conv_stem import (
    Row,
    add_to_matrices,
    columns_cost,
    each_row,
    image_gradient,
    to_kernels,
)
from jaxrobust.models.kernels.tpu.conv_stem import refused as refused  # the same images
from jaxrobust.models.kernels.tpu.stem_blocks import (
    HALF,
    TAPS,
    Gradient,
    batch_gelu,
    batch_gelu_gradient,
    columns_to_lanes,
    each_window,
    first_matrix,
    read_met,
    rows_shape,
    second_gradient_matrix,
    second_matrix,
    selection_matrix,
    split,
    spread_rows,
    valid,
)

Array = jax.Array
GIVEN, BACK = 3, 5  # rows of a batch norm: mean, factor, shift; what its gradient subtracts
PADDED = 8  # rows in registers


def _put(out: Any, *sums: Array) -> None:
    """Write sums f32[C,128] of lanes as rows f32[1,n,C]."""
    for i, total in enumerate(sums):
        lanes = jnp.broadcast_to(total.sum(-1, keepdims=True), total.shape)
        out[0, i : i + 1] = lanes.T[:1]


def _moments(blocks: int, columns: int, pixels: Callable[[Any], list[Array]]) -> tuple[Array, ...]:
    """Compute for `_put` the mean of an image and its sum of squares around that.

    `pixels` makes those of a row of blocks, f32[C,128] each; lanes without a pixel are zero.
    """
    shapes = jax.eval_shape(lambda: pixels(0))
    zero = jnp.zeros(shapes[0].shape, jnp.float32)

    def added(block: Any, total: Array) -> Array:
        return total + functools.reduce(jnp.add, pixels(block))

    total = lax.fori_loop(0, blocks, added, zero)
    mean = total.sum(-1, keepdims=True) / (len(shapes) * blocks * 2 * columns)

    def squared(block: Any, total: Array) -> Array:
        centred = [(pixel - mean) * valid(columns) for pixel in pixels(block)]
        return total + functools.reduce(jnp.add, [c * c for c in centred])

    squares = lax.fori_loop(0, blocks, squared, zero)
    return jnp.broadcast_to(mean / LANES, zero.shape), squares


# ------------------------------------------------------------------------------------- the kernels


def _first(image, selection, first, out, rows) -> None:
    blocks, columns = image.shape[2] // 8, image.shape[3] // 4
    columns_to_lanes(image, selection, rows)

    def pixels(block: Any) -> list[Array]:
        return split(dot(first[...], read_met(rows, block, image.dtype), "nn"), 4)

    _put(out, *_moments(blocks, columns, pixels))


def _second(image, of_first, selection, first, second, kept, out, rows, met, norm) -> None:
    dtype, blocks, columns = image.dtype, kept.shape[1], image.shape[3] // 4
    columns_to_lanes(image, selection, rows)
    spread_rows(of_first, norm)

    def pixels(block: Any) -> list[Array]:
        z = dot(first[...], read_met(rows, block, dtype), "nn")
        return [batch_gelu(part, norm, dtype == jnp.float32) for part in split(z, 4)]

    def convolve(block: Any, seen: Array) -> None:
        z = dot(second[...], seen.astype(dtype), "nn") * valid(columns)
        kept[0, block] = z.astype(dtype)

    each_window(blocks, met, pixels, convolve)
    _put(out, *_moments(blocks, columns, lambda block: [kept[0, block].astype(jnp.float32)]))


def _third(kept, of_second, identity, out, norm) -> None:
    from jax.experimental import pallas as pl

    blocks, columns, dtype = kept.shape[1], out.shape[2], out.dtype
    spread_rows(of_second, norm)

    @pl.loop(0, blocks)
    def activate(block: Any) -> None:
        y = batch_gelu(kept[0, block].astype(jnp.float32), norm, dtype == jnp.float32)
        across = dot(identity[...], y.astype(dtype), "nt").astype(dtype)
        out[0, block] = across[:columns]
        out[0, block + blocks] = across[HALF : HALF + columns]


def _second_sums(kept, g, of_second, identity, out, norm, across, totals) -> None:
    from jax.experimental import pallas as pl

    blocks, columns, dtype = kept.shape[1], g.shape[2], g.dtype
    spread_rows(of_second, norm)
    across[...] = jnp.zeros_like(across)
    totals[...] = jnp.zeros_like(totals)

    @pl.loop(0, blocks)
    def add(block: Any) -> None:
        across[:columns] = g[0, block].astype(jnp.float32)
        across[HALF : HALF + columns] = g[0, block + blocks].astype(jnp.float32)
        to_y = dot(identity[...], across[...].astype(dtype), "nt")
        z = kept[0, block].astype(jnp.float32)
        _add_to_norm(totals, batch_gelu_gradient(z, to_y, norm, columns, dtype == jnp.float32))

    _put(out, totals[0], totals[1])


def _add_to_norm(totals: Any, pixel: Gradient) -> None:
    totals[0] += pixel.to_normed
    totals[1] += pixel.to_normed * pixel.normal


def _norms(g: Any, rows: list[Any], wide: list[Any]) -> list[Any]:
    """Spread the rows of both norms, and find their gradients for `each_row`."""
    how = {"columns": g.shape[2], "exact": g.dtype == jnp.float32}
    for of_norm, norm in zip(rows, wide, strict=True):
        spread_rows(of_norm, norm)
    return [functools.partial(batch_gelu_gradient, rows=norm, **how) for norm in wide]


def _first_sums(*refs) -> None:
    image, kept, g, *norms_rows = refs[:5]
    *matrices, out, rows, below, across, norm1, norm2, totals = refs[5:]
    gradients = _norms(g, norms_rows, [norm1, norm2])
    totals[...] = jnp.zeros_like(totals)

    def use(row: Row) -> None:
        for pixel in row.first:
            _add_to_norm(totals, pixel)

    each_row((image, kept, g, *matrices), (rows, below, across), gradients, use)
    _put(out, totals[0], totals[1])


def _backward(*refs) -> None:
    image, kept, g, *norms_rows = refs[:5]
    *matrices, out, rows, below, across, norm1, norm2, totals = refs[5:]
    gradients = _norms(g, norms_rows, [norm1, norm2])
    scratch = totals, rows, below, across
    image_gradient((image, kept, g, *matrices), scratch, gradients, out)


def _matrix_sums(*refs) -> None:
    image, kept, g, *norms_rows = refs[:5]
    *matrices, to_first, to_second, rows, below, across, norm1, norm2 = refs[5:]
    gradients = _norms(g, norms_rows, [norm1, norm2])
    for out in (to_first, to_second):
        out[...] = jnp.zeros_like(out)

    def use(row: Row) -> None:
        add_to_matrices(row, to_first, to_second, image.dtype)

    each_row((image, kept, g, *matrices), (rows, below, across), gradients, use)


# ----------------------------------------------------------------------------------------- calls


def _of_rows(height: int, row: KernelCost) -> KernelCost:
    return row * (height // 8)


def _padded(rows: Array) -> Array:
    return jnp.pad(rows, ((0, 0), (0, PADDED - rows.shape[1]), (0, 0)))


def _first_of(kernel: Array) -> Array:
    return first_matrix(kernel, jnp.zeros(kernel.shape[3], kernel.dtype))


def _rows_of(channels: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((2, channels), jnp.float32)


@functools.partial(jax.jit, static_argnames="interpret")
def first(x: Array, kernel: Array, *, interpret: bool = False) -> Array:
    """Compute f32[B,2,C] of what the first convolution makes of planes f[B,3,H,W]: the mean of each
    image, and the sum of squares around that.
    """
    _, channels, height, width = x.shape
    c = kernel.shape[3]
    row = product(4 * c, LANES, LANES) * 2 + elementwise(4 * c, LANES, 6)
    rows = rows_shape(height, channels)
    cost = columns_cost(x.shape[1:]) + _of_rows(height, row)
    (sums,) = over_images(
        Kernel("batch_stem_first", _first, cost, [rows], tiled(rows, 4)),
        [x],
        [_rows_of(c)],
        parameters=[selection_matrix(width, x.dtype), _first_of(kernel)],
        interpret=interpret,
    )
    return sums


@functools.partial(jax.jit, static_argnames="interpret")
def second(
    x: Array, rows: Array, kernel1: Array, kernel2: Array, *, interpret: bool = False
) -> list[Array]:
    """Compute f[B,H/8,D,128] of what the second convolution makes, and f32[B,2,D] as `first`.

    `rows` f32[B,3,C]: mean, factor and shift of the first batch norm.
    """
    _, channels, height, width = x.shape
    c, d = kernel2.shape[2:]
    row = product(4 * c, LANES, LANES) + product(d, 9 * c, LANES)
    row += elementwise(4 * c, LANES, 21, 1) + elementwise(d, LANES, 8)
    met = rows_shape(height, channels)
    return over_images(
        Kernel(
            *("batch_stem_second", _second, columns_cost(x.shape[1:]) + _of_rows(height, row)),
            [met, (9 * c, LANES), (GIVEN, c, LANES)],
            tiled(met, 4),
        ),
        [x, _padded(rows)],
        [(height // 8, d, LANES), _rows_of(d)],
        parameters=[selection_matrix(width, x.dtype), _first_of(kernel1), second_matrix(kernel2)],
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames=("columns", "interpret"))
def third(kept: Array, rows: Array, columns: int, *, interpret: bool = False) -> Array:
    """Compute the second layer f[B,H/4,W/4,D] of rows of `columns` from what `second` made.

    `rows` f32[B,3,D]: mean, factor and shift of the second batch norm.
    """
    blocks, d = kept.shape[1:3]
    cost = (product(LANES, LANES, d) + elementwise(d, LANES, 21, 1)) * blocks
    (out,) = over_images(
        Kernel("batch_stem_third", _third, cost, [(GIVEN, d, LANES)]),
        [kept, _padded(rows)],
        [(2 * blocks, columns, d)],
        parameters=[jnp.eye(LANES, dtype=kept.dtype)],
        interpret=interpret,
    )
    return out


@functools.partial(jax.jit, static_argnames="interpret")
def second_sums(kept: Array, g: Array, rows: Array, *, interpret: bool = False) -> Array:
    """Sum the gradient of the second batch norm's result over each image, f32[B,2,D]: alone, and
    times the centred input; from that of the second layer, `g`. `rows` as `backward` takes them.
    """
    blocks, d = kept.shape[1:3]
    cost = (product(d, d, LANES) + elementwise(d, LANES, 37, 2)) * blocks
    scratch = [(BACK, d, LANES), (LANES, d), (2, d, LANES)]
    (sums,) = over_images(
        Kernel("batch_stem_second_sums", _second_sums, cost, scratch),
        [kept, g, _padded(rows)],
        [_rows_of(d)],
        parameters=[jnp.eye(d, dtype=g.dtype)],
        interpret=interpret,
    )
    return sums


def _over_rows(
    name: str,
    x: Array,
    kept: Array,
    g: Array,
    rows: tuple[Array, Array],
    kernels: tuple[Array, Array],
    *,
    interpret: bool,
) -> list[Array]:
    """Run one of the three kernels that go through the rows of blocks backward."""
    _, channels, height, width = x.shape
    c, d = kernels[1].shape[2:]
    image = x.shape[1:]
    met = rows_shape(height, channels)
    wide = [(BACK, c, LANES), (BACK, d, LANES)]
    row = product(4 * c, LANES, LANES) + product(4 * c, 4 * d, LANES) + product(d, d, LANES)
    row += elementwise(4 * c + d, LANES, 36, 2)
    back = product(channels * height, TAPS * LANES, width)
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    kinds: dict[str, Any] = {
        "first_sums": (_first_sums, KernelCost(), [_rows_of(c)], [(2, c, LANES)]),
        "gradient": (
            _backward,
            back + _of_rows(height, product(LANES, 4 * c, LANES)),
            [image],
            [met],
        ),
        "sums": (
            _matrix_sums,
            _of_rows(height, product(4 * c, LANES, LANES) + product(d, LANES, 3 * c) * 3),
            [f32((4 * c, LANES)), f32((3, d, 3 * c))],
            [],
        ),
    }
    body, more, outs, last = kinds[name]
    return over_images(
        Kernel(
            *(f"batch_stem_{name}", body, columns_cost(image) + _of_rows(height, row) + more),
            [met, (2 * d, LANES), (LANES, d), *wide, *last],
            tiled(met, 4),
        ),
        [x, kept, g, *map(_padded, rows)],
        outs,
        parameters=[
            selection_matrix(width, x.dtype),
            _first_of(kernels[0]),
            second_gradient_matrix(kernels[1]),
            jnp.eye(d, dtype=x.dtype),
        ],
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames="interpret")
def first_sums(*operands: Any, interpret: bool = False) -> Array:
    """Sum for the first batch norm as `second_sums`, f32[B,2,C]; operands as of `backward`."""
    return _over_rows("first_sums", *operands, interpret=interpret)[0]


@functools.partial(jax.jit, static_argnames="interpret")
def backward(
    x: Array,
    kept: Array,
    g: Array,
    rows: tuple[Array, Array],
    kernels: tuple[Array, Array],
    *,
    interpret: bool = False,
) -> Array:
    """Compute the gradient for planes f[B,3,H,W].

    Args:
      x: the planes.
      kept: what the second convolution made.
      g: the gradient of the second layer, f[B,H/4,W/4,D].
      rows: of both batch norms, f32[B,5,C] and f32[B,5,D]: mean, factor, shift, and what the
        gradient subtracts from that of the norm's result, a constant and a share of its centred
        input.
      kernels: of both convolutions.
      interpret: see `over_images`.
    """
    return _over_rows("gradient", x, kept, g, rows, kernels, interpret=interpret)[0]


@functools.partial(jax.jit, static_argnames="interpret")
def parameter_gradients(*operands: Any, interpret: bool = False) -> tuple[Array, Array]:
    """Compute the gradients of both kernels, in float32; operands as of `backward`."""
    to_first, to_second = _over_rows("sums", *operands, interpret=interpret)
    kernels = operands[-1]
    return to_kernels(to_first.sum(0), to_second.sum(0), kernels[0].shape)
