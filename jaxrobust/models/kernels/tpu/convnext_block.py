"""A ConvNeXt block as one kernel: x + gamma * MLP(LN(depthwise(x))), and its gradients.

A block reads its image once and writes it once. The convolution's output is kept for the gradient,
which reads it and the result's gradient and writes the image's gradient. An attack step thus moves
six arrays of activations; XLA also moves the hidden layer, which is four times as wide. The hidden
layer is recomputed, since products are cheaper than moving it to HBM and back, and so are the norm
and the GELU. `sums` accumulates parameter gradients over all images in float32.

An image's rows are padded to whole registers, so that several of them form a matrix whose rows are
pixels; the added columns are zero in every gradient.

For an image of 56 x 56 x 96 on a v5e, the compiler's schedule has 21.3 k cycles and, for its
gradient, 24.8 k. The norm is computed with the MLP, so that no row's sums wait for it. The GELU is
that of `stem_blocks`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxrobust.models.kernels.convnext_layers import BlockParameters
from jaxrobust.models.kernels.primitives import largest_divisor, static_jit
from jaxrobust.models.kernels.tpu import depthwise_norm
from jaxrobust.models.kernels.tpu.calls import (
    LANES,
    SUBLANES,
    Kernel,
    KernelCost,
    clear_at_first,
    dot,
    elementwise,
    fast_memory,
    lane_groups,
    over_images,
    product,
    tiled,
    widened_to,
)
from jaxrobust.models.kernels.tpu.stem_blocks import gelu, gelu_slope

Array = jax.Array
_ROWS, _COLUMNS = 256, 512  # maximum part of the hidden layer to compute at once


class _Sizes(NamedTuple):
    """What a kernel processes at a time."""

    per: int  # images
    height: int
    width: int
    channels: int
    hidden: int
    side: int  # of the convolution's window

    @property
    def wide(self) -> int:  # of a row, in whole registers
        return widened_to(self.width, SUBLANES)

    @property
    def rows(self) -> int:  # of images, whose pixels are one matrix
        return largest_divisor(self.per * self.height, max(1, _ROWS // self.wide))

    @property
    def columns(self) -> int:  # of the hidden layer that are computed at once
        return LANES * largest_divisor(self.hidden // LANES, _COLUMNS // LANES)

    @property
    def padded(self) -> tuple[int, ...]:  # shape of the images with their rims
        one = depthwise_norm.padded_shape(self.side, self.height, self.wide, self.channels)
        return self.per, *one

    @property
    def matrix(self) -> tuple[int, ...]:  # shape of all rows of the images
        return self.per * self.height, self.wide, self.channels


def _sizes(x: Array, p: BlockParameters) -> _Sizes:
    """Choose how many images to compute together: small images have thin products."""
    batch, height, width, channels = x.shape
    one = _Sizes(1, height, width, channels, p.first.shape[1], p.taps.shape[0])
    return one._replace(per=largest_divisor(batch, max(1, _ROWS // (height * one.wide))))


def refused(x: Array, p: BlockParameters) -> str | None:
    """Say why the kernel does not support these images; None: it does."""
    if x.dtype != jnp.bfloat16:
        return f"{x.dtype} is not bfloat16"
    if p.first.shape[1] % LANES:
        return f"{p.first.shape[1]} hidden channels are not a multiple of {LANES}"
    if reason := depthwise_norm.refused(x, p.taps):
        return reason
    if _needed(_sizes(x, p), sums=True) > fast_memory():
        return (
            f"{x.shape[1]}x{x.shape[2]} with its weights is larger than the fast memory of a chip"
        )
    return None


def _needed(s: _Sizes, sums: bool) -> int:
    images = s.per * tiled((s.height, s.wide, s.channels), 2)
    weights = 2 * s.channels * s.hidden * 2
    scratch = tiled(s.padded, 4) * (1 + sums) + tiled((s.rows, s.wide, s.channels), 4)
    return 2 * (3 + sums) * images + weights * (1 + 2 * sums) + scratch + _values(s)


def _values(s: _Sizes) -> int:
    return 4 * s.rows * s.wide * (3 * s.columns + 4 * s.channels)


def _each_image(s: _Sizes, call: Callable[[Any], None]) -> None:
    call(0) if s.per == 1 else pl.loop(0, s.per)(call)


def _each_row(s: _Sizes, call: Callable[[Any, Any], None], step: int = 1) -> None:
    """Call with an image and a row, for each `step`th row of each image."""

    def rows(image: Any) -> None:
        pl.loop(0, s.height, step=step)(functools.partial(call, image))

    _each_image(s, rows)


def _clear(s: _Sizes, padded: Any) -> None:
    def clear(image: Any) -> None:
        depthwise_norm.clear_rim(padded.at[image], s.height, s.width, s.side // 2)

    _each_image(s, clear)


def _put_images(s: _Sizes, x: Any, padded: Any) -> None:
    def put(image: Any, row: Any) -> None:
        depthwise_norm.put_row(padded.at[image], row, s.side // 2, x[image, row])

    _each_row(s, put)


def _each_sum(s: _Sizes, padded: Any, taps: Any, use: Callable[..., None]) -> None:
    """Call with an image, a first row, a row's distance from it, and the row's sums f32[wide,C]."""
    together = depthwise_norm.together(s.height)

    def sum_rows(image: Any, row: Any) -> None:
        sums = depthwise_norm.sum_taps(padded.at[image], taps, row, s.wide, together)
        for n, total in enumerate(sums):
            use(image, row, n, total)

    _each_row(s, sum_rows, together)


def _place(s: _Sizes, row: Any) -> tuple[Any, Any]:
    return (0, row) if s.per == 1 else (jax.lax.div(row, s.height), jax.lax.rem(row, s.height))


def _pixels(s: _Sizes, rows: Array) -> Array:
    return rows.astype(jnp.float32).reshape(-1, s.channels)


def _row(s: _Sizes, pixels: Array, i: int) -> Array:
    return pixels[i * s.wide : i * s.wide + s.width]


def _over_hidden(s: _Sizes, step: Callable[[Any, Array], Array]) -> Array:
    """Sum f32[rows*wide,C] over parts of the hidden layer; `step` adds its columns to a sum."""
    zero = jnp.zeros((s.rows * s.wide, s.channels), jnp.float32)
    if s.columns == s.hidden:
        return step(slice(None), zero)

    def part(i: Any, total: Array) -> Array:
        return step(pl.ds(pl.multiple_of(i * s.columns, LANES), s.columns), total)

    return jax.lax.fori_loop(0, s.hidden // s.columns, part, zero)


def _forward(x, share, taps, affine, first, first_bias, second, out, *refs, s, eps) -> None:
    *stored, padded, summed = refs
    dtype, exact = x.dtype, x.dtype == jnp.float32
    bias, scale, shift, second_bias, gamma = (affine[i : i + 1] for i in range(5))
    _clear(s, padded)
    _put_images(s, x, padded)

    def keep(image: Any, row: Any, n: int, total: Array) -> None:
        z = total + bias
        for ref in stored:
            ref[image, row + n] = z.astype(dtype)
        summed[image * s.height + row + n] = z

    _each_sum(s, padded, taps, keep)

    @pl.loop(0, s.per * s.height, step=s.rows)
    def mlp(start: Any) -> None:
        normal, _ = depthwise_norm.normalised(_pixels(s, summed[pl.ds(start, s.rows)]), eps)
        y = (normal * scale + shift).astype(dtype)

        def step(part: Any, total: Array) -> Array:
            h = dot(y, first[:, part], "nn") + first_bias[:, part]
            return total + dot(gelu(h, exact).astype(dtype), second[part], "nn")

        branch = (_over_hidden(s, step) + second_bias) * gamma
        for i in range(s.rows):
            image, row = _place(s, start + i)
            added = _row(s, branch, i) * _of(share, image)
            out[image, row] = (x[image, row].astype(jnp.float32) + added).astype(dtype)


def _of(share: Any, image: Any) -> Array:
    return share[image if share.shape[0] > 1 else 0]


def _widen(s: _Sizes, start: Any, g: Any, share: Any, wide: Any) -> None:
    """Read a chunk of the result's gradient, times the share of the branch that was added."""
    for i in range(s.rows):
        image, row = _place(s, start + i)
        wide[i, : s.width] = g[image, row].astype(jnp.float32) * _of(share, image)


