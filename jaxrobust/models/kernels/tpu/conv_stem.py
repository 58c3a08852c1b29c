"""The first two convolutions of a ConvStem, with norms and GELUs, as one kernel.

An attack differentiates with respect to the image, so these layers run in both directions in each
of its steps, on maps of 48 channels that XLA lays out in 128 lanes, with separate passes for sums
over channels. This kernel reads an image and writes the second layer's output; nothing in between
leaves the fast memory. The gradient's kernel recomputes the first layer.

Pixels are in the lanes and channels in the rows, so a sum over channels adds registers. A
*block* is 4 by 4 pixels of the image: four pixels of the first layer and one of the second. A row
of 56 blocks takes 64 lanes; the other 64 hold the row of blocks at the same height in the lower
half of the image. Multiplying by a matrix of ones and zeros, which is exact, brings every fourth
column of the image into its lane; a block needs five columns, as neighbors overlap. A row of
blocks is then a product f[4*C,128] @ f[128,128] of 3 channels x 5 columns x 8 rows, and the second
convolution a product with the nine groups of channels that a block meets.

For 88 images of 224 x 224 x 3, 48 and 96 channels, the declared costs are 1.3 and 2.2 M cycles of a
v5e in the two directions; the compiler schedules 1.4 and 2.1 M without stalls. None of this has run
on a TPU.

The GELU is a series within 4e-6 of the exact one, which is below bfloat16's rounding except where
the GELU is nearly zero (below x = -3.4). Other platforms and float32 use the exact one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxrobust.models.kernels.primitives import static_jit
from jaxrobust.models.kernels.tpu.calls import (
    LANES,
    SCOPED,
    SUBLANES,
    Kernel,
    KernelCost,
    dot,
    elementwise,
    over_images,
    product,
    tiled,
)
from jaxrobust.models.kernels.tpu.stem_blocks import (
    BLOCK,
    HALF,
    PACKED,
    TAPS,
    Gradient,
    columns_to_lanes,
    each_window,
    first_matrix,
    gelu,
    lanes_of,
    lanes_to_columns,
    norm_gelu,
    norm_gelu_gradient,
    other_half,
    read_met,
    rows_shape,
    second_gradient_matrix,
    second_matrix,
    selection_matrix,
    shifted,
    split,
    spread,
    window,
)

Array = jax.Array


def refused(x: Array, *parameters: Array) -> str | None:
    """Say why the kernel does not support these images and layers; None: it does."""
    _, height, width, channels = x.shape
    kernels = parameters[0], parameters[4]
    if x.dtype != jnp.bfloat16:
        return f"{x.dtype} is not bfloat16"
    if channels != 3 or any(kernel.shape[:2] != (3, 3) for kernel in kernels):
        return "its first two convolutions are not 3x3 on images with 3 channels"
    if any(kernel.shape[3] % PACKED for kernel in kernels):
        return f"its channels are not multiples of {PACKED}"
    if height % (2 * PACKED) or width % BLOCK or width > BLOCK * HALF:
        return f"{height}x{width} px are not multiples of 32 and 4, at most 256 wide"
    if _needed(x.shape[1:], *(kernel.shape[3] for kernel in kernels)) > SCOPED:
        return f"{height}x{width} px are too large for the fast memory of a chip"
    return None


def _needed(image: tuple[int, ...], c: int, d: int) -> int:
    height, width, channels = image
    planes = tiled((channels, height, width), 2)
    maps = tiled((height // 4, width // 4, d), 2) + tiled((height // 8, d, LANES), 2)
    matrices = tiled((2, width, TAPS * LANES), 2) + tiled((4 * c, 4 * d + LANES), 2)
    return 2 * (2 * planes + maps + matrices) + 3 * tiled(rows_shape(height, channels), 4)


def _forward(
    image, selection, first, second, affine1, affine2, identity, out, stored, rows, met, *, eps
) -> None:
    dtype, blocks, columns = image.dtype, stored.shape[1], out.shape[2]
    activate = functools.partial(norm_gelu, eps=eps, exact=dtype == jnp.float32)
    columns_to_lanes(image, selection, rows)

    def pixels(block: Any) -> list[Array]:
        z = dot(first[...], read_met(rows, block, dtype), "nn")
        return [activate(part, affine1) for part in split(z, 4)]

    def convolve(block: Any, pixels_met: Array) -> None:
        z = (dot(second[...], pixels_met.astype(dtype), "nn") + affine2[2]).astype(dtype)
        stored[0, block] = z
        y = activate(z.astype(jnp.float32), affine2).astype(dtype)
        write_pixels(out, block, blocks, columns, dot(identity[...], y, "nt").astype(dtype))

    each_window(blocks, met, pixels, convolve)


def write_pixels(out: Any, block: Any, blocks: int, columns: int, across: Array) -> None:
    """Write both halves of a row of blocks, f[128,D]."""
    out[0, block] = across[:columns]
    out[0, block + blocks] = across[HALF : HALF + columns]


def read_pixels(g: Any, block: Any, blocks: int, across: Any) -> None:
    """Read what `write_pixels` wrote into f32[128,D]."""
    columns = g.shape[2]
    across[:columns] = g[0, block].astype(jnp.float32)
    across[HALF : HALF + columns] = g[0, block + blocks].astype(jnp.float32)


class Row(NamedTuple):
    """Gradients at a row of blocks."""

    block: Any
    second: Gradient  # of the second layer
    below: Array  # of the second convolution in the next row
    met: Array
    first: list[Gradient]  # of the four pixels of each block


def each_row(
    refs: Sequence[Any], scratch: Sequence[Any], gradients: Sequence[Any], use: Callable[..., None]
) -> None:
    """Call `use` with the `Row` of gradients at each row of blocks, from the last to the first.

    `refs`: planes, the second convolution's output, the second layer's gradients, and the matrices
    that select columns, apply both layers, and move pixels into lanes. `scratch`: rows of columns,
    the gradient of the row of blocks below, and a transposed one. `gradients`: per layer, the
    norm's and GELU's gradient, as a function of their input and their result's gradient.
    """
    image, stored, g, selection, first, second, identity = refs
    rows, below, across = scratch
    of_first, of_second = gradients
    dtype, blocks, d = image.dtype, stored.shape[1], g.shape[3]
    columns_to_lanes(image, selection, rows)
    across[...] = jnp.zeros_like(across)

    def behind(block: Any) -> Gradient:
        read_pixels(g, block, blocks, across)
        to_y = dot(identity[...], across[...].astype(dtype), "nt")
        return of_second(stored[0, block].astype(jnp.float32), to_y)

    def pair(to_z: Array) -> Array:
        return jnp.concatenate([to_z, shifted(to_z, -1)])

    below[...] = pair(other_half(behind(0).to_x, 0))

    @pl.loop(0, blocks)
    def differentiate(i: Any) -> None:
        block = blocks - 1 - i
        second_layer, pair_below = behind(block), below[...]
        here = pair(second_layer.to_x)
        to_y = dot(second[...], jnp.concatenate([here, pair_below]).astype(dtype), "nn")
        below[...] = here
        met = read_met(rows, block, dtype)
        pairs = zip(split(dot(first[...], met, "nn"), 4), split(to_y, 4), strict=True)
        pixels = [of_first(z, to_pixel) for z, to_pixel in pairs]
        use(Row(block, second_layer, pair_below[:d], met, pixels))


def image_gradient(
    refs: Sequence[Any], scratch: Sequence[Any], gradients: Sequence[Any], out: Any
) -> None:
    """Compute the gradient for planes; arguments as in `each_row`, but `scratch` starts with
    another buffer for rows.
    """
    totals, *row_scratch = scratch
    _, _, _, selection, first, *_ = refs

    def use(row: Row) -> None:
        to_z = jnp.concatenate([pixel.to_x for pixel in row.first])
        to_rows = dot(first[...], to_z.astype(out.dtype), "tn")
        for n in range(totals.shape[0] * TAPS):
            place = n // TAPS, row.block >> 1, row.block & 1, slice(None), lanes_of(n % TAPS)
            totals[place] = to_rows[n * SUBLANES : (n + 1) * SUBLANES]

    each_row(refs, row_scratch, gradients, use)
    lanes_to_columns(totals, selection, out)


def add_to_matrices(row: Row, to_first: Any, to_second: Any, dtype: Any) -> None:
    """Add a row of blocks' contribution to the gradients of both layers' matrices."""
    to_z = jnp.concatenate([pixel.to_x for pixel in row.first])
    to_first[0] += dot(to_z.astype(dtype), row.met, "nt")
    y = [gelu(pixel.normed, dtype == jnp.float32) for pixel in row.first]
    middle, lowest = (window(*pair).astype(dtype) for pair in (y[:2], y[2:]))
    here, below = row.second.to_x.astype(dtype), row.below.astype(dtype)
    for i, (g, met) in enumerate(((below, lowest), (here, middle), (here, lowest))):
        to_second[0, i] += dot(g, met, "nt")


def _layer_norms(operands: Sequence[Any], eps: float) -> tuple[list[Any], list[Any]]:
    """Split operands into those of `each_row` and the gradients of both norms."""
    *refs, affine1, affine2, identity = operands
    gradient = functools.partial(norm_gelu_gradient, eps=eps, exact=refs[0].dtype == jnp.float32)
    return [*refs, identity], [functools.partial(gradient, affine=a) for a in (affine1, affine2)]


def _backward(*refs, eps: float) -> None:
    *operands, out, rows, totals, below, across = refs
    arrays, gradients = _layer_norms(operands, eps)
    image_gradient(arrays, (totals, rows, below, across), gradients, out)


def _sums(*refs, eps: float) -> None:
    """Sum gradients for the two matrices and, still separated by lane, for the norms' parameters
    and the second bias.
    """
    *operands, to_first, to_second, to_affine1, to_affine2, rows, below, across = refs
    arrays, gradients = _layer_norms(operands, eps)
    for out in (to_first, to_second, to_affine1, to_affine2):
        out[...] = jnp.zeros_like(out)

    def use(row: Row) -> None:
        add_to_matrices(row, to_first, to_second, arrays[0].dtype)
        for pixel in row.first:
            to_affine1[0, 0] += pixel.to_normed * pixel.normal
            to_affine1[0, 1] += pixel.to_normed
        to_affine2[0, 0] += row.second.to_normed * row.second.normal
        to_affine2[0, 1] += row.second.to_normed
        to_affine2[0, 2] += row.second.to_x

    each_row(arrays, (rows, below, across), gradients, use)


def columns_cost(image: tuple[int, ...]) -> KernelCost:
    """Count moving the columns of an image's planes into their lanes."""
    channels, height, width = image
    return product(channels * (height + PACKED), width, TAPS * LANES)


