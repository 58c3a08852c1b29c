"""Operators that compute every number by itself: arithmetic, comparisons, activations."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.interop.operators.gradients import with_gradient_of
from jaxrobust.interop.program import OperatorRule
from jaxrobust.types import Array


def _of_floats(function: Callable[..., Array]) -> Callable[..., Array]:
    def of_floats(x: Any, *rest: Any) -> Array:
        x = jnp.asarray(x)
        return function(x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(float), *rest)

    return of_floats


def _divide_rounded(x: Any, y: Any, rounding_mode: str | None) -> Array:
    if rounding_mode is None:
        return _of_floats(jnp.divide)(x, y)
    if rounding_mode == "floor":
        return jnp.floor_divide(x, y)
    if jnp.issubdtype(jnp.result_type(x, y), jnp.integer):
        return jnp.sign(x) * jnp.sign(y) * (jnp.abs(x) // jnp.abs(y))
    return jnp.trunc(x / y)


def _power(x: Any, exponent: Any) -> Array:
    whole = isinstance(exponent, float) and exponent.is_integer() and abs(exponent) < 64
    return jnp.power(x, int(exponent) if whole else exponent)


def _elu(x: Array, alpha: float, scale: float, input_scale: float) -> Array:
    negative = alpha * jnp.expm1(jnp.where(x > 0, 0, x) * input_scale)
    return scale * jnp.where(x > 0, x, negative)


def _leaky_relu(x: Array, slope: float) -> Array:
    return jnp.where(x > 0, x, x * slope)


def _rrelu(x: Array, noise: Array, low: float, high: float, training: bool) -> tuple[Any, None]:
    return _leaky_relu(x, (low + high) / 2), None


def _hardtanh(x: Array, low: float, high: float) -> Array:
    """Return numbers cut off; at the ends the gradient is zero, other than that of `_clamp`."""
    inside = (x > low) & (x < high)
    return jnp.where(inside, x, jnp.clip(jax.lax.stop_gradient(x), low, high))


def _clamp(x: Array, low: Any, high: Any) -> Array:
    x = x if low is None else jnp.where(x >= low, x, jnp.asarray(low, x.dtype))
    return x if high is None else jnp.where(x <= high, x, jnp.asarray(high, x.dtype))


def _quantised(x: Array, scale: Any, zero: Any, low: int, high: int) -> tuple[Array, Array]:
    """Return numbers as few bits hold them, and which are inside; the gradient passes there."""
    single = np.float32(scale)  # as PyTorch holds it, whatever it computes in
    places = jnp.round(jax.lax.stop_gradient(x) * jnp.asarray(1 / single, x.dtype)) + zero
    inside = (places >= low) & (places <= high)
    value = (jnp.clip(places, low, high) - zero).astype(single.dtype) * single
    return with_gradient_of(value.astype(x.dtype), jnp.where(inside, x, 0)), inside


Functions = dict[str, Callable[..., Any]]


def _called(module: Any, *names: str) -> Functions:
    """Look up functions whose names are PyTorch's."""
    return {name: getattr(module, name) for name in names}


_UNARY: Functions = {
    **_called(jnp, "abs", "sign", "floor", "ceil", "trunc", "round", "isnan", "isinf"),
    **_called(jnp, "logical_not", "bitwise_not"),
    "neg": jnp.negative,
    **{name: lambda x, **ignored: x for name in ("clone", "alias")},
    "_to_copy": lambda x, dtype=None: x if dtype is None else jnp.asarray(x).astype(dtype),
    # NaN stays NaN, and the gradient at 0 is 0, as PyTorch's.
    "relu": lambda x: jnp.where(x <= 0, jnp.zeros_like(x), x),
    "gelu": lambda x, approximate="none": jax.nn.gelu(x, approximate=approximate == "tanh"),
    "elu": _elu,
    "silu": jax.nn.silu,
    "leaky_relu": _leaky_relu,
    "hardtanh": _hardtanh,
    "clamp": _clamp,
}
_OF_FLOATS: Functions = {
    **_called(jnp, "exp", "expm1", "log", "log2", "log10", "log1p", "sqrt", "reciprocal"),
    **_called(jnp, "sin", "cos", "tan", "sinh", "cosh", "tanh"),
    **{f"a{name}": getattr(jnp, f"arc{name}") for name in ("sin", "cos", "tan")},
    **{f"a{name}": getattr(jnp, f"arc{name}") for name in ("sinh", "cosh", "tanh")},
    **_called(jax.lax, "rsqrt", "erf", "erfc", "lgamma", "digamma"),
    "erfinv": jax.lax.erf_inv,
    "sigmoid": jax.nn.sigmoid,
}
_BINARY: Functions = {
    **_called(jnp, "maximum", "minimum", "hypot", "logical_and", "logical_or", "logical_xor"),
    "atan2": jnp.arctan2,
    "copy": lambda x, source: jnp.broadcast_to(source, x.shape).astype(x.dtype),
}
_OF_TENSOR_OR_SCALAR: Functions = {
    "add": lambda x, y, alpha=1: jnp.add(x, y if alpha == 1 else y * alpha),
    "sub": lambda x, y, alpha=1: jnp.subtract(x, y if alpha == 1 else y * alpha),
    "mul": jnp.multiply,
    "div": _of_floats(jnp.divide),
    "eq": jnp.equal,
    "ne": jnp.not_equal,
    "lt": jnp.less,
    "le": jnp.less_equal,
    "gt": jnp.greater,
    "ge": jnp.greater_equal,
    **_called(jnp, "bitwise_and", "bitwise_or", "bitwise_xor", "remainder", "fmod"),
}


def _rows(functions: Functions, *overloads: str) -> dict[str, OperatorRule]:
    return {
        f"aten.{name}.{overload}": OperatorRule(function, joins=True)
        for name, function in functions.items()
        for overload in overloads
    }


TABLE = {
    **_rows(_UNARY | _BINARY, "default"),
    **_rows({name: _of_floats(function) for name, function in _OF_FLOATS.items()}, "default"),
    **_rows(_OF_TENSOR_OR_SCALAR, "Tensor", "Scalar"),
    **_rows({"div": _divide_rounded}, "Tensor_mode", "Scalar_mode"),
    **_rows({"pow": _power}, "Tensor_Scalar", "Tensor_Tensor", "Scalar"),
    **_rows({"clamp": _clamp}, "Tensor"),
    **_rows({"where": jnp.where}, "self"),
    # See `interop.gradients`.
    "jaxrobust.stop.default": OperatorRule(jax.lax.stop_gradient, joins=True),
    "aten.fake_quantize_per_tensor_affine_cachemask.default": OperatorRule(_quantised),
    "aten.rrelu_with_noise_functional.default": OperatorRule(_rrelu),
}
