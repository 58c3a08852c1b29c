"""Activations by the names that rows and configs give them."""

import jax
import jax.numpy as jnp

from jaxrobust.models.kernels import layers
from jaxrobust.types import Array


def silu(x: Array) -> Array:
    """Compute `x * sigmoid(x)`."""
    return x * jax.nn.sigmoid(x)


def softplus(x: Array) -> Array:
    """Compute `log(1 + exp(x))`, and `x` itself above 20, as PyTorch has it."""
    below = jnp.where(x > 20, 20, x)  # the branch that is not taken must have a finite gradient too
    return jnp.where(x > 20, x, jnp.log1p(jnp.exp(below)))


def hard_swish(x: Array) -> Array:
    """Compute `x * min(max(x + 3, 0), 6) / 6`: 0 up to -3, `x` itself from 3 on."""
    inside = x * (jnp.clip(x, -3, 3) + 3) / 6
    return jnp.where(x <= -3, jnp.zeros_like(x), jnp.where(x >= 3, x, inside))


ACTIVATIONS = {
    "relu": layers.relu,
    "silu": silu,
    "softplus": softplus,
    "gelu": layers.gelu,
    "hard_swish": hard_swish,
}
