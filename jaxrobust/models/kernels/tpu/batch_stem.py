"""XCiT's first two convolutions, with batch norms and GELUs, as kernels on planes.

Blocks of pixels are laid out as in `conv_stem`. A batch norm needs sums over all images, so each
image passes through three kernels forward (sums of the first layer; the second convolution and its
sums; its norm and GELU) and three backward (sums of the second norm's gradient, of the first's, the
gradient). Each of them recomputes the first layer, which never leaves the fast memory; only the
second convolution's output is passed between kernels.

By the declared costs, 88 images of 224 x 224 x 3, for 48 and 96 channels, take 1.9 M cycles of a
v5e forward and 4.2 M backward.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxrobust.models.kernels.primitives import static_jit
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
    read_pixels,
    to_kernels,
    write_pixels,
)
from jaxrobust.models.kernels.tpu.conv_stem import refused as refused  # the same images
from jaxrobust.models.kernels.tpu.stem_blocks import (
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
# Rows of a batch norm: mean, factor, shift; what its gradient subtracts; rows in a register.
FORWARD_ROWS, BACKWARD_ROWS, PADDED_ROWS = 3, 5, 8


def _put(out: Any, *sums: Array) -> None:
    """Write sums f32[C,128] of lanes as rows f32[1,n,C]."""
    for i, total in enumerate(sums):
        lanes = jnp.broadcast_to(total.sum(-1, keepdims=True), total.shape)
        out[0, i : i + 1] = lanes.T[:1]


def _moments(blocks: int, columns: int, pixels: Callable[[Any], list[Array]]) -> tuple[Array, ...]:
    """Compute an image's mean and sum of squares around the mean, for `_put`.

    `pixels` returns those of a row of blocks, f32[C,128] each; lanes without a pixel are zero.
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


def _first(image, selection, first, out, rows) -> None:
    blocks, columns = image.shape[2] // 8, image.shape[3] // 4
    columns_to_lanes(image, selection, rows)

    def pixels(block: Any) -> list[Array]:
        return split(dot(first[...], read_met(rows, block, image.dtype), "nn"), 4)

    _put(out, *_moments(blocks, columns, pixels))


def _second(image, of_first, selection, first, second, stored, out, rows, met, norm) -> None:
    dtype, blocks, columns = image.dtype, stored.shape[1], image.shape[3] // 4
    columns_to_lanes(image, selection, rows)
    spread_rows(of_first, norm)

    def pixels(block: Any) -> list[Array]:
        z = dot(first[...], read_met(rows, block, dtype), "nn")
        return [batch_gelu(part, norm, dtype == jnp.float32) for part in split(z, 4)]

    def convolve(block: Any, pixels_met: Array) -> None:
        z = dot(second[...], pixels_met.astype(dtype), "nn") * valid(columns)
        stored[0, block] = z.astype(dtype)

    each_window(blocks, met, pixels, convolve)
    _put(out, *_moments(blocks, columns, lambda block: [stored[0, block].astype(jnp.float32)]))


def _third(stored, of_second, identity, out, norm) -> None:
    blocks, columns, dtype = stored.shape[1], out.shape[2], out.dtype
    spread_rows(of_second, norm)

    @pl.loop(0, blocks)
    def activate(block: Any) -> None:
        y = batch_gelu(stored[0, block].astype(jnp.float32), norm, dtype == jnp.float32)
        across = dot(identity[...], y.astype(dtype), "nt").astype(dtype)
        write_pixels(out, block, blocks, columns, across)


def _second_sums(stored, g, of_second, identity, out, norm, across, totals) -> None:
    blocks, columns, dtype = stored.shape[1], g.shape[2], g.dtype
    spread_rows(of_second, norm)
    across[...] = jnp.zeros_like(across)
    totals[...] = jnp.zeros_like(totals)

    @pl.loop(0, blocks)
    def add(block: Any) -> None:
        read_pixels(g, block, blocks, across)
        to_y = dot(identity[...], across[...].astype(dtype), "nt")
        z = stored[0, block].astype(jnp.float32)
        _add_to_norm(totals, batch_gelu_gradient(z, to_y, norm, columns, dtype == jnp.float32))

    _put(out, totals[0], totals[1])


def _add_to_norm(totals: Any, pixel: Gradient) -> None:
    totals[0] += pixel.to_normed
    totals[1] += pixel.to_normed * pixel.normal


