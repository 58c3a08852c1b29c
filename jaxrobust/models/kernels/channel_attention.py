"""XCiT's attention between channels, also directly on a linear map's product."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.models.kernels import tpu
from jaxrobust.models.kernels.attention import (
    join,
    product,
    softmax,
    softmax_gradient,
    split,
    stored_as,
    swap,
    wide_dtype,
)
from jaxrobust.models.kernels.primitives import (
    per_platform,
    rounded,
    takes_xla,
    widened,
    with_gradient,
)

Array = jax.Array


@per_platform
def _inverse_norm(x: Array) -> Array:
    """Compute 1 / max(norm over tokens, 1e-12): f[B,h,N,d] to f[B,h,1,d]."""
    (wide,) = widened(x)
    return 1 / jnp.maximum(jnp.sqrt((wide * wide).sum(2, keepdims=True)), 1e-12)


def _columns(x: Array) -> Array:
    """Turn rows into columns: f[B,h,1,d] to f[B,h,d,1]."""
    return x.reshape(*x.shape[:2], -1, 1)


@jax.custom_vjp
def _cross(q: Array, k: Array, v: Array, temperature: Array) -> Array:
    return _cross_forward(q, k, v, temperature)[0]


def _cross_forward(q, k, v, temperature):
    inverse_q, inverse_k = _columns(_inverse_norm(q)), _inverse_norm(k)
    cosines = product(q, k, "tn", wide_dtype(q)) * inverse_q * inverse_k
    probabilities = softmax(cosines * widened(temperature)[0][None]).astype(v.dtype)
    out = product(v, probabilities, "nt")
    return out, (q, k, v, temperature, inverse_q, inverse_k, cosines, probabilities)


def _unit_gradient(x: Array, inverse: Array, along: Array, direct: Array) -> Array:
    # Below the smallest norm the divisor is constant, so nothing is projected out.
    radial = jnp.where(inverse < 1e12, inverse * inverse * along, 0)
    return (direct - widened(x)[0] * radial).astype(x.dtype)


def _cross_backward(residuals, g):
    q, k, v, temperature, inverse_q, inverse_k, cosines, probabilities = residuals
    to_logits = softmax_gradient(probabilities, product(g, v, "tn", wide_dtype(g)))
    to_cosines = to_logits * widened(temperature)[0][None]
    to_products = (to_cosines * inverse_q * inverse_k).astype(q.dtype)
    along = to_cosines * cosines
    along_q, along_k = along.sum(3, keepdims=True), along.sum(2, keepdims=True)
    rows_q, rows_along = (a.reshape(inverse_k.shape) for a in (inverse_q, along_q))
    wide = wide_dtype(q)
    to_temperature = (to_logits * cosines).sum((0, 2, 3)).reshape(temperature.shape)
    return (
        _unit_gradient(q, rows_q, rows_along, product(k, to_products, "nt", wide)),
        _unit_gradient(k, inverse_k, along_k, product(q, to_products, "nn", wide)),
        product(g, probabilities, "nn"),
        rounded(to_temperature, temperature.dtype),
    )


_cross.defvjp(_cross_forward, _cross_backward)


def cross_covariance(q: Array, k: Array, v: Array, temperature: Array) -> Array:
    """Compute XCiT's attention between channels: f[B,N,h,d] to f[B,N,h*d].

    q and k are divided by their norm over tokens, or by 1e-12 if that is smaller (the gradient is
    then that of a division by a constant); logits are multiplied by `temperature` f[h,1,1].
    Source: El-Nouby et al. 2021 (arXiv 2106.09681); parity:
      tests/models/kernels/test_attention.py against torch.
    """
    return join(_cross(swap(q), swap(k), swap(v), temperature))


# ------------------------------------------------------------------------------ of one product


def _plain_forward(qkv: Array, temperature: Array) -> list[Array]:
    q, k, v = split(qkv, len(temperature))
    out, (*_, of_q, of_k, cosines, weights) = _cross_forward(q, k, v, temperature)
    return [join(out), q, k, v, of_q, of_k, cosines, weights]


def _plain_backward(qkv, g, stored, temperature, *, needed: bool) -> list[Array]:
    q, k, v, *scores = stored
    g = swap(g.reshape(*g.shape[:2], len(temperature), -1))
    *parts, to_temperature = _cross_backward((q, k, v, temperature, *scores), g)
    to_qkv = jnp.stack([swap(part) for part in parts], 2)
    return [to_qkv.reshape(*to_qkv.shape[:2], -1), *[to_temperature] * needed]


def _kernel_forward(qkv: Array, temperature: Array) -> list[Array]:
    out = tpu.channel_attention.forward(qkv, temperature)
    return stored_as(_plain_forward, out, qkv, temperature)


def _kernel_backward(qkv, g, stored, temperature, *, needed: bool) -> list[Array]:
    to_qkv, *sums = tpu.channel_attention.backward(qkv, g, temperature, needed=needed)
    shape, dtype = temperature.shape, temperature.dtype
    return [to_qkv, *(rounded(s.reshape(shape), dtype) for s in sums)]


def _product_forward(static, qkv, temperature, needed):
    rules = {"tpu": _kernel_forward, "default": _plain_forward}
    out, *stored = lax.platform_dependent(qkv, temperature, **rules)
    return out, (qkv, stored)


def _product_backward(static, residuals, temperature, g, needed):
    qkv, stored = residuals
    rules = {"tpu": _kernel_backward, "default": _plain_backward}
    rules = {name: functools.partial(rule, needed=needed) for name, rule in rules.items()}
    to_qkv, *sums = lax.platform_dependent(qkv, g, stored, temperature, **rules)
    return to_qkv, sums[0] if needed else None


_cross_product = with_gradient(_product_forward, _product_backward)


def self_cross_covariance(qkv: Array, temperature: Array) -> Array:
    """Compute `cross_covariance` from the product f[B,N,3*h*d] of queries, keys and values, as
    f[B,N,h*d]. On TPUs intermediate results stay on the chip.
    """
    heads = len(temperature)
    reason = tpu.channel_attention.refused(qkv.shape[1], qkv.shape[2] // 3, heads, qkv.dtype)
    if takes_xla("channel attention", reason):
        return join(_cross(*split(qkv, heads), temperature))
    return _cross_product((), qkv, temperature)