def _backward(z, g, *refs, s, eps, summed: bool) -> None:
    """Compute the gradient for the image; if `summed`, also those for parameters."""
    operands = [*refs]
    if summed:
        x, around = operands.pop(0), operands.pop()
    share, taps, affine, first, first_bias, second, out, *sums, padded, wide = operands
    if summed:
        to_taps, to_affine, to_first, to_first_bias, to_second = sums
        clear_at_first(sums)
    dtype, exact, rim = out.dtype, out.dtype == jnp.float32, s.side // 2
    _, scale, shift, _, gamma = (affine[i : i + 1] for i in range(5))
    _clear(s, padded)
    if s.wide > s.width:
        wide[...] = jnp.zeros_like(wide)

    @pl.loop(0, s.per * s.height, step=s.rows)
    def differentiate(start: Any) -> None:
        _widen(s, start, g, share, wide)
        chunk = z[0, pl.ds(start, s.rows)] if s.per == 1 else z[...]
        normal, inverse = depthwise_norm.normalised(_pixels(s, chunk), eps)
        y, to_branch = (normal * scale + shift).astype(dtype), _pixels(s, wide[...])
        to_mlp = (to_branch * gamma).astype(dtype)

        def step(part: Any, to_y: Array) -> Array:
            h = dot(y, first[:, part], "nn") + first_bias[:, part]
            to_h = dot(to_mlp, second[part], "nt") * gelu_slope(h, exact)
            if summed:
                hidden = gelu(h, exact).astype(dtype)
                to_first[:, part] += dot(y, to_h.astype(dtype), "tn")
                to_first_bias[:, part] += to_h.sum(0, keepdims=True)
                to_second[part] += dot(hidden, to_branch.astype(dtype), "tn")
            return to_y + dot(to_h.astype(dtype), first[:, part], "nt")

        to_y = _over_hidden(s, step)
        to_z = depthwise_norm.norm_gradient(normal, inverse, to_y * scale)
        for i in range(s.rows):
            image, row = _place(s, start + i)
            depthwise_norm.put_row(padded.at[image], row, rim, _row(s, to_z, i))
        if summed:
            for i, value in enumerate((to_z, to_y * normal, to_y, to_branch)):
                to_affine[i : i + 1] += value.sum(0, keepdims=True)

    def add(image: Any, row: Any, n: int, total: Array) -> None:
        to_image = g[image, row + n].astype(jnp.float32)
        out[image, row + n] = (total[: s.width] + to_image).astype(out.dtype)

    _each_sum(s, padded, taps, add)
    if summed:
        _clear(s, around)
        _put_images(s, x, around)
        _each_image(s, lambda image: _sum_products(s, around.at[image], padded.at[image], to_taps))