def _way_back(refs: Any, results: int) -> tuple[Any, ...]:
    """Spread the rows of both norms; return the arguments of `each_row`, results, other scratch."""
    image, stored, g, *norm_rows = refs[:5]
    matrices, outs, scratch = refs[5:9], refs[9 : 9 + results], refs[9 + results :]
    rows, below, across, *norms = scratch[:5]
    for of_norm, norm in zip(norm_rows, norms, strict=True):
        spread_rows(of_norm, norm)
    settings = {"columns": g.shape[2], "exact": g.dtype == jnp.float32}
    gradients = [functools.partial(batch_gelu_gradient, rows=norm, **settings) for norm in norms]
    arrays = image, stored, g, *matrices
    return arrays, (rows, below, across), gradients, outs, scratch[5:]


def _first_sums(*refs) -> None:
    arrays, scratch, gradients, (out,), (totals,) = _way_back(refs, 1)
    totals[...] = jnp.zeros_like(totals)

    def use(row: Row) -> None:
        for pixel in row.first:
            _add_to_norm(totals, pixel)

    each_row(arrays, scratch, gradients, use)
    _put(out, totals[0], totals[1])


def _backward(*refs) -> None:
    arrays, scratch, gradients, (out,), totals = _way_back(refs, 1)
    image_gradient(arrays, (*totals, *scratch), gradients, out)


def _matrix_sums(*refs) -> None:
    arrays, scratch, gradients, (to_first, to_second), _ = _way_back(refs, 2)
    for out in (to_first, to_second):
        out[...] = jnp.zeros_like(out)
    add = functools.partial(
        add_to_matrices, to_first=to_first, to_second=to_second, dtype=refs[0].dtype
    )
    each_row(arrays, scratch, gradients, add)


def _padded(rows: Array) -> Array:
    return jnp.pad(rows, ((0, 0), (0, PADDED_ROWS - rows.shape[1]), (0, 0)))


def _first_of(kernel: Array) -> Array:
    return first_matrix(kernel, jnp.zeros(kernel.shape[3], kernel.dtype))


