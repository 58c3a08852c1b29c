"""Values with an explicit gradient."""

from collections.abc import Callable
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
    """Return a value with the gradient of another expression of the same shape and type."""
    return _first(lax.stop_gradient(value), linear)


def sloped(value: Callable[..., Array], *slopes: Callable[..., Array]) -> Callable[..., Array]:
    """Return a function of arrays of one shape and type, with a slope for each array.

    Args:
      value: an element-wise function.
      slopes: functions of the result and the operands, as in PyTorch at kinks and bounds.
    """

    def times(slope: Callable[..., Array]) -> Callable[..., Array]:
        return lambda tangent, *values: tangent * slope(*values)

    function = jax.custom_jvp(value)
    function.defjvps(*map(times, slopes))
    return function