def _sum_products(s: _Sizes, x: Any, to_z: Any, out: Any) -> None:
    """Sum what each tap reads, times the gradient of its output."""
    rim, rows = s.side // 2, largest_divisor(s.height, _ROWS // s.wide or 1)
    # All lanes: masks for fewer would cost as much as the products.
    zeros = [jnp.zeros((SUBLANES, LANES), jnp.float32)] * s.side

    def line_of_taps(line: int, group: int, lanes: slice) -> None:
        def add(step: Any, totals: Sequence[Array]) -> list[Array]:
            def read(ref: Any, row: int, column: int) -> Array:
                return ref[group, pl.ds(step * rows + row, rows), column : column + s.wide]

            g = read(to_z, rim, rim)
            columns = (read(x, line, column) for column in range(s.side))
            return [
                total + (g * part).reshape(-1, SUBLANES, LANES).sum(0)
                for total, part in zip(totals, columns, strict=True)
            ]

        totals = jax.lax.fori_loop(0, s.height // rows, add, zeros)
        for column, total in enumerate(totals):
            tap = line * s.side + column
            sums = total.sum(0, keepdims=True)
            out[tap : tap + 1, lanes] += sums[:, : lanes.stop - lanes.start]

    for group, lanes in enumerate(lane_groups(s.channels)):
        for line in range(s.side):
            line_of_taps(line, group, lanes)


def _cost(s: _Sizes, products: int, channels: int, hidden: int, powers: int) -> KernelCost:
    """Count an image: products with a matrix of weights, and vector operations on registers of its
    channels, including the taps', and of the hidden layer; powers have their own unit.
    """
    pixels = s.height * s.wide
    both = product(pixels, s.channels, s.hidden) + product(pixels, s.hidden, s.channels)
    vectors = elementwise(pixels, s.channels, channels) + elementwise(pixels, s.hidden, hidden)
    return both * (products / 2) + vectors + KernelCost(0, pixels * s.hidden * powers)


def _share(share: Array | None, channels: int) -> Array:
    share = jnp.ones(1) if share is None else share
    return jnp.broadcast_to(share.astype(jnp.float32)[:, None, None], (len(share), 1, channels))


def _operands(p: BlockParameters, dtype: Any, flipped: bool) -> list[Array]:
    taps = p.taps.reshape(-1, p.taps.shape[3]).astype(jnp.float32)
    affine = jnp.stack([p.bias, p.scale, p.shift, p.second_bias, p.gamma]).astype(jnp.float32)
    first_bias = p.first_bias[None].astype(jnp.float32)
    weights = p.first.astype(dtype), first_bias, p.second.astype(dtype)
    return [taps[::-1] if flipped else taps, affine, *weights]


@static_jit
def forward(
    x: Array, share: Array | None, p: BlockParameters, *, eps: float, keep: bool = True
) -> list[Array]:
    """Compute the block for f[B,H,W,C]; if `keep`, also return what `backward` needs.

    The share `share` f[B] of the branch is added to each image; None: all of it.
    """
    s = _sizes(x, p)
    body, cost = functools.partial(_forward, s=s, eps=eps), _cost(s, 2, 2 * s.side**2 + 28, 16, 1)
    return over_images(
        Kernel("convnext_block", body, cost, [s.padded, s.matrix], _values(s)),
        [x],
        [x.shape[1:], (s.height, s.wide, s.channels)][: 1 + keep],
        per=s.per,
        repeated=[_share(share, s.channels)],
        parameters=_operands(p, x.dtype, flipped=False),
    )


@static_jit
def backward(
    x: Array | None, z: Array, g: Array, share: Array | None, p: BlockParameters, *, eps: float
) -> tuple[Array, BlockParameters | None]:
    """Compute the gradient for images from the result's gradient and what `forward` kept.

    With the images `x`, also compute the gradients for the parameters, in float32.
    """
    s, summed, taps = _sizes(g, p), x is not None, p.taps.shape[0] ** 2
    cost = _cost(s, 5, 5 * taps + 60, 24, 2) if summed else _cost(s, 3, 2 * taps + 45, 19, 2)
    sums = [(taps, s.channels), (SUBLANES, s.channels), (s.channels, s.hidden), (1, s.hidden)]
    scratch = [s.padded, (s.rows, s.wide, s.channels), *[s.padded] * summed]
    out, *totals = over_images(
        Kernel(
            f"convnext_block_{'sums' if summed else 'gradient'}",
            functools.partial(_backward, s=s, eps=eps, summed=summed),
            *(cost, scratch, _values(s)),
        ),
        [z, g] if x is None else [z, g, x],
        [g.shape[1:]],
        per=s.per,
        repeated=[_share(share, s.channels)],
        parameters=_operands(p, g.dtype, flipped=True),
        sums=[*sums, (s.hidden, s.channels)] if summed else (),
    )
    if not summed:
        return out, None
    to_taps, affine, first, first_bias, second = totals
    wide = BlockParameters(*(a.astype(jnp.float32) for a in p))
    to_bias, to_scale, to_shift, to_branch = affine[:4]
    gradients = BlockParameters(
        *(to_taps.reshape(p.taps.shape), to_bias, to_scale, to_shift, first, first_bias[0]),
        **wide.of_branch(second, to_branch),
    )
    return out, gradients