def _f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@static_jit
def first(x: Array, kernel: Array) -> Array:
    """Compute f32[B,2,C] from the first convolution of planes f[B,3,H,W]: each image's mean, and
    the sum of squares around it.
    """
    _, channels, height, width = x.shape
    c, rows = kernel.shape[3], rows_shape(height, channels)
    row = product(4 * c, LANES, LANES) * 2 + elementwise(4 * c, LANES, 6)
    cost = columns_cost(x.shape[1:]) + row * (height // 8)
    kernel_call = Kernel("batch_stem_first", _first, cost, [rows], tiled(rows, 4))
    matrices = [selection_matrix(width, x.dtype), _first_of(kernel)]
    return over_images(kernel_call, [x], [_f32(2, c)], parameters=matrices)[0]


@static_jit
def second(x: Array, rows: Array, kernel1: Array, kernel2: Array) -> list[Array]:
    """Compute the second convolution f[B,H/8,D,128], and its f32[B,2,D] as in `first`.

    `rows` f32[B,3,C]: mean, factor and shift of the first batch norm.
    """
    _, channels, height, width = x.shape
    (c, d), met = kernel2.shape[2:], rows_shape(height, channels)
    row = product(4 * c, LANES, LANES) + product(d, 9 * c, LANES)
    row += elementwise(4 * c, LANES, 21, 1) + elementwise(d, LANES, 8)
    cost = columns_cost(x.shape[1:]) + row * (height // 8)
    scratch = [met, (9 * c, LANES), (FORWARD_ROWS, c, LANES)]
    return over_images(
        Kernel("batch_stem_second", _second, cost, scratch, tiled(met, 4)),
        [x, _padded(rows)],
        [(height // 8, d, LANES), _f32(2, d)],
        parameters=[selection_matrix(width, x.dtype), _first_of(kernel1), second_matrix(kernel2)],
    )


@static_jit
def third(stored: Array, rows: Array, *, columns: int) -> Array:
    """Compute the second layer f[B,H/4,W/4,D] from the output of `second`, in rows of `columns`.

    `rows` f32[B,3,D]: mean, factor and shift of the second batch norm.
    """
    blocks, d = stored.shape[1:3]
    cost = (product(LANES, LANES, d) + elementwise(d, LANES, 21, 1)) * blocks
    kernel = Kernel("batch_stem_third", _third, cost, [(FORWARD_ROWS, d, LANES)])
    arrays, identity = [stored, _padded(rows)], jnp.eye(LANES, dtype=stored.dtype)
    return over_images(kernel, arrays, [(2 * blocks, columns, d)], parameters=[identity])[0]


@static_jit
def second_sums(stored: Array, g: Array, rows: Array) -> Array:
    """Sum the gradient of the second batch norm's result over each image, f32[B,2,D]: alone, and
    times the centered input; from the second layer's gradient `g`. `rows` as in `backward`.
    """
    blocks, d = stored.shape[1:3]
    cost = (product(d, d, LANES) + elementwise(d, LANES, 37, 2)) * blocks
    scratch = [(BACKWARD_ROWS, d, LANES), (LANES, d), (2, d, LANES)]
    kernel = Kernel("batch_stem_second_sums", _second_sums, cost, scratch)
    arrays, identity = [stored, g, _padded(rows)], jnp.eye(d, dtype=g.dtype)
    return over_images(kernel, arrays, [_f32(2, d)], parameters=[identity])[0]


Pair = tuple[Array, Array]  # for both layers


def _over_rows(
    name: str, body: Any, operands: Any, outs: list[Any], cost: KernelCost, *scratch: Any
) -> list[Array]:
    """Run a kernel that visits the rows of blocks backward, adding its own part of the cost."""
    x, stored, g, rows, kernels = operands
    _, channels, height, width = x.shape
    (c, d), met = kernels[1].shape[2:], rows_shape(height, channels)
    row = product(4 * c, LANES, LANES) + product(4 * c, 4 * d, LANES) + product(d, d, LANES)
    row += elementwise(4 * c + d, LANES, 36, 2)
    norms = [(BACKWARD_ROWS, n, LANES) for n in (c, d)]
    return over_images(
        Kernel(
            *(f"batch_stem_{name}", body, columns_cost(x.shape[1:]) + row * (height // 8) + cost),
            *([met, (2 * d, LANES), (LANES, d), *norms, *scratch], tiled(met, 4)),
        ),
        [x, stored, g, *map(_padded, rows)],
        outs,
        parameters=[
            selection_matrix(width, x.dtype),
            _first_of(kernels[0]),
            second_gradient_matrix(kernels[1]),
            jnp.eye(d, dtype=x.dtype),
        ],
    )


@static_jit
def first_sums(x: Array, stored: Array, g: Array, rows: Pair, kernels: Pair) -> Array:
    """Sum for the first batch norm, as in `second_sums`, f32[B,2,C]; operands as in `backward`."""
    operands, c = (x, stored, g, rows, kernels), kernels[0].shape[3]
    (sums,) = _over_rows(
        *("first_sums", _first_sums, operands, [_f32(2, c)], KernelCost()), (2, c, LANES)
    )
    return sums


@static_jit
def backward(x: Array, stored: Array, g: Array, rows: Pair, kernels: Pair) -> Array:
    """Compute the gradient for planes f[B,3,H,W] from the second layer's, `g` f[B,H/4,W/4,D].

    `rows` f32[B,5,C] and f32[B,5,D] of the batch norms: mean, factor, shift, and what the gradient
    subtracts from its result's gradient: a constant, and a share of its centered input.
    """
    _, channels, height, width = x.shape
    cost = product(channels * height, TAPS * LANES, width)
    cost += product(LANES, 4 * kernels[0].shape[3], LANES) * (height // 8)
    operands, met = (x, stored, g, rows, kernels), rows_shape(height, channels)
    (out,) = _over_rows("gradient", _backward, operands, [x.shape[1:]], cost, met)
    return out


@static_jit
def parameter_gradients(x: Array, stored: Array, g: Array, rows: Pair, kernels: Pair) -> Pair:
    """Compute the gradients of both kernels, in float32; operands as in `backward`."""
    operands, (c, d) = (x, stored, g, rows, kernels), kernels[1].shape[2:]
    cost = (product(4 * c, LANES, LANES) + product(d, LANES, 3 * c) * 3) * (x.shape[2] // 8)
    outs = [_f32(4 * c, LANES), _f32(3, d, 3 * c)]
    to_first, to_second = _over_rows("sums", _matrix_sums, operands, outs, cost)
    return to_kernels(to_first.sum(0), to_second.sum(0), kernels[0].shape)
