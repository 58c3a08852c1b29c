"""Attention of tokens to tokens, straight on the product that makes queries, keys and values.

Scores live in fast memory only: the queries, keys and values of an image come in, its tokens go
out, and the backward pass computes the probabilities again. XLA writes scores f[B,h,N,N] in float32
and bfloat16 and copies f[B,N,3,h,d] into another layout with half of the lanes unused: for an
attack step of a ViT-S block, 88 images, operations on arrays of heads are 66 % of the cycles for
8 % of the arithmetic.

By hand, for one head of 197 tokens and width 64 on a v5e: each product takes 197 rows x 2 tiles / 4
units = 99 cycles, two forward and five backward; a softmax on 25 x 2 registers 150, its gradient
150. So a ViT-S block of 88 images needs 88 x 6 x 1,060 = 0.56 M cycles = 0.37 ms for a step of the
attack (the compiler schedules 2,420 cycles for an image in the forward kernel; by hand 2,080),
and moves 88 x 197 x 384 x (3 + 1 + 3 + 1 + 3) values = 146 MB = 0.18 ms.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrobust.models.kernels.tpu.calls import (
    Kernel,
    KernelCost,
    dot,
    elementwise,
    over_images,
    product,
)

Array = jax.Array
TOKENS = {jnp.dtype("bfloat16"): 1024, jnp.dtype("float32"): 896}  # at most, in 16 MiB of a TPU v4
WIDTH = 32  # which divides the width of a head
_ROWS = 512  # of tokens, about, in one step: as many small windows as make that


def refused(tokens: int, dim: int, heads: int, dtype: jnp.dtype) -> str | None:
    """Say why the kernel does not take such an attention; None: it does."""
    if dtype not in TOKENS:
        return f"{dtype} is neither float32 nor bfloat16"
    if tokens > TOKENS[dtype]:
        return f"{tokens} tokens of {dtype} are more than {TOKENS[dtype]}"
    if dim % heads or dim // heads % WIDTH:
        return f"heads of width {dim / heads:g} are no multiple of {WIDTH}"
    return None


def _probabilities(q: Array, k: Array, scale: float, bias: Array | None) -> Array:
    logits = dot(q, k, "nt") * scale
    logits = logits if bias is None else logits + bias
    powers = jnp.exp(logits - logits.max(-1, keepdims=True))
    return powers * (1 / powers.sum(-1, keepdims=True))


def _columns(start: int, width: int) -> slice:
    return slice(start, start + width)


def _bias_of(bias, image, head: int) -> Array | None:
    if not bias:
        return None
    return bias[0][0 if bias[0].shape[0] == 1 else image, head].astype(jnp.float32)


def _forward(qkv, *rest, heads: int, scale: float) -> None:
    from jax.experimental import pallas as pl

    *bias, out = rest
    dim = out.shape[2]
    width = dim // heads

    @pl.loop(0, out.shape[0])
    def attend(image: Any) -> None:
        for head in range(heads):
            q, k, v = (qkv[image, :, _columns(i * dim + head * width, width)] for i in range(3))
            p = _probabilities(q, k, scale, _bias_of(bias, image, head)).astype(v.dtype)
            out[image, :, _columns(head * width, width)] = dot(p, v, "nn").astype(out.dtype)


def _backward(qkv, g, *rest, heads: int, scale: float) -> None:
    from jax.experimental import pallas as pl

    *bias, out = rest
    dim = g.shape[2]
    width = dim // heads

    @pl.loop(0, out.shape[0])
    def differentiate(image: Any) -> None:
        for head in range(heads):
            q, k, v = (qkv[image, :, _columns(i * dim + head * width, width)] for i in range(3))
            to_out = g[image, :, _columns(head * width, width)]
            p = _probabilities(q, k, scale, _bias_of(bias, image, head))
            to_p = dot(to_out, v, "nt")
            to_logits = p * (to_p - (p * to_p).sum(-1, keepdims=True))
            to_logits = (to_logits * scale).astype(q.dtype)
            parts = dot(to_logits, k, "nn"), dot(to_logits, q, "tn")
            for i, part in enumerate((*parts, dot(p.astype(v.dtype), to_out, "tn"))):
                out[image, :, _columns(i * dim + head * width, width)] = part.astype(out.dtype)


def _images(batch: int, tokens: int, period: int) -> int:
    """Find how many images one step of the grid takes; it divides the batch and the period."""
    most = max(1, _ROWS // tokens)
    whole = batch if period == 1 else period
    return max(n for n in range(1, most + 1) if whole % n == 0)


def _run(
    body: Callable[..., None],
    name: str,
    arrays: list[Array],
    width: int,
    cost: KernelCost,
    *,
    heads: int,
    scale: float,
    bias: Array | None,
    interpret: bool,
) -> Array:
    batch, tokens, _ = arrays[0].shape
    body = functools.partial(body, heads=heads, scale=scale)
    (out,) = over_images(
        Kernel(name, body, cost * heads, beside=6 * 4 * tokens * tokens),
        arrays,
        [(tokens, width)],
        per=_images(batch, tokens, 1 if bias is None else bias.shape[0]),
        repeated=() if bias is None else (bias,),
        interpret=interpret,
    )
    return out


def _softmax_cost(tokens: int) -> KernelCost:
    return elementwise(tokens, tokens, 8, powers=1)


@functools.partial(jax.jit, static_argnames=("heads", "scale", "interpret"))
def forward(
    qkv: Array, heads: int, *, scale: float, bias: Array | None = None, interpret: bool = False
) -> Array:
    """Compute the attention of f[B,N,3*D] as f[B,N,D]; `bias` f[P,h,N,N], P dividing B."""
    tokens, dim = qkv.shape[1], qkv.shape[2] // 3
    products = product(tokens, dim // heads, tokens) + product(tokens, tokens, dim // heads)
    cost = products + _softmax_cost(tokens)
    how: dict[str, Any] = {"heads": heads, "scale": scale, "bias": bias, "interpret": interpret}
    return _run(_forward, "token_attention", [qkv], dim, cost, **how)


@functools.partial(jax.jit, static_argnames=("heads", "scale", "interpret"))
def backward(
    qkv: Array,
    g: Array,
    heads: int,
    *,
    scale: float,
    bias: Array | None = None,
    interpret: bool = False,
) -> Array:
    """Compute the gradient f[B,N,3*D] of `forward` for its product, from that of its result."""
    tokens, dim = g.shape[1:]
    width = dim // heads
    products = product(tokens, width, tokens) * 2 + product(tokens, tokens, width) * 3
    cost = products + _softmax_cost(tokens) + elementwise(tokens, tokens, 6)
    how: dict[str, Any] = {"heads": heads, "scale": scale, "bias": bias, "interpret": interpret}
    return _run(_backward, "token_attention_gradient", [qkv, g], 3 * dim, cost, **how)
