"""LayerNorm of tokens as one kernel, which reads them once and writes its result once.

XLA reads them once for the means, once for the variances and once to normalise. The gradient's
kernel computes both again, and adds what a residual connection brings back to the same tokens.
Where gradients of parameters are asked for, it adds them up over all images in float32.

For 88 images of 197 tokens of width 384 a v5e computes 0.02 ms by the declared cost and moves 27 MB
in 0.03 ms, in the gradient twice that, unless the compiler keeps them in fast memory.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxrobust.models.kernels.primitives import largest_divisor, static_jit
from jaxrobust.models.kernels.tpu.calls import (
    LANES,
    SUBLANES,
    Kernel,
    clear_at_first,
    elementwise,
    over_images,
    tiled,
)
from jaxrobust.models.kernels.tpu.depthwise_norm import norm_gradient, normalised

Array = jax.Array
_TILE = 16  # rows of bfloat16
_REGISTERS = 24  # of f32[8,128], of an array that is worked on at once
_BLOCK = 2**20  # bytes of an operand in one step of the grid, about
WIDTH = 2048  # of a token, at most
TOKENS = 4  # in a row, at least


def refused(x: Array) -> str | None:
    """Say why the kernel does not take such tokens; None: it does."""
    if x.ndim < 3 or x.shape[-2] < TOKENS:
        return f"{x.shape} has no {TOKENS} tokens in a row"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"{x.dtype} is neither float32 nor bfloat16"
    if x.shape[-1] > WIDTH or tiled(x.shape[-2:], x.dtype.itemsize) > 2 * _BLOCK:
        return f"{x.shape[-2]} tokens of width {x.shape[-1]} are too many for a step"
    return None


def _for_parts(x: Any, call: Callable[[tuple[Any, slice]], None]) -> None:
    """Call for rows of tokens that stay in registers: a few images, or a part of one."""
    images, tokens, width = x.shape
    columns = -(-width // LANES)
    together = largest_divisor(images, max(1, _REGISTERS // (columns * -(-tokens // SUBLANES))))
    step = max(1, _REGISTERS * SUBLANES // columns // _TILE) * _TILE

    @pl.loop(0, images, step=together)
    def over(image: Any) -> None:
        for start in range(0, tokens, step):
            call((pl.ds(image, together), slice(start, min(start + step, tokens))))


def _forward(x, affine, out, *, eps: float) -> None:
    scale, shift = affine[0:1][None], affine[1:2][None]

    def normalise(part: Any) -> None:
        normal, _ = normalised(x[part].astype(jnp.float32), eps)
        out[part] = (normal * scale + shift).astype(out.dtype)

    _for_parts(x, normalise)


def _backward(x, *refs, eps: float, gradients: int) -> None:
    """Compute the gradient for the tokens; where sums are asked for, those for parameters too."""
    (g, *others), (affine, out, *sums) = refs[:gradients], refs[gradients:]
    scale = affine[0:1][None]
    clear_at_first(sums)

    def differentiate(part: Any) -> None:
        normal, inverse = normalised(x[part].astype(jnp.float32), eps)
        to_y = g[part].astype(jnp.float32)
        to_x = norm_gradient(normal, inverse, to_y * scale)
        for other in others:
            to_x = to_x + other[part].astype(jnp.float32)
        out[part] = to_x.astype(out.dtype)
        for to_affine in sums:
            to_affine[0:1] += (to_y * normal).sum(0).sum(0, keepdims=True)
            to_affine[1:2] += to_y.sum(0).sum(0, keepdims=True)

    _for_parts(x, differentiate)


def _run(
    name: str, body: Any, operations: int, arrays: list[Array], affine: Array, summed: bool = False
) -> list[Array]:
    """Run a kernel on f[B,..,N,C], as images f[B,N,C]."""
    shape, tokens, width = arrays[0].shape, *arrays[0].shape[-2:]
    images = [a.reshape(-1, tokens, width) for a in arrays]
    bytes_of_one = tiled((tokens, width), arrays[0].dtype.itemsize)
    out, *sums = over_images(
        Kernel(name, body, elementwise(tokens, width, operations)),
        images,
        [(tokens, width)],
        per=largest_divisor(images[0].shape[0], max(1, _BLOCK // bytes_of_one)),
        parameters=[affine.astype(jnp.float32)],
        sums=[(2, width)] if summed else (),
    )
    return [out.reshape(shape), *sums]


@static_jit
def forward(x: Array, scale: Array, shift: Array, *, eps: float) -> Array:
    """Normalise f[B,..,N,C] over its last axis, then scale and shift it."""
    affine = jnp.stack([scale, shift])
    (out,) = _run("token_norm", functools.partial(_forward, eps=eps), 16, [x], affine)
    return out


@static_jit
def backward(
    x: Array, gradients: Sequence[Array], scale: Array, *, eps: float, needed: bool
) -> tuple[Array, tuple[Array, Array] | None]:
    """Compute the gradient for `x` from that of the result, and add those after it; where
    `needed` also those for scale and shift, in float32.
    """
    body = functools.partial(_backward, eps=eps, gradients=len(gradients))
    name, operations = ("token_norm_sums", 34) if needed else ("token_norm_gradient", 27)
    out, *sums = _run(name, body, operations, [x, *gradients], scale[None], needed)
    return out, (sums[0][0], sums[0][1]) if needed else None
