"""Operators that draw random numbers from a key, where PyTorch uses a global state.

Each takes a key before PyTorch's operands, and draws in float32, so a network in another type gets
the same numbers. As in PyTorch, no gradient passes through random draws; with dropout, it passes
through the kept values.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrobust.pytorch.program import OperatorRule
from jaxrobust.types import Array

Draw = Callable[..., Array]  # key, shape, numbers that describe the distribution -> draws


def _of_sizes(draw: Draw, place: int = 0) -> OperatorRule:
    """Return the row of a draw whose operand `place` gives the sizes: `randn` 0, `randint` -1."""

    def drawn(key: Array, *operands: Any, dtype: Any = None) -> Array:
        numbers = list(operands)
        draws = draw(key, tuple(numbers.pop(place)), *numbers)
        return draws if dtype is None else draws.astype(dtype)

    return OperatorRule(drawn)


def _alike(draw: Draw) -> OperatorRule:
    """Return the row of a draw with a tensor's shape and type: `randn_like`, `x.normal_()`."""

    def drawn(key: Array, x: Array, *numbers: Any, dtype: Any = None) -> Array:
        taken = map(jax.lax.stop_gradient, numbers)
        return draw(key, x.shape, *taken).astype(dtype or x.dtype)

    return OperatorRule(drawn)


def _uniform(key: Array, shape: Any, low: float = 0.0, high: float = 1.0) -> Array:
    return low + (high - low) * jax.random.uniform(key, shape, jnp.float32)


def _normal(key: Array, shape: Any, mean: Any = 0.0, std: Any = 1.0) -> Array:
    return mean + std * jax.random.normal(key, shape, jnp.float32)


def _bernoulli(key: Array, shape: Any, p: Any = 0.5) -> Array:
    return jax.random.uniform(key, shape, jnp.float32) < p


def _integers(key: Array, shape: Any, low: int, high: int) -> Array:
    return jax.random.randint(key, shape, low, high, jnp.int32)


def _geometric(key: Array, shape: Any, p: float) -> Array:
    uniform = 1 - jax.random.uniform(key, shape, jnp.float32)  # in (0, 1]
    return jnp.floor(jnp.log(uniform) / jnp.log1p(-p)) + 1


def _bernoulli_of(key: Array, p: Array) -> Array:
    return _bernoulli(key, p.shape, jax.lax.stop_gradient(p)).astype(p.dtype)


def _poisson(key: Array, rate: Array) -> Array:
    rates = jax.lax.stop_gradient(rate).astype(jnp.float32)
    return jax.random.poisson(key, rates, dtype=jnp.int32).astype(rate.dtype)


def _normal_of(key: Array, mean: Any, std: Any) -> Array:
    mean, std = jax.lax.stop_gradient((mean, std))
    shape = jnp.broadcast_shapes(jnp.shape(mean), jnp.shape(std))
    return _normal(key, shape, mean, std).astype(jnp.result_type(mean, std))


def _permutation(key: Array, n: int, dtype: Any = None) -> Array:
    order = jnp.argsort(jax.random.uniform(key, (n,), jnp.float32))
    return order if dtype is None else order.astype(dtype)


def _multinomial(key: Array, weights: Array, count: int, replacement: bool = False) -> Array:
    logits = jnp.log(jax.lax.stop_gradient(weights).astype(jnp.float32))
    if replacement:
        shape = (*weights.shape[:-1], count, weights.shape[-1])
        noise = jax.random.gumbel(key, shape, jnp.float32)
        return jnp.argmax(logits[..., None, :] + noise, -1)
    noise = jax.random.gumbel(key, weights.shape, jnp.float32)
    return jax.lax.top_k(logits + noise, count)[1]


def _dropout(key: Array, x: Array, p: float, train: bool | None) -> tuple[Array, Array]:
    if train is False:
        return x, jnp.ones(x.shape, bool)
    mask = jax.random.uniform(key, x.shape, jnp.float32) >= p
    return jnp.where(mask, x / (1 - p) if p < 1 else jnp.zeros_like(x), 0), mask


TABLE = {
    "aten.rand.default": _of_sizes(_uniform),
    "aten.randn.default": _of_sizes(_normal),
    "aten.randint.low": _of_sizes(_integers, -1),
    "aten.randint.default": _of_sizes(lambda key, shape, high: _integers(key, shape, 0, high), -1),
    "aten.rand_like.default": _alike(_uniform),
    "aten.randn_like.default": _alike(_normal),
    "aten.randint_like.default": _alike(lambda key, shape, high: _integers(key, shape, 0, high)),
    "aten.randint_like.low_dtype": _alike(_integers),
    "aten.uniform.default": _alike(_uniform),
    "aten.normal_functional.default": _alike(_normal),
    "aten.normal.float_float": _of_sizes(_normal, -1),
    "aten.normal.Tensor_Tensor": OperatorRule(_normal_of),
    "aten.normal.Tensor_float": OperatorRule(_normal_of),
    "aten.normal.float_Tensor": OperatorRule(_normal_of),
    "aten.bernoulli.p": _alike(_bernoulli),
    "aten.bernoulli.Tensor": _alike(_bernoulli),
    "aten.bernoulli.default": OperatorRule(_bernoulli_of),
    "aten.exponential.default": _alike(
        lambda key, shape, rate=1.0: jax.random.exponential(key, shape, jnp.float32) / rate
    ),
    "aten.log_normal.default": _alike(
        lambda key, shape, mean=1.0, std=2.0: jnp.exp(_normal(key, shape, mean, std))
    ),
    "aten.cauchy.default": _alike(
        lambda key, shape, at=0.0, wide=1.0: at + wide * jax.random.cauchy(key, shape, jnp.float32)
    ),
    "aten.geometric.default": _alike(_geometric),
    "aten.poisson.default": OperatorRule(_poisson),
    "aten.randperm.default": OperatorRule(_permutation),
    "aten.multinomial.default": OperatorRule(_multinomial),
    "aten.native_dropout.default": OperatorRule(_dropout),
}
