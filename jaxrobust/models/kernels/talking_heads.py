"""CaiT's attention with talking heads: heads are mixed before and after the softmax."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.models.kernels import tpu
from jaxrobust.models.kernels.attention import (
    join,
    product,
    scores,
    scores_gradient,
    softmax,
    softmax_gradient,
    split,
    swap,
    wide_dtype,
)
from jaxrobust.models.kernels.primitives import as_array, asked_for, per_platform, rounded, widened

Array = jax.Array
Mix = tuple[Array, Array]


@per_platform
def _mixed(x: Array, kernel: Array, bias: Array) -> Array:
    wide, kernel, bias = widened(x, kernel, bias)
    # 8x8x196x196: 1.3 ms as a sum over heads, 2.6 as one product of matrices.
    heads = (wide[:, i, None] * kernel[i][None, :, None, None] for i in range(kernel.shape[0]))
    return functools.reduce(jnp.add, heads) + bias[None, :, None, None]


def _mix_gradient(x: Array, g: Array) -> Mix:
    x, g = (wide.reshape(1, *wide.shape[:2], -1) for wide in widened(x, g))
    return product(x, g, "nt").sum((0, 1)), g.sum(3).sum((0, 1))


def _plain_forward(qkv: Array, before: Mix, after: Mix) -> list[Array]:
    q, k, v = split(qkv, len(before[1]))
    probabilities = softmax(_mixed(scores(q, k), *before)).astype(v.dtype)
    mixed = _mixed(probabilities, *after).astype(v.dtype)
    return [join(product(mixed, v, "nn")), q, k, v, probabilities]


def _plain_backward(qkv, g, kept, before, after, *, needed: bool):
    q, k, v, probabilities = kept
    g = swap(g.reshape(*g.shape[:2], len(before[1]), -1))
    none = jnp.zeros_like(before[1])
    to_mixed = product(g, v, "nt", wide_dtype(g))
    to_softmax = _mixed(to_mixed, after[0].T, none)
    to_before = softmax_gradient(probabilities, to_softmax)
    to_logits = _mixed(to_before, before[0].T, none)
    mixed = _mixed(probabilities, *after).astype(v.dtype)
    parts = *scores_gradient(q, k, to_logits), product(mixed, g, "tn")
    to_qkv = jnp.stack([swap(part) for part in parts], 2).reshape(qkv.shape)
    if not needed:
        return to_qkv, None
    mixes = _mix_gradient(scores(q, k), to_before), _mix_gradient(probabilities, to_mixed)
    return to_qkv, mixes


def _kernel_forward(qkv: Array, before: Mix, after: Mix) -> list[Array]:
    # Rules of all platforms keep arrays of one shape; XLA drops these, which no kernel reads.
    kept = jax.eval_shape(_plain_forward, qkv, before, after)[1:]
    out = tpu.talking_heads.forward(qkv, before, after)
    return [out, *(jnp.zeros(a.shape, a.dtype) for a in kept)]


def _kernel_backward(qkv, g, kept, before, after, *, needed: bool):
    del kept
    return tpu.talking_heads.backward(qkv, g, before, after, needed=needed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _talk(plain: bool, *operands: Any) -> Array:
    return _rule(plain, *operands)[0]


def _rule(plain, *operands):
    if plain:
        return _plain_forward(*operands)
    return lax.platform_dependent(*operands, tpu=_kernel_forward, default=_plain_forward)


def _talk_forward(plain, *operands):
    _, *mixes = operands
    perturbed = asked_for(mixes)
    operands = jax.tree.map(lambda operand: operand.value, operands)
    out, *kept = _rule(plain, *operands)
    return out, (operands, kept, perturbed)


def _talk_backward(plain, residuals, g):
    (qkv, *mixes), kept, perturbed = residuals
    operands = qkv, as_array(g), kept, *mixes
    needed = perturbed is not None
    of_kernel, of_plain = (
        functools.partial(rule, needed=needed) for rule in (_kernel_backward, _plain_backward)
    )
    if plain:
        to_qkv, to_mixes = of_plain(*operands)
    else:
        to_qkv, to_mixes = lax.platform_dependent(*operands, tpu=of_kernel, default=of_plain)
    if not needed:
        return to_qkv, None, None
    return to_qkv, *jax.tree.map(lambda g, p: rounded(g, p.dtype), to_mixes, tuple(mixes))


_talk.defvjp(_talk_forward, _talk_backward, symbolic_zeros=True)


def talking_heads(qkv: Array, before: Mix, after: Mix) -> Array:
    """Compute attention with heads mixed around its softmax, of the product f[B,N,3*h*d] of
    queries, keys and values, as f[B,N,h*d].

    Each mix is a linear map of the head axis: kernel f[in,out] and bias f[out]. Queries are scaled
    by `d ** -0.5` before the first. On TPUs scores stay on the chip.
    Source: Touvron et al. 2021 (arXiv 2103.17239), after Shazeer et al. 2020 (arXiv 2003.02436);
      parity: tests/models/kernels/test_attention.py against torch.
    """
    reason = tpu.talking_heads.refused(qkv.shape[1], qkv.shape[2] // 3, len(before[1]), qkv.dtype)
    return _talk(tpu.calls.plain("attention with talking heads", reason), qkv, before, after)
