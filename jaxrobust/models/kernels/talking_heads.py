"""CaiT's talking-heads attention: heads are mixed before and after the softmax."""

import functools
from collections.abc import Callable
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
    stored_as,
    swap,
    wide_dtype,
)
from jaxrobust.models.kernels.primitives import per_platform, takes_xla, widened, with_gradient

Array = jax.Array
Mix = tuple[Array, Array]


@per_platform
def _mixed(x: Array, kernel: Array, bias: Array) -> Array:
    wide, kernel, bias = widened(x, kernel, bias)
    # 8x8x196x196: 1.3 ms as a sum over heads, 2.6 as one matrix product.
    heads = (wide[:, i, None] * kernel[i][None, :, None, None] for i in range(kernel.shape[0]))
    return functools.reduce(jnp.add, heads) + bias[None, :, None, None]


def _mix_gradient(x: Array, g: Array) -> Mix:
    x, g = (wide.reshape(1, *wide.shape[:2], -1) for wide in widened(x, g))
    return product(x, g, "nt").sum((0, 1)), g.sum(3).sum((0, 1))


def _plain_forward(qkv: Array, pre: Mix, post: Mix) -> list[Array]:
    q, k, v = split(qkv, len(pre[1]))
    probabilities = softmax(_mixed(scores(q, k), *pre)).astype(v.dtype)
    mixed = _mixed(probabilities, *post).astype(v.dtype)
    return [join(product(mixed, v, "nn")), q, k, v, probabilities]


def _plain_backward(qkv, g, stored, pre, post, *, needed: bool):
    q, k, v, probabilities = stored
    g = swap(g.reshape(*g.shape[:2], len(pre[1]), -1))
    no_bias = jnp.zeros_like(pre[1])
    to_mixed = product(g, v, "nt", wide_dtype(g))
    to_softmax = _mixed(to_mixed, post[0].T, no_bias)
    to_pre = softmax_gradient(probabilities, to_softmax)
    to_logits = _mixed(to_pre, pre[0].T, no_bias)
    mixed = _mixed(probabilities, *post).astype(v.dtype)
    parts = *scores_gradient(q, k, to_logits), product(mixed, g, "tn")
    to_qkv = jnp.stack([swap(part) for part in parts], 2).reshape(qkv.shape)
    if not needed:
        return to_qkv, None
    mixes = _mix_gradient(scores(q, k), to_pre), _mix_gradient(probabilities, to_mixed)
    return to_qkv, mixes


def _kernel_forward(qkv: Array, pre: Mix, post: Mix) -> list[Array]:
    return stored_as(_plain_forward, tpu.talking_heads.forward(qkv, pre, post), qkv, pre, post)


def _kernel_backward(qkv, g, stored, pre, post, *, needed: bool):
    return tpu.talking_heads.backward(qkv, g, pre, post, needed=needed)


def _choice(plain: bool, kernel: Callable, formula: Callable, *operands: Any) -> Any:
    if plain:
        return formula(*operands)
    return lax.platform_dependent(*operands, tpu=kernel, default=formula)


def _talk_forward(plain, qkv, mixes, needed):
    out, *stored = _choice(plain, _kernel_forward, _plain_forward, qkv, *mixes)
    return out, (qkv, stored)


def _talk_backward(plain, residuals, mixes, g, needed):
    qkv, stored = residuals
    rules = (functools.partial(rule, needed=needed) for rule in (_kernel_backward, _plain_backward))
    return _choice(plain, *rules, qkv, g, stored, *mixes)


_talk = with_gradient(_talk_forward, _talk_backward)


def talking_heads(qkv: Array, pre: Mix, post: Mix) -> Array:
    """Compute talking-heads attention from the product f[B,N,3*h*d], as f[B,N,h*d].


    Each mix is a linear map of the head axis: kernel f[in,out] and bias f[out]. Queries are scaled
    by `d ** -0.5` before the first. On TPUs scores stay on the chip.
    Source: Touvron et al. 2021 (arXiv 2103.17239), after Shazeer et al. 2020 (arXiv 2003.02436);
      parity: tests/models/kernels/test_attention.py against torch.
    """
    reason = tpu.talking_heads.refused(qkv.shape[1], qkv.shape[2] // 3, len(pre[1]), qkv.dtype)
    return _talk(takes_xla("talking-heads attention", reason), qkv, (pre, post))
