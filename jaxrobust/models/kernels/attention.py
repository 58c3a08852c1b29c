"""Attention between tokens; talking heads and channel attention have their own files.

On CPU, products take matrices in canonical layout (heads before tokens, copied behind optimization
barriers), the softmax is compiled alone, and gradients are written out from the stored
probabilities. Value, and value with gradients, in ms for ViT-S (8x197x6x64, two cores): 4 and 10;
plain `einsum` 7 and 17, `jax.nn.dot_product_attention` 6 and 17, PyTorch 3 to 4 and 10 to 13.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.models.kernels import tpu
from jaxrobust.models.kernels.cuda import fused_attention
from jaxrobust.models.kernels.primitives import (
    per_platform,
    rounded,
    takes_xla,
    widened,
    with_gradient,
)

Array = jax.Array


@per_platform
def swap(x: Array) -> Array:
    """Swap tokens and heads: f[B,N,h,d] to f[B,h,N,d], and back."""
    return x.transpose(0, 2, 1, 3)


def join(x: Array) -> Array:
    """Join heads: f[B,h,N,d] to f[B,N,h*d]."""
    x = swap(x)
    return x.reshape(*x.shape[:2], -1)


def product(a: Array, b: Array, axes: str, dtype: Any = None) -> Array:
    """Multiply matrices f[B,h,..]; `axes` names the summed axes: "nt" is `a @ b.T`."""
    numbers = (((3 if axes[0] == "n" else 2,), (2 if axes[1] == "n" else 3,)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, numbers, preferred_element_type=dtype)


def wide_dtype(x: Array) -> jnp.dtype:
    """Return the type in which to sum values of the type of `x`."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


@per_platform
def softmax(logits: Array) -> Array:
    """Compute the softmax over the last axis."""
    powers = jnp.exp(logits - logits.max(-1, keepdims=True))
    return powers * (1 / powers.sum(-1, keepdims=True))


@per_platform
def _biased_softmax(logits: Array, bias: Array) -> Array:
    shape = logits.shape
    logits = logits.reshape(-1, bias.shape[0], *shape[1:]) + widened(bias[None])[0]
    return softmax(logits.reshape(shape))


@per_platform
def softmax_gradient(probabilities: Array, g: Array) -> Array:
    """Compute the gradient of `softmax` from its result and that result's gradient."""
    (wide,) = widened(probabilities)
    return wide * (g - (wide * g).sum(-1, keepdims=True))


def _scale(x: Array, q: Array, scale: float | None) -> Array:
    return x * (q.shape[-1] ** -0.5 if scale is None else scale)


# ----------------------------------------------------------------------------------------- tokens


def scores(q: Array, k: Array, scale: float | None = None) -> Array:
    """Compute the logits f[B,h,Nq,Nk] of queries and keys f[B,h,N,d]; `scale` None: `d ** -0.5`."""
    if q.dtype.itemsize < 4:  # the rounding error of scaled queries grows with the logits
        return _scale(product(q, k, "nt", wide_dtype(q)), q, scale)
    return product(_scale(q, q, scale), k, "nt", wide_dtype(q))


def scores_gradient(
    q: Array, k: Array, g: Array, scale: float | None = None
) -> tuple[Array, Array]:
    """Compute the gradients of `scores` for queries and keys from its result's gradient."""
    if q.dtype.itemsize < 4:
        g = _scale(g, q, scale).astype(q.dtype)
        return product(g, k, "nn"), product(g, q, "tn")
    g = g.astype(q.dtype)
    return _scale(product(g, k, "nn"), q, scale), product(g, _scale(q, q, scale), "tn")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Array, k: Array, v: Array, bias: Array | None, scale: float | None) -> Array:
    return _attend_forward(q, k, v, bias, scale)[0]


def _attend_forward(q, k, v, bias, scale):
    logits = scores(q, k, scale)
    probabilities = softmax(logits) if bias is None else _biased_softmax(logits, bias)
    probabilities = probabilities.astype(v.dtype)
    return product(probabilities, v, "nn"), (q, k, v, bias, probabilities)


def _attend_backward(scale, residuals, g):
    q, k, v, bias, probabilities = residuals
    to_logits = softmax_gradient(probabilities, product(g, v, "nt", wide_dtype(g)))
    to_bias = None
    if bias is not None:
        sums = to_logits.reshape(-1, bias.shape[0], *to_logits.shape[1:]).sum(0)
        spread = [i for i, n in enumerate(bias.shape) if n != sums.shape[i]]
        to_bias = rounded(sums.sum(spread, keepdims=True), bias.dtype)
    to_q_and_k = scores_gradient(q, k, to_logits, scale)
    return *to_q_and_k, product(probabilities, g, "tn"), to_bias


_attend.defvjp(_attend_forward, _attend_backward)


def _four_axes(bias: Array, x: Array) -> Array:
    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    if x.shape[0] % bias.shape[0]:
        raise ValueError(f"a bias for {bias.shape[0]} does not divide the batch of {x.shape[0]}")
    return bias


def attention(
    q: Array, k: Array, v: Array, *, bias: Array | None = None, scale: float | None = None
) -> Array:
    """Compute attention from f[B,Nq,h,d] to f[B,Nk,h,d], as f[B,Nq,h*d].

    Values may differ in width from queries and keys. `scale` multiplies the logits; None: `d **
    -0.5`. `bias` is added to the logits f[B,h,Nq,Nk] and broadcasts to them. Its first axis may
    also divide B and is then repeated, for masks of the windows of one image.
    Parity: tests/models/kernels/test_attention.py against torch's scaled_dot_product_attention.
    """
    if bias is not None:
        bias = _four_axes(bias, q)
    return join(_attend(swap(q), swap(k), swap(v), bias, scale))


