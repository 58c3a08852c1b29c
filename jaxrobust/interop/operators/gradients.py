"""Values whose gradient is written down beside them."""

from typing import Any

import jax
from jax import lax

from jaxrobust.types import Array


@jax.custom_jvp
def _first(value: Array, linear: Array) -> Array:
    del linear
    return value


@_first.defjvp
def _(values: Any, tangents: Any) -> tuple[Array, Array]:
    return values[0], tangents[1]


def with_gradient_of(value: Array, linear: Array) -> Array:
    """Return a value whose gradient is that of another expression, of the same shape and type."""
    return _first(lax.stop_gradient(value), linear)
