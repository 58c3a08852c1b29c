"""CaiT's talking-heads attention, directly on the product of queries, keys and values.

The kernel reads an image and writes its tokens: scores exist only in fast memory, and the backward
pass recomputes the probabilities. XLA writes scores f[B,h,N,N] in both types, and mixes heads on
copies of them.

Scores stay in float32 until their softmax, and gradients of mixed scores until the first mix: with
rounded factors in a bfloat16 product, either mix would move a gradient by 10% at logits of 200. A
head's scores are the product of its channels within whole registers, the others set to 0, so no
lane moves; eight heads of scores are mixed in registers. The second mix is applied after the
product with the values: each head's channels have the weight of their head. So no array of
probabilities is mixed, and both mixes' gradients are token sums of arrays f[N,D] that exist anyway.

By the declared costs an attack step on 88 images of 196 tokens, 384 channels in 8 heads, takes 88 x
(6,432 + 14,916) cycles = 1.25 ms of a v5e (the compiler schedules 6.6 and 14.6 k per image).
"""

import functools
import math
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
    dot,
    elementwise,
    fast_memory,
    lane_groups,
    over_images,
    product,
    softmax,
    softmax_gradient,
    tiled,
    widened_to,
)

Array = jax.Array
Mix = tuple[Array, Array]
WIDTH = 32  # must divide the number of channels
_UNROLLED = 2  # maximum heads per loop iteration: one head's products hide another's softmax
_REGISTERS = 5  # maximum per mixed head: eight heads take 40 of 64


def refused(tokens: int, dim: int, heads: int, dtype: jnp.dtype) -> str | None:
    """Say why the kernel does not support this attention; None: it does."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"{dtype} is neither float32 nor bfloat16"
    if dim % WIDTH or dim % heads:
        return f"{dim} channels are not a multiple of {WIDTH} and of {heads} heads"
    blocks = 2 * tiled((tokens, 7 * dim), jnp.dtype(dtype).itemsize)
    scores = 2 * tiled(_scores(tokens, heads), 4)
    if blocks + scores + _value_bytes(tokens, dim) > fast_memory():
        return f"{tokens} tokens of {dim} channels are larger than the fast memory of a chip"
    return None


def _value_bytes(tokens: int, dim: int) -> int:
    return 6 * tiled((tokens, tokens), 4) + 6 * tiled((tokens, dim), 4)


def _scores(tokens: int, heads: int) -> tuple[int, ...]:
    return heads, widened_to(tokens, SUBLANES), tokens


def _lanes(head: int, dim: int, heads: int) -> tuple[int, int]:
    """Return the whole registers that hold a head's channels."""
    first, last = head * dim // heads, (head + 1) * dim // heads
    return first // LANES * LANES, min(-(-last // LANES) * LANES, dim)


def _products(a: Array, b: Array, heads: int, out: Any) -> None:
    """Write the product of each head's channels f[N,d] into a row of f32[heads,...].

    A head's channels are cut at register boundaries; those of other heads are set to 0.
    """
    tokens, dim = a.shape
    width = dim // heads
    for head in range(heads):
        start, end = _lanes(head, dim, heads)
        lanes = start + jax.lax.broadcasted_iota(jnp.int32, (1, end - start), 1)
        is_of_head = ((lanes >= head * width) & (lanes < (head + 1) * width)).astype(jnp.float32)
        part = (a[:, start:end].astype(jnp.float32) * is_of_head).astype(a.dtype)
        out[head, :tokens] = dot(part, b[:, start:end], "nt")


