"""Self-attention, directly on the product that makes queries, keys and values.

Scores exist only in fast memory: the kernel reads an image's queries, keys and values and writes
its tokens, and the backward pass recomputes the probabilities. XLA writes scores f[B,h,N,N] in
float32 and bfloat16 and copies f[B,N,3,h,d] into another layout with half of the lanes unused: in
an attack step of a ViT-S block with 88 images, operations on arrays of heads take 66% of the cycles
for 8% of the arithmetic.

By the declared costs a ViT-S block takes 0.37 ms of a v5e for an attack step on 88 images; forward
the compiler schedules 2,420 cycles an image, of 2,080 declared.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxrobust.models.kernels.primitives import largest_divisor, static_jit
from jaxrobust.models.kernels.tpu.calls import (
    Kernel,
    KernelCost,
    dot,
    elementwise,
    over_images,
    product,
    softmax,
    softmax_gradient,
)

Array = jax.Array
TOKENS = {jnp.dtype("bfloat16"): 1024, jnp.dtype("float32"): 896}  # maximum, in 16 MiB of a TPU v4
WIDTH = 32  # must divide the width of a head
_ROWS = 512  # approximate tokens per step: as many small windows as fit


def refused(tokens: int, dim: int, heads: int, dtype: jnp.dtype) -> str | None:
    """Say why the kernel does not support this attention; None: it does."""
    if dtype not in TOKENS:
        return f"{dtype} is neither float32 nor bfloat16"
    if tokens > TOKENS[dtype]:
        return f"{tokens} tokens of {dtype} are more than {TOKENS[dtype]}"
    if dim % heads or dim // heads % WIDTH:
        return f"heads of width {dim / heads:g} are not a multiple of {WIDTH}"
    return None


def _each_head(width: int, images: int, heads: int, call: Callable[..., None]) -> None:
    """Call with an image, a head, and the places of its queries, keys and values."""

    @pl.loop(0, images)
    def over(image: Any) -> None:
        for head in range(heads):
            starts = range(head * width, 3 * heads * width, heads * width)
            call(image, head, [slice(start, start + width) for start in starts])


def _bias_of(bias: Sequence[Any], image: Any, head: int) -> Array | None:
    if not bias:
        return None
    return bias[0][0 if bias[0].shape[0] == 1 else image, head].astype(jnp.float32)


def _probabilities(q: Array, k: Array, scale: float, bias: Array | None) -> Array:
    logits = dot(q, k, "nt") * scale
    return softmax(logits if bias is None else logits + bias)


def _forward(qkv, *bias_and_out, heads: int, scale: float) -> None:
    *bias, out = bias_and_out

    def attend(image: Any, head: int, lanes: list[slice]) -> None:
        q, k, v = (qkv[image, :, part] for part in lanes)
        p = _probabilities(q, k, scale, _bias_of(bias, image, head)).astype(v.dtype)
        out[image, :, lanes[0]] = dot(p, v, "nn").astype(out.dtype)

    _each_head(out.shape[2] // heads, out.shape[0], heads, attend)


def _backward(qkv, g, *bias_and_out, heads: int, scale: float) -> None:
    *bias, out = bias_and_out

    def differentiate(image: Any, head: int, lanes: list[slice]) -> None:
        q, k, v = (qkv[image, :, part] for part in lanes)
        to_out = g[image, :, lanes[0]]
        p = _probabilities(q, k, scale, _bias_of(bias, image, head))
        to_logits = softmax_gradient(p, dot(to_out, v, "nt"))
        to_logits = (to_logits * scale).astype(q.dtype)
        to_qk = dot(to_logits, k, "nn"), dot(to_logits, q, "tn")
        parts = *to_qk, dot(p.astype(v.dtype), to_out, "tn")
        for part, gradient in zip(lanes, parts, strict=True):
            out[image, :, part] = gradient.astype(out.dtype)

    _each_head(g.shape[2] // heads, out.shape[0], heads, differentiate)


def _images(batch: int, tokens: int, period: int) -> int:
    """Return the images per grid step, which divide the batch and the period."""
    return largest_divisor(batch if period == 1 else period, max(1, _ROWS // tokens))


def _run(
    name: str, body: Any, arrays: list[Array], bias: Array | None, width: int, cost: KernelCost
) -> Array:
    batch, tokens, _ = arrays[0].shape
    repeated, period = ((), 1) if bias is None else ((bias,), bias.shape[0])
    kernel = Kernel(name, body, cost, value_bytes=6 * 4 * tokens * tokens)
    per = _images(batch, tokens, period)
    return over_images(kernel, arrays, [(tokens, width)], per=per, repeated=repeated)[0]


@static_jit
def forward(qkv: Array, bias: Array | None = None, *, heads: int, scale: float) -> Array:
    """Compute the attention of f[B,N,3*D] as f[B,N,D]; `bias` f[P,h,N,N], P dividing B."""
    tokens, dim = qkv.shape[1], qkv.shape[2] // 3
    products = product(tokens, dim // heads, tokens) + product(tokens, tokens, dim // heads)
    cost = (products + elementwise(tokens, tokens, 8, powers=1)) * heads
    body = functools.partial(_forward, heads=heads, scale=scale)
    return _run("token_attention", body, [qkv], bias, dim, cost)


@static_jit
def backward(qkv: Array, g: Array, bias: Array | None = None, *, heads: int, scale: float) -> Array:
    """Compute the gradient f[B,N,3*D] of `forward` for its product, from its result's gradient."""
    tokens, dim = g.shape[1:]
    products = product(tokens, dim // heads, tokens) * 2 + product(tokens, tokens, dim // heads) * 3
    softmaxes = elementwise(tokens, tokens, 8, powers=1) + elementwise(tokens, tokens, 6)
    body = functools.partial(_backward, heads=heads, scale=scale)
    cost = (products + softmaxes) * heads
    return _run("token_attention_gradient", body, [qkv, g], bias, 3 * dim, cost)
