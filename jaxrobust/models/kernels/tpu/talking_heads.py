"""CaiT's attention with talking heads, straight on the product of queries, keys and values.

An image comes in and its tokens go out: scores live in fast memory only, and the backward pass
computes the probabilities again. XLA writes scores f[B,h,N,N] in both types, and mixes heads on
copies of them.

Heads are mixed by products over all channels. A mixed score is a sum over channels, in which
channel c counts with the weight of its head, so that queries times a row of weights give mixed
scores at once; likewise the weight of a head's values is that of its channels. No array of scores
is mixed, no head is cut out of the lanes that it shares with others, and the gradients of both
mixes are sums over tokens of arrays f[N,D] that exist anyway.

By hand, for 196 tokens of 384 channels in 8 heads on a v5e: each product takes 196 rows x 3 x 2
tiles / 4 units = 294 cycles, two forward and five backward for each head; a softmax on 25 x 2
registers 150, with its gradient 225, and scaled arrays on 25 x 3 registers 56 and 112. So an attack
step of 88 images needs 88 x 8 x (794 + 1,807) = 1.83 M cycles = 1.22 ms (the compiler schedules 6.5
and 13.0 k cycles for an image, which by hand are 6.4 and 14.5), and moves 88 x 196 x 384 x (3 + 1 +
3 + 1 + 3) values = 146 MB = 0.18 ms.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxrobust.models.kernels.tpu.calls import (
    Kernel,
    KernelCost,
    dot,
    elementwise,
    fast_memory,
    over_images,
    product,
    tiled,
)

Array = jax.Array
Mix = tuple[Array, Array]
WIDTH = 32  # which divides the number of channels
_UNROLLED = 2  # heads in one turn of the loop, at most


def refused(tokens: int, dim: int, heads: int, dtype: jnp.dtype) -> str | None:
    """Say why the kernel does not take such an attention; None: it does."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"{dtype} is neither float32 nor bfloat16"
    if dim % WIDTH or dim % heads:
        return f"{dim} channels of {heads} heads are no multiple of {WIDTH} and of the heads"
    blocks = 2 * tiled((tokens, 7 * dim), jnp.dtype(dtype).itemsize)
    if blocks + _beside(tokens, dim) > fast_memory():
        return f"{tokens} tokens of {dim} channels are larger than the fast memory of a chip"
    return None


def _beside(tokens: int, dim: int) -> int:
    return 6 * tiled((tokens, tokens), 4) + 6 * tiled((tokens, dim), 4)


def _parts(qkv: Any) -> list[Array]:
    dim = qkv.shape[2] // 3
    return [qkv[0, :, i * dim : (i + 1) * dim] for i in range(3)]


def _scaled(x: Array, row: Array) -> Array:
    return (x.astype(jnp.float32) * row).astype(x.dtype)


def _probabilities(q: Array, k: Array, row: Array) -> Array:
    logits = dot(_scaled(q, row), k, "nt")
    powers = jnp.exp(logits - logits.max(-1, keepdims=True))
    return powers * (1 / powers.sum(-1, keepdims=True))


def _sum(x: Array, *factors: Array) -> Array:
    """Sum a product of arrays f[N,D] over tokens: f32[1,D]."""
    wide = (factor.astype(jnp.float32) for factor in factors)
    return math.prod(wide, start=x.astype(jnp.float32)).sum(0, keepdims=True)


def _together(heads: int) -> int:
    """Find how many heads a turn of the loop computes: products of one hide another's softmax."""
    return max(n for n in range(1, _UNROLLED + 1) if heads % n == 0)


def _forward(qkv, before, after, bias, out, total) -> None:
    from jax.experimental import pallas as pl

    q, k, v = _parts(qkv)
    total[...] = jnp.broadcast_to(bias[...] * _sum(v), total.shape)

    @pl.loop(0, len(before), unroll=_together(len(before)))
    def attend(head: Any) -> None:
        p = _probabilities(q, k, before[pl.ds(head, 1)]).astype(v.dtype)
        total[...] += dot(p, v, "nn") * after[pl.ds(head, 1)]

    out[0] = total[...].astype(out.dtype)


