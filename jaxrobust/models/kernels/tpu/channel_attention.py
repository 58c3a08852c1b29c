"""XCiT's attention between channels, directly on the product of queries, keys and values.

The kernel reads an image and writes its tokens: norms, cosines and their softmax exist only in fast
memory, and the backward pass recomputes them. XLA copies heads of 48 channels into 128 lanes each,
and tokens after channels and back.

Heads that together fill whole registers (8 of 48 channels are 3 of 128 lanes) are computed as one:
all channels are multiplied with all, and the softmax treats products between heads as minus
infinity. This takes more arithmetic but moves no lanes. The softmax runs over rows, so its sums add
registers.

By the declared costs 88 images of 196 tokens and 384 channels take 0.31 ms of a v5e in an attack.
"""

import math

import jax
import jax.numpy as jnp

from jaxrobust.models.kernels.primitives import static_jit
from jaxrobust.models.kernels.tpu.calls import (
    LANES,
    SCOPED,
    SUBLANES,
    Kernel,
    KernelCost,
    dot,
    elementwise,
    lane_groups,
    over_images,
    product,
    softmax,
    softmax_gradient,
    thirds,
    tiled,
)

Array = jax.Array
_SMALLEST = 1e-12  # minimum norm to divide a channel by


def refused(tokens: int, dim: int, heads: int, dtype: jnp.dtype) -> str | None:
    """Say why the kernel does not support this attention; None: it does."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"{dtype} is neither float32 nor bfloat16"
    if dim % heads:
        return f"{heads} heads do not divide {dim} channels"
    blocks = 2 * tiled((tokens, 7 * dim), jnp.dtype(dtype).itemsize)
    if blocks + _value_bytes(tokens, _together(dim, heads)) > SCOPED:
        return f"{tokens} tokens of {dim} channels are larger than the fast memory of a chip"
    return None


def _together(dim: int, heads: int) -> int:
    """Count the channels to compute at once: heads that fill registers, or all."""
    filling = math.lcm(dim // heads, LANES)
    return dim if dim % filling else filling


def _value_bytes(tokens: int, count: int) -> int:
    return 5 * tiled((count, count), 4) + 3 * tiled((tokens, count), 4)


def _column(row: Array) -> Array:
    return jnp.broadcast_to(row, (SUBLANES, row.shape[1])).T[:, :1]


def _inverse_norm(x: Array) -> Array:
    wide = x.astype(jnp.float32)
    return 1 / jnp.maximum(jnp.sqrt((wide * wide).sum(0, keepdims=True)), _SMALLEST)


def _cosines(q: Array, k: Array) -> tuple[Array, Array, Array]:
    """Compute f32[C,C], keys in rows and queries in columns, and the factors of both."""
    of_q, of_k = _inverse_norm(q), _column(_inverse_norm(k))
    return dot(k, q, "tn") * of_q * of_k, of_q, of_k


def _forward(qkv, temperature, strangers, out) -> None:
    for group in lane_groups(out.shape[2], strangers.shape[0]):
        q, k, v = (qkv[0, :, part] for part in thirds(out.shape[2], group))
        cosines, _, _ = _cosines(q, k)
        weights = softmax(cosines * temperature[:, group] + strangers[...], 0)
        out[0, :, group] = dot(v, weights.astype(v.dtype), "nn").astype(out.dtype)


def _unit_gradient(x: Array, inverse: Array, direct: Array) -> Array:
    """Compute the gradient for `x` f[N,C] from its cosines' gradient, already divided once."""
    wide = x.astype(jnp.float32)
    along = (wide * direct).sum(0, keepdims=True)
    # Below the smallest norm the divisor is constant, so nothing is projected out.
    radial = jnp.where(inverse < 1 / _SMALLEST, inverse * inverse * along, 0.0)
    return direct - wide * radial


def _backward(qkv, g, temperature, strangers, out, *to_temperature) -> None:
    dim = g.shape[2]
    for group in lane_groups(dim, strangers.shape[0]):
        lanes, to_out = thirds(dim, group), g[0, :, group]
        q, k, v = (qkv[0, :, part] for part in lanes)
        cosines, of_q, of_k = _cosines(q, k)
        weights = softmax(cosines * temperature[:, group] + strangers[...], 0)
        to_logits = softmax_gradient(weights, dot(v, to_out, "tn"), 0)
        for sums in to_temperature:
            sums[0, :, group] = (to_logits * cosines).sum(0, keepdims=True)
        to_products = (to_logits * (temperature[:, group] * of_q) * of_k).astype(q.dtype)
        parts = (
            _unit_gradient(q, of_q, dot(k, to_products, "nn")),
            _unit_gradient(k, _inverse_norm(k), dot(q, to_products, "nt")),
            dot(to_out, weights.astype(v.dtype), "nt"),
        )
        for place, part in zip(lanes, parts, strict=True):
            out[0, :, place] = part.astype(out.dtype)


def _cost(tokens: int, count: int, *, squares: int, maps: int, operations: int) -> KernelCost:
    """Count, for channels computed together, products to squares and to maps of tokens."""
    vectors = elementwise(count, count, operations, powers=1)
    vectors += elementwise(tokens, count, 4 + 6 * (maps - 1))
    to_squares, to_maps = product(count, tokens, count), product(tokens, count, count)
    return vectors + to_squares * squares + to_maps * maps


def _parameters(temperature: Array, dim: int) -> list[Array]:
    """Spread the heads' temperatures over channels, and make the mask that separates heads."""
    heads = temperature.size
    head = jnp.arange(_together(dim, heads)) // (dim // heads)
    strangers = jnp.where(head[:, None] == head[None], 0.0, -jnp.inf)
    spread = jnp.repeat(temperature.reshape(-1), dim // heads)[None]
    return [spread.astype(jnp.float32), strangers.astype(jnp.float32)]


@static_jit
def forward(qkv: Array, temperature: Array) -> Array:
    """Compute the attention of f[B,N,3*D] as f[B,N,D]; `temperature` has one value per head."""
    tokens, dim = qkv.shape[1], qkv.shape[2] // 3
    count = _together(dim, temperature.size)
    cost = _cost(tokens, count, squares=1, maps=1, operations=9) * (dim // count)
    values = _value_bytes(tokens, count)
    kernel = Kernel("channel_attention", _forward, cost, value_bytes=values)
    return over_images(kernel, [qkv], [(tokens, dim)], parameters=_parameters(temperature, dim))[0]


@static_jit
def backward(qkv: Array, g: Array, temperature: Array, *, needed: bool) -> list[Array]:
    """Compute the gradient f[B,N,3*D] of `forward` for its product from its result's gradient, and
    if `needed` the temperature's gradient, f32[h].
    """
    tokens, dim = g.shape[1:]
    heads = temperature.size
    count = _together(dim, heads)
    cost = _cost(tokens, count, squares=2, maps=3, operations=18) * (dim // count)
    wide = [jax.ShapeDtypeStruct((1, dim), jnp.float32)] * needed
    to_qkv, *sums = over_images(
        Kernel(
            "channel_attention_gradient", _backward, cost, value_bytes=_value_bytes(tokens, count)
        ),
        [qkv, g],
        [(tokens, 3 * dim), *wide],
        parameters=_parameters(temperature, dim),
    )
    return [to_qkv, *(s.reshape(-1, heads, dim // heads).sum((0, 2)) for s in sums)]
