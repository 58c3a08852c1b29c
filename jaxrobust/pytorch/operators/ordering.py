"""Operators that select by order: medians, k-th values, running extremes, searches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.pytorch.operators.gradients import with_gradient_of
from jaxrobust.pytorch.operators.reductions import taken
from jaxrobust.pytorch.program import OperatorRule
from jaxrobust.types import Array


def _median(x: Array, dim: int, keepdim: bool) -> tuple[Array, Array]:
    """Return the lower median, with PyTorch's choice among equals; with NaNs, the first of them."""
    order = jnp.argsort(x, axis=dim, stable=True)
    middle = lax.index_in_dim(order, (x.shape[dim] - 1) // 2, dim % x.ndim)
    none = jnp.isnan(x)
    places = jnp.where(none.any(dim, keepdims=True), jnp.argmax(none, dim, keepdims=True), middle)
    return taken(x, places, dim, keepdim)


def _median_of_numbers(x: Array, dim: int, keepdim: bool) -> tuple[Array, Array]:
    """Return the median without NaNs; NaN if nothing else is left."""
    order = jnp.argsort(x, axis=dim, stable=True)  # NaN comes last
    count = (~jnp.isnan(x)).sum(dim, keepdims=True)
    places = jnp.take_along_axis(order, jnp.maximum(count - 1, 0) // 2, axis=dim)
    return taken(x, places, dim, keepdim)


def _whole(median: Callable[[Array, int, bool], tuple[Array, Array]]) -> OperatorRule:
    """Return the row for the median of all numbers; equal numbers share its gradient."""

    def whole(x: Array) -> Array:
        value = lax.stop_gradient(median(x.reshape(-1), 0, False)[0])
        equal = (x == value) | (jnp.isnan(x) & jnp.isnan(value))
        return with_gradient_of(value, jnp.where(equal, x, 0).sum() / equal.sum())

    return OperatorRule(whole)


def _mode(x: Array, dim: int = -1, keepdim: bool = False) -> tuple[Array, Array]:
    if not x.ndim:
        return x, jnp.zeros((), int)
    order = jnp.argsort(x, axis=dim, stable=True)
    rows = jnp.moveaxis(jnp.take_along_axis(lax.stop_gradient(x), order, axis=dim), dim, -1)
    at = jnp.arange(rows.shape[-1])
    begins = jnp.concatenate([rows[..., :1] == rows[..., :1], rows[..., 1:] != rows[..., :-1]], -1)
    length = at - lax.cummax(jnp.where(begins, at, 0), axis=rows.ndim - 1)
    last = jnp.expand_dims(length.argmax(-1), dim)
    return taken(x, jnp.take_along_axis(order, last, axis=dim), dim, keepdim)


def _histogram(x: Array, bins: int = 100, low: Any = 0, high: Any = 0) -> Array:
    """Count numbers in bins of [low, high]; equal bounds mean the numbers' minimum and maximum."""
    x = lax.stop_gradient(x).reshape(-1)
    if low == high:
        low, high = x.min(), x.max()
        low, high = jnp.where(low == high, low - 1, low), jnp.where(low == high, high + 1, high)
    place = jnp.floor((x - low) / (high - low) * bins)
    place = jnp.where((x >= low) & (x <= high), jnp.minimum(place, bins - 1), bins)
    return jnp.zeros(bins, x.dtype).at[place.astype(int)].add(1, mode="drop")


def _kth_value(x: Array, k: int, dim: int, keepdim: bool) -> tuple[Array, Array]:
    """Return the k-th smallest number and its position, with PyTorch's choice among equals."""
    if not x.ndim:
        return x, jnp.zeros((), int)
    rows = jnp.moveaxis(lax.stop_gradient(x), dim, -1)
    chosen = jax.vmap(lambda row: _selected(row, k - 1))(rows.reshape(-1, rows.shape[-1]))
    places = jnp.expand_dims(chosen.reshape(rows.shape[:-1]), dim)
    return taken(x, places, dim, keepdim)


def _selected(row: Array, k: int) -> Array:
    """Select the k-th smallest of f[N] as PyTorch does: Hoare's algorithm with median of three."""

    def after(x: Array, y: Array) -> Array:
        return (x > y) | (jnp.isnan(x) & ~jnp.isnan(y))

    at = jnp.arange(len(row))

    def swapped(order: Array, i: Any, j: Any, really: Any = True) -> Array:
        both = order.at[i].set(order[j]).at[j].set(order[i])
        return jnp.where(really, both, order)

    def unordered(order: Array, i: Any, j: Any) -> Array:
        return after(row[order[i]], row[order[j]])

    def meet(order: Array, i: Array, j: Array, pivot: Array) -> tuple[Array, Array]:
        """Return the next positions, from `i` up and from `j` down, on the wrong side."""
        values = row[order]
        up = jnp.argmax((at > i) & ~after(pivot, values))
        down = len(row) - 1 - jnp.argmax(((at < j) & ~after(values, pivot))[::-1])
        return up, down

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        order, low, high = state
        pair = high == low + 1
        two = swapped(order, low, high, unordered(order, low, high))
        order = swapped(order, low + (high - low) // 2, low + 1)
        for i, j in ((low + 1, high), (low, high), (low + 1, low)):
            order = swapped(order, i, j, unordered(order, i, j))
        pivot = row[order[low]]

        def exchange(state: Any) -> Any:
            order, i, j = state
            order = swapped(order, i, j)
            return order, *meet(order, i, j, pivot)

        order, i, j = lax.while_loop(
            lambda state: state[1] <= state[2],
            exchange,
            (order, *meet(order, low + 1, high, pivot)),
        )
        order = swapped(order, low, j)
        next_low, next_high = jnp.where(j <= k, i, low), jnp.where(j >= k, j - 1, high)
        return (
            jnp.where(pair, two, order),
            jnp.where(pair, high, next_low),
            jnp.where(pair, high, next_high),
        )

    last = len(row) - 1
    start = (at, jnp.asarray(0, at.dtype), jnp.asarray(last, at.dtype))
    return lax.while_loop(lambda state: state[2] > state[1], step, start)[0][k]


def _running(beats: Callable[[Array, Array], Array]) -> OperatorRule:
    """Return the row for a running extreme with its position, the last among equals."""

    def join(first: Any, second: Any) -> Any:
        wins = beats(second[0], first[0]) | jnp.isnan(second[0])
        return jnp.where(wins, second[0], first[0]), jnp.where(wins, second[1], first[1])

    def running(x: Array, dim: int) -> tuple[Array, Array]:
        shape = [-1 if axis == dim % x.ndim else 1 for axis in range(x.ndim)]
        at = jnp.arange(x.shape[dim]).reshape(shape)
        pairs = lax.stop_gradient(x), jnp.broadcast_to(at, x.shape)
        places = lax.associative_scan(join, pairs, axis=dim)[1]
        return jnp.take_along_axis(x, places, axis=dim), places

    return OperatorRule(running)


def _bucketize(x: Array, bounds: Array, out_int32: bool = False, right: bool = False) -> Array:
    places = jnp.searchsorted(bounds, x, side="right" if right else "left")
    return places.astype(jnp.int32 if out_int32 else int)


def _searchsorted(
    bounds: Array,
    x: Any,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Array | None = None,
) -> Array:
    """Find the positions of numbers [..., M] among bounds [N], or row-wise bounds [..., N]."""
    bounds = bounds if sorter is None else jnp.take_along_axis(bounds, sorter, axis=-1)
    x = jnp.asarray(x)
    if bounds.ndim == 1:
        return _bucketize(x, bounds, out_int32, right or side == "right")
    rows = bounds.reshape(-1, bounds.shape[-1]), x.reshape(-1, x.shape[-1])
    places = jax.vmap(lambda b, v: _bucketize(v, b, out_int32, right or side == "right"))(*rows)
    return places.reshape(x.shape)


TABLE = {
    "aten.max.default": OperatorRule(jnp.max),
    "aten.min.default": OperatorRule(jnp.min),
    "aten.median.default": _whole(_median),
    "aten.median.dim": OperatorRule(_median),
    "aten.nanmedian.default": _whole(_median_of_numbers),
    "aten.nanmedian.dim": OperatorRule(_median_of_numbers),
    "aten.mode.default": OperatorRule(_mode),
    "aten.histc.default": OperatorRule(_histogram),
    "aten.kthvalue.default": OperatorRule(_kth_value),
    "aten.cummax.default": _running(jnp.greater_equal),
    "aten.cummin.default": _running(jnp.less_equal),
    "aten.bucketize.Tensor": OperatorRule(_bucketize),
    "aten.searchsorted.Tensor": OperatorRule(_searchsorted),
}
