"""LayerNorm of tokens as one kernel, with one read and one write.

XLA reads tokens once for the means, once for the variances and once to normalize. The gradient's
kernel recomputes both, and adds the gradient of a residual connection to the same tokens. If
parameter gradients are requested, it sums them over all images in float32.

By the declared costs, 88 images of 197 tokens of width 384 take a v5e 0.02 ms to compute and 0.03
ms to move (27 MB), twice that in the gradient, unless the compiler keeps them in fast memory.
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
    KernelCost,
    clear_at_first,
    elementwise,
    over_images,
    tiled,
)
from jaxrobust.models.kernels.tpu.depthwise_norm import norm_gradient, normalised

Array = jax.Array
_TILE = 16  # rows of bfloat16
_REGISTERS = 24  # registers f32[8,128] of an array to process at once
_BLOCK = 2**20  # approximate bytes of an operand per grid step
WIDTH = 2048  # maximum width of a token
TOKENS = 4  # minimum tokens per row


def refused(x: Array) -> str | None:
    """Say why the kernel does not support these tokens; None: it does."""
    if x.ndim < 3 or x.shape[-2] < TOKENS:
        return f"{x.shape} has fewer than {TOKENS} tokens in a row"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"{x.dtype} is neither float32 nor bfloat16"
    if x.shape[-1] > WIDTH or tiled(x.shape[-2:], x.dtype.itemsize) > 2 * _BLOCK:
        return f"{x.shape[-2]} tokens of width {x.shape[-1]} are too many for a step"
    return None


def _for_parts(x: Any, call: Callable[[tuple[Any, slice]], None]) -> None:
    """Call for rows of tokens that fit in registers: a few images, or a part of one."""
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
    """Compute the gradient for the tokens and, if sums are requested, for parameters."""
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
    # For eight tokens, two sums over 128 lanes take seven steps each, whatever the width.
    across = KernelCost(cycles=14 * -(-tokens // SUBLANES))
    out, *sums = over_images(
        Kernel(name, body, elementwise(tokens, width, operations) + across),
        images,
        [(tokens, width)],
        per=largest_divisor(images[0].shape[0], max(1, _BLOCK // bytes_of_one)),
        parameters=[affine.astype(jnp.float32)],
        sums=[(2, width)] if summed else (),
    )
    return [out.reshape(shape), *sums]


@static_jit
def forward(x: Array, scale: Array, shift: Array, *, eps: float) -> Array:
    """Normalize f[B,..,N,C] over its last axis, then scale and shift it."""
    affine = jnp.stack([scale, shift])
    (out,) = _run("token_norm", functools.partial(_forward, eps=eps), 16, [x], affine)
    return out


@static_jit
def backward(
    x: Array, gradients: Sequence[Array], scale: Array, *, eps: float, needed: bool
) -> tuple[Array, tuple[Array, Array] | None]:
    """Compute the gradient for `x` from the result's gradient, plus the gradients after it; if
    `needed`, also those for scale and shift, in float32.
    """
    body = functools.partial(_backward, eps=eps, gradients=len(gradients))
    name, operations = ("token_norm_sums", 34) if needed else ("token_norm_gradient", 27)
    out, *sums = _run(name, body, operations, [x, *gradients], scale[None], needed)
    return out, (sums[0][0], sums[0][1]) if needed else None
