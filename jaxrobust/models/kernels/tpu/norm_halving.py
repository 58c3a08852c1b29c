"""The layers between ConvNeXt's stages, LayerNorm and 2x2 convolution, as one kernel.

The image is read once and its result written once. The normalized image stays in fast memory, where
the four pixels of each window are read as four matrices, each with every other column. The
gradient's kernel recomputes the norm. If parameter gradients are requested, it sums them over all
images in float32.

For 88 images of 56 x 56 x 96 that become 28 x 28 x 192, the declared costs are 0.37 M cycles of a
v5e, and 0.55 M for the gradient.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxrobust.models.kernels.convnext_layers import HalvingParameters
from jaxrobust.models.kernels.primitives import largest_divisor, static_jit
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
from jaxrobust.models.kernels.tpu.depthwise_norm import norm_gradient, normalised

Array = jax.Array
_ROWS = 256  # of a matrix, at most
_PIXELS = [(p, q) for p in (0, 1) for q in (0, 1)]  # of a window


class _Sizes(NamedTuple):
    """What a kernel processes at a time."""

    per: int  # images
    height: int  # of the result, like the next field
    width: int
    channels: int  # of the image
    outs: int

    @property
    def wide(self) -> int:  # of a row of the result, in whole registers
        return widened_to(self.width, SUBLANES)

    @property
    def rows(self) -> int:  # of the result that are computed at once
        return self.per * largest_divisor(self.height, max(1, _ROWS // self.wide))

    @property
    def pairs(self) -> tuple[int, ...]:  # shape of the pairs of rows that those meet, by registers
        return math.ceil(self.channels / LANES), self.rows, 2, 2 * self.wide, LANES


def _sizes(x: Array, p: HalvingParameters) -> _Sizes:
    """Choose how many images to compute together: small images have thin products."""
    batch, height, width, channels = x.shape
    one = _Sizes(1, height // 2, width // 2, channels, p.kernel.shape[3])
    return one._replace(per=largest_divisor(batch, max(1, _ROWS // (one.height * one.wide))))


def refused(x: Array, p: HalvingParameters, stride: int) -> str | None:
    """Say why the kernel does not support these images; None: it does."""
    if x.dtype != jnp.bfloat16:
        return f"{x.dtype} is not bfloat16"
    if p.kernel.shape[:2] != (2, 2) or stride != 2:
        return "its windows are not 2x2 with stride 2"
    if x.shape[1] % 2 or x.shape[2] % 2:
        return f"{x.shape[1]}x{x.shape[2]} px are not even"
    s = _sizes(x, p)
    maps = 2 * tiled(x.shape[1:], 2) + tiled((s.height, s.width, s.outs), 2)
    weights = p.kernel.size * (2 + 4) + 2 * tiled(s.pairs, 4)
    if 2 * s.per * maps + weights + _values(s) > fast_memory():
        return f"{x.shape[1]}x{x.shape[2]}x{s.channels} is larger than the fast memory of a chip"
    return None


def _values(s: _Sizes) -> int:
    return 4 * tiled(s.pairs, 4) + 2 * tiled((s.rows, s.wide, s.outs), 4)


def _read(ref: Any, start: Any, rows: int) -> Array:
    """Read rows f32[rows,W,C] of one image, or all rows of several."""
    part = ref[0, pl.ds(start, rows)] if ref.shape[0] == 1 else ref[...]
    return part.astype(jnp.float32).reshape(rows, *ref.shape[2:])


def _write(ref: Any, start: Any, rows: Array) -> None:
    if ref.shape[0] == 1:
        ref[0, pl.ds(start, len(rows))] = rows.astype(ref.dtype)
    else:
        ref[...] = rows.reshape(ref.shape).astype(ref.dtype)


def _put(s: _Sizes, pairs: Any, rows: Array) -> None:
    """Write f32[2*rows,W,C] into pairs of rows."""
    rows = rows.reshape(s.rows, 2, 2 * s.width, s.channels)
    for i, lanes in enumerate(lane_groups(s.channels)):
        pairs[i, :, :, : 2 * s.width, : lanes.stop - lanes.start] = rows[..., lanes]


def _get(s: _Sizes, pairs: Any) -> Array:
    """Read f32[2*rows,W,C] from pairs of rows."""
    parts = [pairs[i, :, :, : 2 * s.width] for i in range(pairs.shape[0])]
    rows = jnp.concatenate(parts, -1)[..., : s.channels]
    return rows.reshape(2 * s.rows, 2 * s.width, s.channels)


def _window(s: _Sizes, group: int, p: int, q: int) -> tuple[Any, ...]:
    every = slice(None)
    return slice(group, group + 1), every, slice(p, p + 1), pl.ds(q, s.wide, stride=2), every


def _put_pixels(s: _Sizes, pairs: Any, p: int, q: int, pixels: Array) -> None:
    """Write a pixel of each window, f32[rows*wide,C]."""
    for i, lanes in enumerate(lane_groups(s.channels)):
        missing = LANES - (lanes.stop - lanes.start)
        part = jnp.pad(pixels[:, lanes], ((0, 0), (0, missing))) if missing else pixels[:, lanes]
        pairs[_window(s, i, p, q)] = part.reshape(1, s.rows, 1, s.wide, LANES)


def _get_pixels(s: _Sizes, pairs: Any, p: int, q: int) -> Array:
    """Read a pixel of each window, f32[rows*wide,C]."""
    parts = [pairs[_window(s, i, p, q)].reshape(-1, LANES) for i in range(pairs.shape[0])]
    return jnp.concatenate(parts, -1)[:, : s.channels]


def _clear(s: _Sizes, *widened: Any) -> None:
    for ref in widened if s.wide > s.width else ():
        ref[...] = jnp.zeros_like(ref)


def _forward(x, affine, kernel, bias, out, pairs, *, s, eps) -> None:
    scale, shift = affine[0:1][None], affine[1:2][None]
    _clear(s, pairs)

    @pl.loop(0, s.per * s.height, step=s.rows)
    def halve(start: Any) -> None:
        normal, _ = normalised(_read(x, 2 * start, 2 * s.rows), eps)
        _put(s, pairs, normal * scale + shift)
        total = bias[...]
        for i, (p, q) in enumerate(_PIXELS):
            total = total + dot(_get_pixels(s, pairs, p, q).astype(x.dtype), kernel[i], "nn")
        _write(out, start, total.reshape(s.rows, s.wide, s.outs)[:, : s.width])


def _backward(x, g, affine, kernel, out, *refs, s, eps) -> None:
    """Compute the gradient for the image and, given references to sums, for parameters."""
    *sums, pairs, gradients, wide = refs
    dtype = out.dtype
    scale, shift = affine[0:1][None], affine[1:2][None]
    _clear(s, pairs, wide)
    if sums:
        to_kernel, to_bias, to_affine = sums
        clear_at_first(sums)

    @pl.loop(0, s.per * s.height, step=s.rows)
    def differentiate(start: Any) -> None:
        wide[:, : s.width] = _read(g, start, s.rows)
        to_out = wide[...].reshape(-1, s.outs)
        rounded = to_out.astype(dtype)
        for i, (p, q) in enumerate(_PIXELS):
            _put_pixels(s, gradients, p, q, dot(rounded, kernel[i], "nt"))
        normal, inverse = normalised(_read(x, 2 * start, 2 * s.rows), eps)
        to_y = _get(s, gradients)
        _write(out, 2 * start, norm_gradient(normal, inverse, to_y * scale))
        if sums:
            _put(s, pairs, normal * scale + shift)
            for i, (p, q) in enumerate(_PIXELS):
                to_kernel[i] += dot(_get_pixels(s, pairs, p, q).astype(dtype), rounded, "tn")
            to_bias[...] += to_out.sum(0, keepdims=True)
            to_affine[0:1] += (to_y * normal).sum(0).sum(0, keepdims=True)
            to_affine[1:2] += to_y.sum(0).sum(0, keepdims=True)


def _cost(s: _Sizes, operations: int, products: int) -> KernelCost:
    one = product(s.height * s.wide, s.channels, s.outs)
    return one * (4 * products) + elementwise(4 * s.height * s.width, s.channels, operations)


def _operands(p: HalvingParameters, dtype: Any) -> list[Array]:
    affine = jnp.stack([p.scale, p.shift]).astype(jnp.float32)
    return [affine, p.kernel.reshape(4, *p.kernel.shape[2:]).astype(dtype)]


@static_jit
def forward(x: Array, p: HalvingParameters, *, eps: float) -> Array:
    """Compute f[B,H/2,W/2,D] of f[B,H,W,C]."""
    s = _sizes(x, p)
    body = functools.partial(_forward, s=s, eps=eps)
    kernel = Kernel("norm_halving", body, _cost(s, 25, 1), [s.pairs], _values(s))
    parameters = [*_operands(p, x.dtype), p.bias[None].astype(jnp.float32)]
    return over_images(
        kernel, [x], [(s.height, s.width, s.outs)], per=s.per, parameters=parameters
    )[0]


@static_jit
def backward(
    x: Array, g: Array, p: HalvingParameters, *, eps: float, needed: bool
) -> tuple[Array, HalvingParameters | None]:
    """Compute the gradient for `x` from the result's gradient and, if `needed`, those for the
    parameters, in float32.
    """
    s = _sizes(x, p)
    name, cost = "norm_halving_gradient", _cost(s, 45, 1)
    if needed:
        name, cost = "norm_halving_sums", _cost(s, 52, 2)
    body, scratch = functools.partial(_backward, s=s, eps=eps), (s.rows, s.wide, s.outs)
    out, *sums = over_images(
        Kernel(name, body, cost, [s.pairs, s.pairs, scratch], _values(s)),
        [x, g],
        [x.shape[1:]],
        per=s.per,
        parameters=_operands(p, x.dtype),
        sums=[(4, s.channels, s.outs), (1, s.outs), (2, s.channels)] if needed else (),
    )
    if not needed:
        return out, None
    kernel, bias, (to_scale, to_shift) = sums
    return out, HalvingParameters(to_scale, to_shift, kernel.reshape(p.kernel.shape), bias[0])