def gradient_cost(c: int, d: int) -> KernelCost:
    """Count the operations of `each_row` per row."""
    products = product(4 * c, LANES, LANES) + product(4 * c, 4 * d, LANES) + product(d, d, LANES)
    return products + elementwise(4 * c + d, LANES, 45, 2)


@static_jit
def forward(x: Array, *parameters: Array, eps: float) -> list[Array]:
    """Compute both layers of planes f[B,3,H,W] as f[B,H/4,W/4,D], and f[B,H/8,D,128].

    The latter is the second convolution's output, for `backward`.
    """
    kernel1, bias1, scale1, shift1, kernel2, bias2, scale2, shift2 = parameters
    _, channels, height, width = x.shape
    c, d = kernel2.shape[2:]
    products = product(4 * c, LANES, LANES) + product(d, 9 * c, LANES) + product(LANES, LANES, d)
    row = products + elementwise(4 * c + d, LANES, 29, 1)
    cost, rows = columns_cost(x.shape[1:]) + row * (height // 8), rows_shape(height, channels)
    body = functools.partial(_forward, eps=eps)
    return over_images(
        Kernel("conv_stem", body, cost, [rows, (9 * c, LANES)], tiled(rows, 4)),
        [x],
        [(height // 4, width // 4, d), (height // 8, d, LANES)],
        parameters=[
            selection_matrix(width, x.dtype),
            first_matrix(kernel1, bias1),
            second_matrix(kernel2),
            spread(scale1, shift1),
            spread(scale2, shift2, bias2),
            jnp.eye(LANES, dtype=x.dtype),
        ],
    )


def _operands(x: Array, kernel1, bias1, scale1, shift1, kernel2, _, scale2, shift2) -> list[Array]:
    return [
        selection_matrix(x.shape[3], x.dtype),
        first_matrix(kernel1, bias1),
        second_gradient_matrix(kernel2),
        spread(scale1, shift1),
        spread(scale2, shift2),
        jnp.eye(kernel2.shape[3], dtype=x.dtype),
    ]


@static_jit
def backward(x: Array, stored: Array, g: Array, *parameters: Array, eps: float) -> Array:
    """Compute the gradient for planes from the result's gradient and what `forward` stored."""
    _, channels, height, width = x.shape
    c, d = parameters[4].shape[2:]
    row = gradient_cost(c, d) + product(LANES, 4 * c, LANES)
    back = product(channels * height, TAPS * LANES, width)
    cost, rows = (
        columns_cost(x.shape[1:]) + back + row * (height // 8),
        rows_shape(height, channels),
    )
    scratch, body = [rows, rows, (2 * d, LANES), (LANES, d)], functools.partial(_backward, eps=eps)
    (out,) = over_images(
        Kernel("conv_stem_gradient", body, cost, scratch, tiled(rows, 4)),
        [x, stored, g],
        [x.shape[1:]],
        parameters=_operands(x, *parameters),
    )
    return out


def to_kernels(to_first: Array, to_second: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Turn both matrices' gradients into the kernels' gradients, the first of shape `shape`."""
    c, d = shape[3], to_second.shape[1]
    bias = jnp.zeros(c)
    transposed = jax.linear_transpose(lambda kernel: first_matrix(kernel, bias), jnp.zeros(shape))
    return transposed(to_first)[0], to_second.reshape(3, d, 3, c).transpose(0, 2, 3, 1)


@static_jit
def parameter_gradients(
    x: Array, stored: Array, g: Array, *parameters: Array, eps: float
) -> list[Array]:
    """Compute the gradients for the parameters, in float32; operands as in `backward`."""
    _, channels, height, _ = x.shape
    c, d = parameters[4].shape[2:]
    products = product(4 * c, LANES, LANES) + product(d, LANES, 3 * c) * 3
    row = gradient_cost(c, d) + products + elementwise(4 * c + d, LANES, 5)
    cost, rows = columns_cost(x.shape[1:]) + row * (height // 8), rows_shape(height, channels)
    scratch, body = [rows, (2 * d, LANES), (LANES, d)], functools.partial(_sums, eps=eps)
    shapes = (4 * c, LANES), (3, d, 3 * c), (2, c, LANES), (3, d, LANES)
    sums = over_images(
        Kernel("conv_stem_sums", body, cost, scratch, tiled(rows, 4)),
        [x, stored, g],
        [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        parameters=_operands(x, *parameters),
    )
    to_first, to_second, to_affine1, to_affine2 = (s.sum(0) for s in sums)
    to_kernel1, to_kernel2 = to_kernels(to_first, to_second, parameters[0].shape)
    to_bias1 = to_first[:, TAPS * SUBLANES * channels].reshape(4, c).sum(0)
    to_scale2, to_shift2, to_bias2 = to_affine2.sum(-1)
    to_scale1, to_shift1 = to_affine1.sum(-1)
    return [
        *(to_kernel1, to_bias1, to_scale1, to_shift1),
        *(to_kernel2, to_bias2, to_scale2, to_shift2),
    ]
