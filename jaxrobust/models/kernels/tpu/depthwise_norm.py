"""ConvNeXt's depthwise convolution, bias and LayerNorm as one kernel, and its input gradient.

A block of the network reads its images once for both: rows of an image, padded with zeros, lie in
float32 in fast memory, each output row adds up its taps in registers, and is normalised there. The
gradient of the LayerNorm goes into such a padded image again, which the flipped taps read.

By hand, on a v5e: a row of 56 x 128 values is 7 registers, so one with 49 taps takes 49 x 7 x 2
vector operations / 4 = 172 cycles; XLA's convolution of 88 images of 56 x 56 x 96 takes 2.65 ms,
this 88 x 56 x 172 = 0.85 M cycles = 0.57 ms and the LayerNorm.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
_LANES, _SUBLANES, _UNITS = 128, 8, 4
_FAST = 64 * 2**20  # bytes of fast memory that every chip since v5e has for a kernel
_UNROLLED = 4  # rows at once: norms wait for their sums, which other rows' taps fill


def _blocks(channels: int) -> list[slice]:
    """Part channels into as many as a register has lanes."""
    return [slice(c, min(c + _LANES, channels)) for c in range(0, channels, _LANES)]


def _together(height: int) -> int:
    return next(n for n in (_UNROLLED, 7, 3, 2, 1) if height % n == 0)


def refused(x: Array, kernel: Array) -> str | None:
    """Say why the kernel does not take such images; None: it does."""
    _, height, width, channels = x.shape
    side = kernel.shape[0]
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{x.dtype} is neither float32 nor bfloat16"
    if side != kernel.shape[1] or side % 2 == 0:
        return f"a window of {side}x{kernel.shape[1]} is not square and odd"
    padded = 4 * math.prod(_padded(height, width, channels, side))
    if padded + 8 * 4 * height * width * channels > _FAST:
        return f"images of {height}x{width}x{channels} are larger than a chip's fast memory"
    return None


def _padded(height: int, width: int, channels: int, side: int) -> tuple[int, ...]:
    """Return the shape of the padded image: groups of 128 channels, rows, columns, channels."""
    wide = math.ceil((width + side - 1) / _SUBLANES) * _SUBLANES
    return math.ceil(channels / _LANES), height + side - 1, wide, _LANES


def _clear(padded: Any, height: int, width: int, rim: int) -> None:
    """Write zeros around the image."""
    for rows in (slice(rim), slice(rim + height, None)):
        padded[:, rows] = jnp.zeros_like(padded[:, rows])
    for columns in (slice(rim), slice(rim + width, None)):
        padded[:, :, columns] = jnp.zeros_like(padded[:, :, columns])


def _put(padded: Any, row: Any, rim: int, values: Array) -> None:
    """Write a row f[W,C] into the padded image f32[blocks,H+2*rim,W+2*rim,128]."""
    width, channels = values.shape
    for b, block in enumerate(_blocks(channels)):
        part = values[:, block].astype(jnp.float32)
        padded[b, row + rim, rim : rim + width, : part.shape[1]] = part


def _taps(padded: Any, kernel: Any, row: Any, width: int, channels: int, side: int) -> Array:
    """Add up one row f32[W,C] of the convolution; `kernel` is f32[side**2,C]."""
    parts = []
    for b, block in enumerate(_blocks(channels)):
        count = block.stop - block.start
        total = jnp.zeros((width, count), jnp.float32)
        for i in range(side * side):
            seen = padded[b, row + i // side, i % side : i % side + width, :count]
            total += seen * kernel[i : i + 1, block]
        parts.append(total)
    return jnp.concatenate(parts, -1) if len(parts) > 1 else parts[0]


def _normalised(x: Array, eps: float) -> tuple[Array, Array]:
    centred = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + eps)
    return centred * inverse, inverse


def _forward(x, kernel, affine, *rest, side: int, eps: float) -> None:
    from jax.experimental import pallas as pl

    *outs, padded = rest
    _, height, width, channels = x.shape
    rim = side // 2
    _clear(padded, height, width, rim)

    @pl.loop(0, height)
    def _(row):
        _put(padded, row, rim, x[0, row])

    bias, scale, shift = (affine[i : i + 1] for i in range(3))

    @pl.loop(0, height, unroll=_together(height))
    def _(row):
        z = _taps(padded, kernel, row, width, channels, side) + bias
        outs[0][0, row] = (_normalised(z, eps)[0] * scale + shift).astype(outs[0].dtype)
        if len(outs) > 1:
            outs[1][0, row] = z.astype(outs[1].dtype)


def _backward(z, g, beside, kernel, affine, out, padded, *, side: int, eps: float) -> None:
    from jax.experimental import pallas as pl

    _, height, width, channels = z.shape
    rim = side // 2
    _clear(padded, height, width, rim)
    scale = affine[1:2]

    @pl.loop(0, height, unroll=_together(height))
    def _(row):
        normal, inverse = _normalised(z[0, row].astype(jnp.float32), eps)
        to_normal = g[0, row].astype(jnp.float32) * scale
        along = (to_normal * normal).mean(-1, keepdims=True)
        to_z = inverse * (to_normal - to_normal.mean(-1, keepdims=True) - normal * along)
        _put(padded, row, rim, to_z)

    @pl.loop(0, height, unroll=_together(height))
    def _(row):
        to_x = _taps(padded, kernel, row, width, channels, side)
        out[0, row] = (to_x + beside[0, row].astype(jnp.float32)).astype(out.dtype)


def _call(body, name, arrays, shared, outs, side, interpret):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    batch, height, width, channels = arrays[0].shape
    image = pl.BlockSpec((1, height, width, channels), lambda i: (i, 0, 0, 0))
    padded = _padded(height, width, channels, side)
    return pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)] * outs,
        grid=(batch,),
        in_specs=[image] * len(arrays) + [pl.BlockSpec(a.shape, lambda i: (0, 0)) for a in shared],
        out_specs=[image] * outs,
        scratch_shapes=[pltpu.VMEM(padded, jnp.float32)],
        name=name,
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=_FAST
        ),
    )(*arrays, *shared)


def forward(x, kernel, bias, scale, shift, *, eps: float, keep: bool = True, interpret: bool = False):
    """Return normed f[B,H,W,C] and, with `keep`, the convolution before the norm."""
    side = kernel.shape[0]
    taps = kernel.reshape(side * side, -1).astype(jnp.float32)
    affine = jnp.stack([bias, scale, shift]).astype(jnp.float32)
    body = functools.partial(_forward, side=side, eps=eps)
    return _call(body, "depthwise_norm", [x], [taps, affine], 1 + keep, side, interpret)


def backward(z, g, beside, kernel, scale, *, eps: float, interpret: bool = False):
    """Return the gradient of `x`, with `beside` added."""
    side = kernel.shape[0]
    taps = kernel.reshape(side * side, -1)[::-1].astype(jnp.float32)
    affine = jnp.stack([scale, scale]).astype(jnp.float32)
    body = functools.partial(_backward, side=side, eps=eps)
    return _call(body, "depthwise_norm_gradient", [z, g, beside], [taps, affine], 1, side, interpret)[0]
