"""Element-wise operators: arithmetic, comparisons, activations."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrobust.pytorch.operators.gradients import sloped, with_gradient_of
from jaxrobust.pytorch.program import OperatorRule
from jaxrobust.types import Array

Function = Callable[..., Any]
Functions = dict[str, Function]


def _of_floats(function: Function) -> Function:
    def of_floats(x: Any, *others: Any) -> Array:
        x = jnp.asarray(x)
        return function(x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(float), *others)

    return of_floats


def _divide_rounded(x: Any, y: Any, rounding_mode: str | None) -> Array:
    if rounding_mode is None:
        return _of_floats(jnp.divide)(x, y)
    if rounding_mode == "floor":
        return jnp.floor_divide(x, y)
    if jnp.issubdtype(jnp.result_type(x, y), jnp.integer):
        return jnp.sign(x) * jnp.sign(y) * (jnp.abs(x) // jnp.abs(y))
    return jnp.trunc(x / y)


def _of_pairs(value: Function, *slopes: Function) -> Function:
    """Return a function of two operands of any shape and type, with their slopes."""
    function = sloped(value, *slopes)

    def of_pairs(x: Any, y: Any) -> Array:
        dtype = jnp.result_type(x, y)
        dtype = dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.result_type(float)
        return function(*jnp.broadcast_arrays(*(jnp.asarray(a, dtype) for a in (x, y))))

    return of_pairs


_power_of_pairs = _of_pairs(
    jnp.power,
    lambda power, x, y: jnp.where(y == 0, 0, y * jnp.power(x, y - 1)),
    lambda power, x, y: jnp.where((x == 0) & (y >= 0), 0, power * jnp.log(x)),
)
_remainder_of_pairs = _of_pairs(
    jnp.remainder, lambda value, x, y: 1, lambda value, x, y: -jnp.floor_divide(x, y)
)


def _remainder(x: Any, y: Any) -> Array:
    floating = jnp.issubdtype(jnp.result_type(x, y), jnp.inexact)
    return (_remainder_of_pairs if floating else jnp.remainder)(x, y)


def _power(x: Any, exponent: Any) -> Array:
    if not jnp.issubdtype(jnp.result_type(x, exponent), jnp.inexact):
        return jnp.power(x, exponent)
    if not isinstance(exponent, int | float):
        return _power_of_pairs(x, exponent)
    x = jnp.asarray(x, jnp.result_type(x, exponent))
    if exponent == 0:
        return jnp.ones_like(x)
    power = sloped(
        lambda x: _raised(x, exponent), lambda power, x: exponent * _raised(x, exponent - 1)
    )
    return power(x)


def _raised(x: Array, exponent: float) -> Array:
    if abs(exponent) == 0.5:  # the root of -0 is -0
        return jnp.sqrt(x) if exponent > 0 else lax.rsqrt(x)
    is_integer = float(exponent).is_integer() and abs(exponent) < 64
    return jnp.power(x, int(exponent) if is_integer else exponent)


def _logit(x: Array, eps: float | None = None) -> Array:
    low, high = (0.0, 1.0) if eps is None else (eps, 1 - eps)

    def value(x: Array) -> Array:
        x = x if eps is None else jnp.clip(x, low, high)
        return jnp.log(x / (1 - x))

    def slope(logit: Array, x: Array) -> Array:
        outside = jnp.nan if eps is None else 0
        return jnp.where((x < low) | (x > high), outside, 1 / (x * (1 - x)))

    return sloped(value, slope)(x)


def _times_logarithm(logarithm: Function, end: float) -> Function:
    """Return x log(y), which is 0 at x = 0; the logarithm is defined from `end` on."""

    def value(x: Array, y: Array) -> Array:
        return jnp.where((x == 0) & ~jnp.isnan(y), 0, x * logarithm(y))

    return _of_pairs(
        value,
        lambda value, x, y: jnp.where((x == 0) & (y <= end), 0, logarithm(y)),
        lambda value, x, y: x / (y - end),
    )


_entropy = sloped(
    lambda x, y: -(y * jnp.maximum(jnp.log(x), -100) + (1 - y) * jnp.maximum(jnp.log1p(-x), -100)),
    lambda loss, x, y: (x - y) / jnp.maximum((1 - x) * x, float(np.float32(1e-12))),
    lambda loss, x, y: jnp.log1p(-x) - jnp.log(x),
)


def _binary_cross_entropy(
    x: Array, target: Array, weight: Array | None = None, reduction: int = 1
) -> Array:
    loss = _entropy(x, target)
    loss = loss if weight is None else loss * weight
    return (lambda x: x, jnp.mean, jnp.sum)[reduction](loss)


def _elu(x: Array, alpha: float, scale: float, input_scale: float) -> Array:
    negative = alpha * jnp.expm1(jnp.where(x > 0, 0, x) * input_scale)
    return scale * jnp.where(x > 0, x, negative)


def _leaky_relu(x: Array, slope: float) -> Array:
    return jnp.where(x > 0, x, x * slope)


def _rrelu(x: Array, noise: Array, low: float, high: float, training: bool) -> tuple[Any, None]:
    return _leaky_relu(x, (low + high) / 2), None


def _hardtanh(x: Array, low: float, high: float) -> Array:
    """Clip numbers; at the bounds the gradient is zero, unlike in `_clamp`."""
    inside = (x > low) & (x < high)
    return jnp.where(inside, x, jnp.clip(lax.stop_gradient(x), low, high))


def _clamp(x: Array, low: Any, high: Any) -> Array:
    """Clip numbers to bounds; there is no gradient if the lower bound is not below the upper."""
    if low is not None:
        low = jnp.asarray(low, x.dtype)
        bound = low if high is None else jnp.where(low < high, low, lax.stop_gradient(low))
        x = jnp.where(x < low, bound, x)
    return x if high is None else jnp.where(x > high, jnp.asarray(high, x.dtype), x)


def _quantised(x: Array, scale: Any, zero: Any, low: int, high: int) -> tuple[Array, Array]:
    """Quantize numbers, and say which are in range; the gradient passes there."""
    single = np.float32(scale)  # as PyTorch stores it, in any compute type
    places = jnp.round(lax.stop_gradient(x) * jnp.asarray(1 / single, x.dtype)) + zero
    inside = (places >= low) & (places <= high)
    value = (jnp.clip(places, low, high) - zero).astype(single.dtype) * single
    return with_gradient_of(value.astype(x.dtype), jnp.where(inside, x, 0)), inside


_abs = sloped(jnp.abs, lambda size, x: jnp.sign(x))
_digamma = sloped(
    lambda x: jnp.where(x == 0, jnp.copysign(jnp.inf, -x), lax.digamma(x)),
    lambda digamma, x: jax.scipy.special.polygamma(1, x),
)


def _called(module: Any, *names: str) -> Functions:
    """Look up functions by PyTorch's names."""
    return {name: getattr(module, name) for name in names}