def _backward(qkv, g, before, after, bias, out, *rest) -> None:
    from jax.experimental import pallas as pl

    *sums, to_q, to_k, to_v = rest
    heads, dim = before.shape
    (q, k, v), to_out = _parts(qkv), g[0]
    to_v[...] = jnp.broadcast_to(bias[...] * _sum(to_out), to_v.shape)
    to_q[...], to_k[...] = jnp.zeros_like(to_q), jnp.zeros_like(to_k)

    @pl.loop(0, heads, unroll=_together(heads))
    def differentiate(head: Any) -> None:
        row_before, row_after = before[pl.ds(head, 1)], after[pl.ds(head, 1)]
        p = _probabilities(q, k, row_before)
        to_p = dot(_scaled(to_out, row_after), v, "nt")
        to_logits = (p * (to_p - (p * to_p).sum(-1, keepdims=True))).astype(q.dtype)
        p = p.astype(v.dtype)
        of_keys = dot(to_logits, k, "nn")
        to_q[...] += of_keys * row_before
        to_k[...] += dot(to_logits, q, "tn") * row_before
        to_v[...] += dot(p, to_out, "tn") * row_after
        for ref in sums:
            ref[0, pl.ds(head, 1)] = _sum(q, of_keys)
            ref[0, pl.ds(heads + head, 1)] = _sum(to_out, dot(p, v, "nn"))

    for ref in sums:
        ref[0, 2 * heads :] = _sum(to_out) * _sum(v)
    for i, part in enumerate((to_q, to_k, to_v)):
        out[0, :, i * dim : (i + 1) * dim] = part[...].astype(out.dtype)


def _rows(before: Mix, after: Mix, dim: int) -> list[Array]:
    """Give every channel the weights of its head: f32[h,D] of each mix, and f32[1,D] of the bias.

    A bias of the first mix changes no probability, since it is the same for all keys of a query.
    """
    heads, wide = len(before[1]), jnp.float32
    (before_kernel, _), (after_kernel, bias) = before, after
    rows = before_kernel.astype(wide).T * (dim // heads) ** -0.5, after_kernel, bias[None]
    return [jnp.repeat(row.astype(wide), dim // heads, axis=1) for row in rows]


def _cost(tokens: int, dim: int, heads: int, *, products: int, operations: int) -> KernelCost:
    """Count products of tokens with tokens, and operations on scores; then scaled arrays."""
    scores = elementwise(tokens, tokens, operations, powers=1)
    scaled = elementwise(tokens, dim, products + 1)
    return (product(tokens, dim, tokens) * products + scores + scaled) * heads


@functools.partial(jax.jit, static_argnames="interpret")
def forward(qkv: Array, before: Mix, after: Mix, *, interpret: bool = False) -> Array:
    """Compute the attention of f[B,N,3*D] as f[B,N,D]; a mix is a kernel f[h,h] and a bias f[h]."""
    tokens, dim = qkv.shape[1], qkv.shape[2] // 3
    cost = _cost(tokens, dim, len(before[1]), products=2, operations=8)
    (out,) = over_images(
        Kernel("talking_heads", _forward, cost, [(tokens, dim)], beside=_beside(tokens, dim)),
        [qkv],
        [(tokens, dim)],
        parameters=_rows(before, after, dim),
        interpret=interpret,
    )
    return out


@functools.partial(jax.jit, static_argnames=("needed", "interpret"))
def backward(
    qkv: Array, g: Array, before: Mix, after: Mix, *, needed: bool, interpret: bool = False
) -> tuple[Array, tuple[Mix, Mix] | None]:
    """Compute the gradient f[B,N,3*D] of `forward` for its product from that of its result, and
    where `needed` those for both mixes, in float32.
    """
    tokens, dim = g.shape[1:]
    heads = len(before[1])
    wide = [jax.ShapeDtypeStruct((2 * heads + 1, dim), jnp.float32)] * needed
    cost = _cost(tokens, dim, heads, products=5 + needed, operations=14)
    name = "talking_heads_sums" if needed else "talking_heads_gradient"
    to_qkv, *sums = over_images(
        Kernel(name, _backward, cost, [(tokens, dim)] * 3, beside=_beside(tokens, dim)),
        [qkv, g],
        [(tokens, 3 * dim), *wide],
        parameters=_rows(before, after, dim),
        interpret=interpret,
    )
    if not needed:
        return to_qkv, None
    of_heads = sums[0].sum(0).reshape(2 * heads + 1, heads, dim // heads).sum(2)
    to_before = of_heads[:heads].T * (dim // heads) ** -0.5, jnp.zeros(heads, jnp.float32)
    return to_qkv, (to_before, (of_heads[heads:-1], of_heads[-1]))
