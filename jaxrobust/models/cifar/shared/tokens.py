"""Attention over tokens as several public networks for 32 px have it: maps without a bias."""

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.kernels import attention
from jaxrobust.models.modules.basic import Linear
from jaxrobust.models.modules.draws import Draws, torch_default
from jaxrobust.types import Array


class Attention(nnx.Module):
    """Attention of all tokens f[...,N,D] to all: queries, keys, values from a map without a bias.

    Heads are `width` wide, whatever D is.
    """

    def __init__(self, dim: int, heads: int, width: int, rngs: Draws) -> None:
        inner = heads * width
        self.qkv = Linear(dim, 3 * inner, bias=False, init=torch_default, rngs=rngs)
        self.proj = Linear(inner, dim, init=torch_default, rngs=rngs)
        self.heads, self.width = heads, width

    def __call__(self, x: Array) -> Array:
        parts, tokens = jnp.split(self.qkv(x), 3, axis=-1), x.shape[-2]
        q, k, v = (part.reshape(-1, tokens, self.heads, self.width) for part in parts)
        return self.proj(attention.attention(q, k, v)).reshape(x.shape)
