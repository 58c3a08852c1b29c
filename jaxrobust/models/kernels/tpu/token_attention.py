"""Self-attention, directly on the product that makes queries, keys and values.

Scores exist only in fast memory: the kernel reads an image's queries, keys and values and writes
its tokens, and the backward pass recomputes the probabilities. XLA writes scores f[B,h,N,N] in
float32 and bfloat16 and copies f[B,N,3,h,d] into another layout with half of the lanes unused: in
an attack step of a ViT-S block with 88 images, operations on arrays of heads take 66% of the cycles
for 8% of the arithmetic.

Rows of the scores are keys, so that no softmax sums over lanes, and heads that fill the lanes are
computed side by side. In the compiler's final schedule an image of 197 tokens and 6 heads takes
1,844 cycles of a v5e, and its gradient 3,490; queries in rows, head by head, 2,418 and 5,712.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxrobust.models.kernels.primitives import largest_divisor, static_jit
from jaxrobust.models.kernels.tpu.calls import (
    LANES,
    Kernel,
    dot,
    elementwise,
    fast_memory,
    lane_groups,
    over_images,
    product,
    softmax,
    softmax_gradient,
    thirds,
)
from jaxrobust.models.kernels.tpu.stem_blocks import split

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
        return f"the head width {dim / heads:g} is not a multiple of {WIDTH}"
    return None


def _alone(x: Array, heads: int) -> list[Array]:
    """Return `x` once for each of its heads, with zeros in the lanes of the others."""
    head = lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1) // (x.shape[1] // heads)
    return [jnp.where(head == i, x, jnp.zeros_like(x)) for i in range(heads)] if heads > 1 else [x]


def _probabilities(q: list[Array], k: Array, scale: float, bias: Any, at: Any) -> list[Array]:
    """Compute each head's f32[N,N], whose rows are keys; `at`: image and group."""
    logits = [dot(k, each, "nt") * scale for each in q]
    if bias:
        image, first = 0 if bias[0].shape[0] == 1 else at[0], at[1] * len(q)
        rows = [bias[0][image, first + i].astype(jnp.float32) for i in range(len(q))]
        logits = [each + row.T for each, row in zip(logits, rows, strict=True)]
    return [softmax(each, axis=0) for each in logits]


def _products(maps: Sequence[Array], rows: Sequence[Array], dtype: Any) -> Array:
    first, *others = (dot(a.astype(dtype), b, "nn") for a, b in zip(maps, rows, strict=True))
    return sum(others, first).astype(dtype)


def _columns(rows: Array, maps: Sequence[Array], dtype: Any) -> Array:
    """Sum each head's lanes of `rows` times its map over keys, for all queries."""
    parts = zip(split(rows.T, len(maps)), maps, strict=True)
    return jnp.concatenate([dot(a, b.astype(dtype), "nn") for a, b in parts]).astype(dtype).T


def _forward(qkv, *bias_and_out, size: int, together: int, scale: float) -> None:
    *bias, out = bias_and_out

    @pl.loop(0, out.shape[0])
    def attend(image: Any) -> None:
        for group, lanes in enumerate(lane_groups(out.shape[2], size)):
            q, k, v = (qkv[image, :, part] for part in thirds(out.shape[2], lanes))
            p = _probabilities(_alone(q, together), k, scale, bias, (image, group))
            out[image, :, lanes] = _columns(v, p, out.dtype)


def _backward(qkv, g, *bias_and_out, size: int, together: int, scale: float) -> None:
    *bias, out = bias_and_out

    @pl.loop(0, out.shape[0])
    def differentiate(image: Any) -> None:
        for group, lanes in enumerate(lane_groups(g.shape[2], size)):
            parts = thirds(g.shape[2], lanes)
            q, k, v = (qkv[image, :, part] for part in parts)
            q, to_out = _alone(q, together), _alone(g[image, :, lanes], together)
            p = _probabilities(q, k, scale, bias, (image, group))
            pairs = zip(p, to_out, strict=True)
            to_logits = [softmax_gradient(a, dot(v, b, "nt"), axis=0) * scale for a, b in pairs]
            out[image, :, parts[0]] = _columns(k, to_logits, out.dtype)
            out[image, :, parts[1]] = _products(to_logits, q, out.dtype)
            out[image, :, parts[2]] = _products(p, to_out, out.dtype)


def _run(body: Any, arrays: list[Array], bias: Any, heads: int, scale: float) -> Array:
    name, products, operations, parts = "token_attention", 1, 8, 1
    if body is _backward:
        name, products, operations, parts = "token_attention_gradient", 4, 14, 3
    batch, tokens, width = arrays[0].shape
    head, value_bytes = width // 3 // heads, 6 * 4 * tokens * tokens
    fill = LANES // head or 1  # heads
    fits = head * fill == LANES and heads % fill == 0 and fill * value_bytes <= fast_memory()
    together = fill if fits else 1
    body = functools.partial(body, size=together * head, together=together, scale=scale)
    cost = product(tokens, head, tokens) * products + product(head, tokens, tokens)
    cost = (cost + elementwise(tokens, tokens, operations, powers=1)) * heads
    kernel = Kernel(name, body, cost, value_bytes=together * value_bytes)
    repeated, period = ((), batch) if bias is None else ((bias,), bias.shape[0])
    per = largest_divisor(batch if period == 1 else period, max(1, _ROWS // tokens))
    outs = [(tokens, parts * width // 3)]
    return over_images(kernel, arrays, outs, per=per, repeated=repeated)[0]


@static_jit
def forward(qkv: Array, bias: Array | None = None, *, heads: int, scale: float) -> Array:
    """Compute the attention of f[B,N,3*D] as f[B,N,D]; `bias` f[P,h,N,N], P dividing B."""
    return _run(_forward, [qkv], bias, heads, scale)


@static_jit
def backward(qkv: Array, g: Array, bias: Array | None = None, *, heads: int, scale: float) -> Array:
    """Compute the gradient f[B,N,3*D] of `forward` for its product, from its result's gradient."""
    return _run(_backward, [qkv, g], bias, heads, scale)