def _mix(scores: Any, weights: Any) -> None:
    """Mix heads of scores f32[h,N,N] in place by f32[h*h,128], each row a repeated value."""
    heads, height, tokens = scores.shape
    size = largest_divisor(height // SUBLANES, _REGISTERS) * SUBLANES

    @pl.loop(0, height // size)
    def mix(block: Any) -> None:
        rows = pl.ds(pl.multiple_of(block * size, SUBLANES), size)
        for start in range(0, tokens, LANES):
            lanes = slice(start, min(start + LANES, tokens))
            unmixed = [scores[head, rows, lanes] for head in range(heads)]
            for head in range(heads):
                factors = (weights[head * heads + i, : lanes.stop - start] for i in range(heads))
                terms = (x * factor[None] for x, factor in zip(unmixed, factors, strict=True))
                scores[head, rows, lanes] = functools.reduce(jnp.add, terms)


def _sum(x: Array, *factors: Array) -> Array:
    """Sum a product of arrays f[N,D] over tokens: f32[1,D]."""
    wide = (factor.astype(jnp.float32) for factor in factors)
    return math.prod(wide, start=x.astype(jnp.float32)).sum(0, keepdims=True)


def _forward(qkv, mix, post, bias, out, total, scores) -> None:
    q, k, v = (qkv[0, :, part] for part in lane_groups(qkv.shape[2], out.shape[2]))
    tokens, heads = len(q), len(post)
    total[...] = jnp.broadcast_to(bias[...] * _sum(v), total.shape)
    _products(q, k, heads, scores)
    _mix(scores, mix)

    @pl.loop(0, heads, unroll=largest_divisor(heads, _UNROLLED))
    def attend(head: Any) -> None:
        p = softmax(scores[head, :tokens]).astype(v.dtype)
        total[...] += dot(p, v, "nn") * post[pl.ds(head, 1)]

    out[0] = total[...].astype(out.dtype)


def _backward(qkv, g, mix, mix_back, pre, post, bias, out, *refs) -> None:
    *sums, to_q, to_k, to_v, scores, to_scores = refs
    heads, dim = pre.shape
    lanes, to_out = lane_groups(3 * dim, dim), g[0]
    q, k, v = (qkv[0, :, part] for part in lanes)
    tokens = len(q)
    to_v[...] = jnp.broadcast_to(bias[...] * _sum(to_out), to_v.shape)
    to_q[...], to_k[...] = jnp.zeros_like(to_q), jnp.zeros_like(to_k)
    for a, b, weights, ref in ((q, k, mix, scores), (to_out, v, mix_back, to_scores)):
        _products(a, b, heads, ref)
        _mix(ref, weights)

    @pl.loop(0, heads, unroll=largest_divisor(heads, _UNROLLED))
    def differentiate(head: Any) -> None:
        row_pre, row_post = pre[pl.ds(head, 1)], post[pl.ds(head, 1)]
        p, to_p = softmax(scores[head, :tokens]), to_scores[head, :tokens]
        to_logits = softmax_gradient(p, to_p).astype(q.dtype)
        p = p.astype(v.dtype)
        of_keys = dot(to_logits, k, "nn")
        to_q[...] += of_keys * row_pre
        to_k[...] += dot(to_logits, q, "tn") * row_pre
        to_v[...] += dot(p, to_out, "tn") * row_post
        for ref in sums:
            ref[0, pl.ds(head, 1)] = _sum(q, of_keys)
            ref[0, pl.ds(heads + head, 1)] = _sum(to_out, dot(p, v, "nn"))

    for ref in sums:
        ref[0, 2 * heads :] = _sum(to_out) * _sum(v)
    for place, part in zip(lanes, (to_q, to_k, to_v), strict=True):
        out[0, :, place] = part[...].astype(out.dtype)


def _weights(mix: Array) -> Array:
    """Repeat the weights f[out,in] of a mix for all lanes: f32[out*in,128]."""
    return jnp.broadcast_to(mix.astype(jnp.float32).reshape(-1, 1), (mix.size, LANES))


def _rows(pre: Mix, post: Mix, dim: int) -> list[Array]:
    """Give every channel its head's weights: f32[h,D] per mix, and f32[1,D] for the bias.

    A bias of the first mix does not change probabilities: it is equal for all keys of a query.
    """
    (pre_kernel, _), (post_kernel, bias), heads, wide = pre, post, len(pre[1]), jnp.float32
    rows = pre_kernel.astype(wide).T * (dim // heads) ** -0.5, post_kernel, bias[None]
    return [jnp.repeat(row.astype(wide), dim // heads, axis=1) for row in rows]


def _cost(
    tokens: int, dim: int, heads: int, *, mixes: int, products: int, operations: int
) -> KernelCost:
    """Count mixed scores, then per head products with channels and operations on scores."""
    mixed = elementwise(tokens, tokens, 2 * heads * heads)
    for start, end in (_lanes(head, dim, heads) for head in range(heads)):
        mixed += product(tokens, end - start, tokens)
    scores = elementwise(tokens, tokens, operations, powers=1)
    scaled = elementwise(tokens, dim, 2 * products)
    return mixed * mixes + (product(tokens, tokens, dim) * products + scores + scaled) * heads


@static_jit
def forward(qkv: Array, pre: Mix, post: Mix) -> Array:
    """Compute the attention of f[B,N,3*D] as f[B,N,D]; a mix is a kernel f[h,h] and a bias f[h]."""
    tokens, dim, heads = qkv.shape[1], qkv.shape[2] // 3, len(pre[1])
    cost = _cost(tokens, dim, heads, mixes=1, products=1, operations=8)
    scratch = [(tokens, dim), _scores(tokens, heads)]
    scale, _, *rows = (dim // heads) ** -0.5, *_rows(pre, post, dim)
    kernel = Kernel("talking_heads", _forward, cost, scratch, _value_bytes(tokens, dim))
    parameters = [_weights(pre[0].T.astype(jnp.float32) * scale), *rows]
    return over_images(kernel, [qkv], [(tokens, dim)], parameters=parameters)[0]


@static_jit
def backward(
    qkv: Array, g: Array, pre: Mix, post: Mix, *, needed: bool
) -> tuple[Array, tuple[Mix, Mix] | None]:
    """Compute the gradient f[B,N,3*D] of `forward` for its product from its result's gradient, and
    if `needed` those for both mixes, in float32.
    """
    (tokens, dim), heads = g.shape[1:], len(pre[1])
    wide = [jax.ShapeDtypeStruct((2 * heads + 1, dim), jnp.float32)] * needed
    cost = _cost(tokens, dim, heads, mixes=2, products=3 + needed, operations=14)
    scratch = [(tokens, dim)] * 3 + [_scores(tokens, heads)] * 2
    scale = (dim // heads) ** -0.5
    mixes = [_weights(mix) for mix in (pre[0].T.astype(jnp.float32) * scale, post[0])]
    name = "talking_heads_sums" if needed else "talking_heads_gradient"
    to_qkv, *sums = over_images(
        Kernel(name, _backward, cost, scratch, _value_bytes(tokens, dim)),
        [qkv, g],
        [(tokens, 3 * dim), *wide],
        parameters=[*mixes, *_rows(pre, post, dim)],
    )
    if not needed:
        return to_qkv, None
    of_heads = sums[0].sum(0).reshape(2 * heads + 1, heads, dim // heads).sum(2)
    to_pre = of_heads[:heads].T * (dim // heads) ** -0.5, jnp.zeros(heads, jnp.float32)
    return to_qkv, (to_pre, (of_heads[heads:-1], of_heads[-1]))