# ------------------------------------------------------------------------- tokens, of one product


def split(qkv: Array, heads: int) -> list[Array]:
    """Split f[B,N,3*h*d] into queries, keys and values f[B,h,N,d]."""
    parts = qkv.reshape(*qkv.shape[:2], 3, heads, -1)
    return [swap(parts[:, :, i]) for i in range(3)]


def stored_as(plain: Callable[..., Any], out: Array, *operands: Any) -> list[Array]:
    """Return a kernel's value, plus arrays shaped like those that the plain rule stores.

    The rules of all platforms must store the same shapes; XLA drops these unused arrays.
    """
    return [out, *(jnp.zeros(a.shape, a.dtype) for a in jax.eval_shape(plain, *operands)[1:])]


def _plain_forward(qkv: Array, *bias: Array, heads: int, scale: float) -> list[Array]:
    q, k, v = split(qkv, heads)
    out, (*_, probabilities) = _attend_forward(q, k, v, bias[0] if bias else None, scale)
    return [join(out), q, k, v, probabilities]


def _plain_backward(qkv, g, stored, *bias, heads: int, scale: float, needed: bool) -> list[Array]:
    q, k, v, probabilities = stored
    g = swap(g.reshape(*g.shape[:2], heads, -1))
    residuals = q, k, v, *(bias or (None,)), probabilities
    *parts, to_bias = _attend_backward(scale, residuals, g)
    to_qkv = jnp.stack([swap(part) for part in parts], 2)
    return [to_qkv.reshape(*to_qkv.shape[:2], -1), *([to_bias] if needed else [])]


def _full(bias: tuple[Array, ...], qkv: Array, heads: int) -> Array | None:
    tokens = qkv.shape[1]
    return jnp.broadcast_to(bias[0], (len(bias[0]), heads, tokens, tokens)) if bias else None


def _kernel_forward(qkv: Array, *bias: Array, heads: int, scale: float) -> list[Array]:
    out = tpu.token_attention.forward(qkv, _full(bias, qkv, heads), heads=heads, scale=scale)
    plain = functools.partial(_plain_forward, heads=heads, scale=scale)
    return stored_as(plain, out, qkv, *bias)


def _kernel_backward(qkv, g, stored, *bias, heads: int, scale: float, needed: bool) -> list[Array]:
    settings: dict[str, Any] = {"heads": heads, "scale": scale}
    to_qkv = tpu.token_attention.backward(qkv, g, _full(bias, qkv, heads), **settings)
    if not needed:
        return [to_qkv]
    stored = _plain_forward(qkv, *bias, **settings)[1:]
    return [to_qkv, _plain_backward(qkv, g, stored, *bias, needed=True, **settings)[1]]


def _fused_forward(qkv: Array, *, heads: int, scale: float) -> list[Array]:
    out = fused_attention.forward(qkv, heads, scale=scale)
    return stored_as(functools.partial(_plain_forward, heads=heads, scale=scale), out, qkv)


def _fused_backward(qkv, g, stored, *, heads: int, scale: float, needed: bool) -> list[Array]:
    return [fused_attention.backward(qkv, g, heads, scale=scale)]


_FORWARD = {"tpu": _kernel_forward, "cuda": _fused_forward, "default": _plain_forward}
_BACKWARD = {"tpu": _kernel_backward, "cuda": _fused_backward, "default": _plain_backward}


def _by_platform(rules: dict[str, Callable], static, qkv, *operands: Any, bias, **settings: Any):
    heads, scale = static
    # Even tracing cuDNN's rule fails where it does not apply.
    fused = not bias and fused_attention.applies(qkv, heads)
    rules = {
        name: functools.partial(rule, heads=heads, scale=scale, **settings)
        for name, rule in rules.items()
        if fused or name != "cuda"
    }
    return lax.platform_dependent(qkv, *operands, *bias, **rules)


def _attend_product_forward(static, qkv, bias, needed):
    out, *stored = _by_platform(_FORWARD, static, qkv, bias=bias)
    return out, (qkv, stored)


def _attend_product_backward(static, residuals, bias, g, needed):
    qkv, stored = residuals
    to_qkv, *to_bias = _by_platform(_BACKWARD, static, qkv, g, stored, bias=bias, needed=needed)
    return to_qkv, tuple(to_bias) if needed else None


_attend_product = with_gradient(_attend_product_forward, _attend_product_backward)


def self_attention(
    qkv: Array, heads: int, *, bias: Array | None = None, scale: float | None = None
) -> Array:
    """Compute self-attention from the product f[B,N,3*h*d], as f[B,N,h*d].

    `bias` and `scale` are as in `attention`. On TPUs, and on NVIDIA GPUs in bfloat16 without a
    bias, scores stay on the chip.
    Parity: tests/models/kernels/test_attention.py against torch's scaled_dot_product_attention.
    """
    dim = qkv.shape[2] // 3
    scale = (dim // heads) ** -0.5 if scale is None else scale
    reason = tpu.token_attention.refused(qkv.shape[1], dim, heads, qkv.dtype)
    bias = bias if bias is None else _four_axes(bias, qkv)
    if takes_xla("attention", reason):
        return join(_attend(*split(qkv, heads), bias, scale))
    return _attend_product((heads, scale), qkv, () if bias is None else (bias,))
