"""Operators that only move numbers: views, slices, concatenations, padding, new tensors."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrobust.pytorch.program import ChannelsLast, Ints, OperatorRule
from jaxrobust.types import Array


def moved(dim: int, axes: int) -> int:
    """Translate a PyTorch dimension to channels last."""
    dim %= axes
    return dim if dim == 0 else axes - 1 if dim == 1 else dim - 1


def _part(x: Array, axis: int, start: Any, end: Any, step: int = 1) -> Array:
    index: list[Any] = [slice(None)] * x.ndim
    index[axis] = slice(start, end, step)
    return x[tuple(index)]


def _split(x: Array, sizes: Ints, dim: int) -> list[Array]:
    return jnp.split(x, np.cumsum(sizes)[:-1].tolist(), axis=dim)


def _split_last(x: Array, sizes: Ints, dim: int) -> list[ChannelsLast]:
    return [ChannelsLast(part) for part in _split(x, sizes, moved(dim, x.ndim))]


def _concatenate(arrays: Sequence[Array], dim: int) -> Array:
    # PyTorch skips empty tensors.
    return jnp.concatenate([array for array in arrays if array.shape != (0,)], axis=dim)


def _expand(x: Array, sizes: Ints, implicit: bool = False) -> Array:
    old = (1,) * (len(sizes) - x.ndim) + x.shape
    return jnp.broadcast_to(x, [o if s == -1 else s for s, o in zip(sizes, old, strict=True)])


def _padded(x: Array, widths: Ints, value: float, *, last: bool) -> Any:
    pairs = [(low, high, 0) for low, high in zip(widths[::2], widths[1::2], strict=True)]
    around = [(0, 0, 0)] * (x.ndim - len(pairs)) + pairs[::-1]
    if last:
        around.append(around.pop(1))
    return lax.pad(x, jnp.asarray(value, x.dtype), around)


def _strided(x: Array, sizes: Ints, strides: Ints, offset: int | None) -> Array:
    places = np.asarray(offset or 0)
    for size, stride in zip(sizes, strides, strict=True):
        places = places[..., None] + np.arange(size) * stride
    return x.reshape(-1)[places]


def _unfold(x: Array, dim: int, size: int, step: int) -> Array:
    starts = np.arange(0, x.shape[dim] - size + 1, step)
    taken = jnp.take(x, starts[:, None] + np.arange(size), axis=dim)
    return jnp.moveaxis(taken, dim % x.ndim + 1, -1)


def _slice_scatter(x: Array, source: Array, dim: int, start: Any, end: Any, step: int) -> Array:
    index: list[Any] = [slice(None)] * x.ndim
    index[dim] = slice(start, end, step)
    return x.at[tuple(index)].set(source)


TABLE = {
    "aten.view.default": OperatorRule(lambda x, sizes: x.reshape(sizes)),
    "aten.permute.default": OperatorRule(jnp.transpose),
    "aten.unsqueeze.default": OperatorRule(jnp.expand_dims),
    "aten.squeeze.dims": OperatorRule(
        lambda x, dims: jnp.squeeze(x, tuple(dim for dim in dims if x.shape[dim] == 1))
    ),
    "aten.expand.default": OperatorRule(_expand),
    "aten.repeat.default": OperatorRule(jnp.tile),
    "aten.slice.Tensor": OperatorRule(
        lambda x, dim, *cut: _part(x, dim % x.ndim, *cut),
        lambda x, dim, *cut: ChannelsLast(_part(x, moved(dim, x.ndim), *cut)),
    ),
    "aten.select.int": OperatorRule(lambda x, dim, place: lax.index_in_dim(x, place, dim, False)),
    "aten.split_with_sizes.default": OperatorRule(_split, _split_last),
    "aten.cat.default": OperatorRule(
        _concatenate,
        lambda arrays, dim: ChannelsLast(jnp.concatenate(arrays, moved(dim, arrays[0].ndim))),
    ),
    "aten.flip.default": OperatorRule(lambda x, dims: jnp.flip(x, dims)),
    "aten.constant_pad_nd.default": OperatorRule(
        partial(_padded, last=False),
        lambda x, widths, value: ChannelsLast(_padded(x, widths, value, last=True)),
    ),
    "aten.as_strided.default": OperatorRule(_strided),
    "aten.unfold.default": OperatorRule(_unfold),
    "aten.diagonal.default": OperatorRule(jnp.diagonal),
    "aten.slice_scatter.default": OperatorRule(_slice_scatter),
    "aten.full.default": OperatorRule(jnp.full),
    "aten.full_like.default": OperatorRule(jnp.full_like),
    "aten.scalar_tensor.default": OperatorRule(lambda value, dtype=None: jnp.asarray(value, dtype)),
    "aten.arange.start_step": OperatorRule(jnp.arange),
    **{  # written before they are read
        f"aten.{name}": OperatorRule(lambda sizes, *strides, dtype=None: jnp.zeros(sizes, dtype))
        for name in ("empty.memory_format", "empty_permuted.default")
    },
}