_UNARY: Functions = {
    # JAX's own gradient at 0 is 1, and 0 for complex numbers.
    "abs": lambda x: (_abs if jnp.issubdtype(x.dtype, jnp.floating) else jnp.abs)(x),
    **_called(jnp, "sign", "floor", "ceil", "trunc", "round", "isnan", "isinf"),
    **_called(jnp, "logical_not", "bitwise_not"),
    "neg": jnp.negative,
    **{name: lambda x, **ignored: x for name in ("clone", "alias")},
    "_to_copy": lambda x, dtype=None: x if dtype is None else jnp.asarray(x).astype(dtype),
    # NaN stays NaN, and the gradient at 0 is 0, as in PyTorch.
    "relu": lambda x: jnp.where(x <= 0, jnp.zeros_like(x), x),
    "gelu": lambda x, approximate="none": jax.nn.gelu(x, approximate=approximate == "tanh"),
    "elu": _elu,
    "silu": jax.nn.silu,
    "leaky_relu": _leaky_relu,
    "hardtanh": _hardtanh,
    "hardsigmoid": sloped(
        lambda x: jnp.clip(x + 3, 0, 6) / 6,
        lambda value, x: jnp.where((x > -3) & (x < 3), float(np.float32(1 / 6)), 0).astype(x.dtype),
    ),
    "hardswish": sloped(
        lambda x: x * jnp.clip(x + 3, 0, 6) / 6,
        lambda value, x: jnp.where(x <= -3, 0, jnp.where(x < 3, x / 3 + 0.5, 1)),
    ),
    "clamp": _clamp,
}
_OF_FLOATS: Functions = {
    **_called(jnp, "exp", "expm1", "log", "log2", "log10", "log1p", "sqrt", "reciprocal"),
    **_called(jnp, "sin", "cos", "tan", "sinh", "cosh", "tanh"),
    **{f"a{name}": getattr(jnp, f"arc{name}") for name in ("sin", "cos", "tan")},
    **{f"a{name}": getattr(jnp, f"arc{name}") for name in ("sinh", "tanh")},
    "acosh": sloped(jnp.arccosh, lambda value, x: lax.rsqrt(x * x - 1)),  # infinite at -1 too
    **_called(lax, "erf", "erfc"),
    "erfinv": lax.erf_inv,
    "sigmoid": jax.nn.sigmoid,
    "rsqrt": sloped(lax.rsqrt, lambda root, x: -0.5 * root**3),
    "digamma": _digamma,
    "lgamma": sloped(lax.lgamma, lambda value, x: _digamma(x)),
    "logit": _logit,
    "sinc": sloped(
        jnp.sinc,
        lambda value, x: jnp.where(x == 0, 0, (jnp.cos(jnp.pi * x) - value) / x),
    ),
    "special_entr": sloped(
        lambda x: jnp.where(x == 0, 0, jnp.where(x < 0, -jnp.inf, -x * jnp.log(x))),
        lambda value, x: -1 - jnp.log(x),
    ),
}
_BINARY: Functions = {
    **_called(jnp, "maximum", "minimum", "logical_and", "logical_or", "logical_xor"),
    "hypot": _of_pairs(jnp.hypot, lambda r, x, y: x / r, lambda r, x, y: y / r),
    "atan2": _of_pairs(
        jnp.arctan2,
        lambda angle, y, x: jnp.where((x == 0) & (y == 0), 0, x / (x * x + y * y)),
        lambda angle, y, x: jnp.where((x == 0) & (y == 0), 0, -y / (x * x + y * y)),
    ),
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
    **_called(jnp, "bitwise_and", "bitwise_or", "bitwise_xor", "fmod"),
    "remainder": _remainder,
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
    **_rows({"xlogy": _times_logarithm(jnp.log, 0)}, "Tensor", "Scalar_Self", "Scalar_Other"),
    **_rows(
        {"special_xlog1py": _times_logarithm(jnp.log1p, -1)},
        *("default", "self_scalar", "other_scalar"),
    ),
    "aten.binary_cross_entropy.default": OperatorRule(_binary_cross_entropy),
    # See `custom_gradients`.
    "jaxrobust.stop.default": OperatorRule(lax.stop_gradient, joins=True),
    "aten.fake_quantize_per_tensor_affine_cachemask.default": OperatorRule(_quantised),
    "aten.rrelu_with_noise_functional.default": OperatorRule(_rrelu),
}
