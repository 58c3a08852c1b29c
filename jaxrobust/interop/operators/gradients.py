"""Values whose gradient is written down beside them."""

from jax import lax

from jaxrobust.types import Array


def with_gradient_of(value: Array, linear: Array) -> Array:
    """Return a value whose gradient is that of another expression, which is finite."""
    return lax.stop_gradient(value) + (linear - lax.stop_gradient(linear))
