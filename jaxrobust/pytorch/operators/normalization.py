"""Batch, layer, group and instance norm; batch norm in training also updates its statistics."""

from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxrobust.pytorch.program import ChannelsLast, Ints, OperatorRule
from jaxrobust.types import Array

Weight = Array | None


def _scaled(x: Array, weight: Weight, bias: Weight) -> Array:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _batch_norm(
    x: Array, weight: Weight, bias: Weight, mean: Array, var: Array, momentum: float, eps: float
) -> tuple[Any, None, None]:
    factor = lax.rsqrt(var + eps) if weight is None else weight * lax.rsqrt(var + eps)
    return ChannelsLast(_scaled(x - mean, factor, bias)), None, None


def _batch_norm_plain(x: Array, *others: Any) -> tuple[Array, None, None]:
    normalised = _batch_norm(jnp.moveaxis(x, 1, -1), *others)[0].array
    return jnp.moveaxis(normalised, -1, 1), None, None


def _batch_norm_of_images(
    x: Array, weight: Weight, bias: Weight, train: bool, momentum: float, eps: float
) -> tuple[Any, None, None]:
    """Normalize [B,sides...,C] by its own statistics, as instance norm needs."""
    axes = tuple(range(x.ndim - 1))
    mean, var = jnp.mean(x, axes), jnp.var(x, axes)
    return _batch_norm(x, weight, bias, mean, var, momentum, eps)


def _batch_norm_of_batch(
    x: Array,
    weight: Weight,
    bias: Weight,
    running_mean: Array,
    running_var: Array,
    train: bool,
    momentum: float,
    eps: float,
) -> tuple[Any, Array, Array, Array, Array]:
    """Normalize [B,sides...,C] by its own statistics, and update the running statistics.

    Running variances divide by n - 1, as in PyTorch, and no gradient reaches them.
    """
    axes = tuple(range(x.ndim - 1))
    mean, var = jnp.mean(x, axes), jnp.var(x, axes)
    count = x.size // x.shape[-1]
    statistics = lax.stop_gradient((mean, var * (count / max(count - 1, 1))))
    moved = [
        (1 - momentum) * old + momentum * new
        for old, new in zip((running_mean, running_var), statistics, strict=True)
    ]
    normalised, _, _ = _batch_norm(x, weight, bias, mean, var, momentum, eps)
    return normalised, mean, lax.rsqrt(var + eps), *moved


def _layer_norm(
    x: Array, shape: Ints, weight: Weight, bias: Weight, eps: float
) -> tuple[Array, None, None]:
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    return _scaled(_normalised(x, axes, eps), weight, bias), None, None


def _group_norm(
    x: Array, weight: Weight, bias: Weight, n: int, c: int, pixels: int, groups: int, eps: float
) -> tuple[Any, None, None]:
    split = x.reshape(*x.shape[:-1], groups, -1)
    axes = (*range(1, x.ndim - 1), x.ndim)
    normalised = _scaled(_normalised(split, axes, eps).reshape(x.shape), weight, bias)
    return ChannelsLast(normalised), None, None


def _normalised(x: Array, axes: tuple[int, ...], eps: float) -> Array:
    centred = x - jnp.mean(x, axes, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(jnp.square(centred), axes, keepdims=True) + eps)


TABLE = {
    "aten._native_batch_norm_legit_no_training.default": OperatorRule(
        _batch_norm_plain, _batch_norm
    ),
    "aten._native_batch_norm_legit.no_stats": OperatorRule(None, _batch_norm_of_images),
    "aten.native_layer_norm.default": OperatorRule(_layer_norm),
    "aten.native_group_norm.default": OperatorRule(None, _group_norm),
}
TRAINING = {
    "aten._native_batch_norm_legit_functional.default": OperatorRule(None, _batch_norm_of_batch),
}
