"""Reductions and lookups: sums and extremes, softmax, order, indexing, distances."""

from collections.abc import Callable, Sequence
from string import ascii_letters
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrobust.pytorch.operators import sorting
from jaxrobust.pytorch.operators.gradients import sloped, with_gradient_of
from jaxrobust.pytorch.operators.shapes import moved
from jaxrobust.pytorch.program import ChannelsLast, Ints, OperatorRule
from jaxrobust.types import Array

Dims = Ints | None


def _axes(dims: Dims, axes: int) -> tuple[int, ...]:
    """Return the dimensions of a reduction; in PyTorch, no dimensions means all."""
    return tuple(dim % axes for dim in dims) if dims else tuple(range(axes))


def _over(reduce: Callable[..., Array]) -> OperatorRule:
    def plain(
        x: Array, dims: Dims, keepdim: bool = False, dtype: Any = None, **options: Any
    ) -> Array:
        x = x if dtype is None else x.astype(dtype)
        return reduce(x, _axes(dims, x.ndim), keepdims=keepdim, **options)

    def last(x: Array, dims: Dims, keepdim: bool = False, dtype: Any = None, **options: Any) -> Any:
        gone = _axes(dims, x.ndim)
        if not keepdim and not {0, 1}.isdisjoint(gone):
            return plain(ChannelsLast(x).plain(), dims, keepdim, dtype, **options)
        x = x if dtype is None else x.astype(dtype)
        reduced = reduce(x, tuple(moved(dim, x.ndim) for dim in gone), keepdims=keepdim, **options)
        if keepdim:
            return ChannelsLast(reduced)
        return reduced if reduced.ndim == 2 else ChannelsLast(reduced)

    return OperatorRule(plain, last)


def _variance(x: Array, axes: Any, *, keepdims: bool, correction: float | None = 1) -> Array:
    """Return variances, exactly 0 for equal numbers, however their mean rounds."""
    first = x[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(x.ndim))]
    from_first = x - lax.stop_gradient(first)
    return jnp.var(
        from_first, axes, ddof=1 if correction is None else int(correction), keepdims=keepdims
    )


_root = sloped(jnp.sqrt, lambda root, x: jnp.where(root == 0, 0, 0.5 / root))


def _deviation(x: Array, axes: Any, **options: Any) -> Array:
    return _root(_variance(x, axes, **options))


def _norm(x: Array, order: float, dims: Dims, keepdim: bool, dtype: Any = None) -> Array:
    axes = _axes(dims, x.ndim)

    @jax.custom_jvp
    def norm(x: Array) -> Array:
        size = jnp.abs(x)
        if order == 0:
            return (size != 0).sum(axes, keepdims=True).astype(size.dtype)
        if abs(order) == np.inf:
            return (size.max if order > 0 else size.min)(axes, keepdims=True)
        if order == 1:
            return size.sum(axes, keepdims=True)
        if order == 2:
            return jnp.sqrt(jnp.square(size).sum(axes, keepdims=True))
        return (size**order).sum(axes, keepdims=True) ** (1 / order)

    def slope(value: Array, x: Array) -> Array:
        if abs(order) == np.inf:
            chosen = (jnp.abs(x) == value).astype(x.dtype)
            return jnp.sign(x) * chosen / chosen.sum(axes, keepdims=True)
        return _norm_slope(x, value, order)

    norm.defjvps(lambda tangent, value, x: (slope(value, x) * tangent).sum(axes, keepdims=True))
    value = norm(x if jnp.issubdtype(x.dtype, jnp.floating) else jnp.abs(x))
    return value if keepdim else value.squeeze(axes)


def _norm_slope(x: Array, norm: Array, order: float) -> Array:
    """Return the slopes of a norm of finite order, which are 0 at 0."""
    if order == 0:
        return jnp.zeros_like(x)
    if order == 1:
        return jnp.sign(x)
    none = (x == 0) | (norm == 0)
    ratio = jnp.where(none, 1, jnp.abs(x)) / jnp.where(none, 1, norm)
    return jnp.where(none, 0, jnp.sign(x) * ratio ** (order - 1))


def taken(x: Array, places: Array, dim: int, keepdim: bool) -> tuple[Array, Array]:
    """Return the numbers at one position of each row along `dim`, and the positions."""
    values = jnp.take_along_axis(x, places, axis=dim)
    return (values, places) if keepdim else (jnp.squeeze(values, dim), jnp.squeeze(places, dim))


def _extreme(arg: Callable[..., Array]) -> OperatorRule:
    """Return the row of an extreme with its position; only that position gets a gradient."""
    return OperatorRule(
        lambda x, dim, keepdim: taken(x, arg(x, axis=dim, keepdims=True), dim, keepdim)
    )


def _sort(x: Array, dim: int, descending: bool) -> tuple[Array, Array]:
    places = sorting.order(x, dim, descending)
    return jnp.take_along_axis(x, places, axis=dim), places


def _stable_sort(
    x: Array, *, stable: bool | None, dim: int = -1, descending: bool = False
) -> tuple[Array, Array]:
    if not stable:
        return _sort(x, dim, descending)
    places = jnp.argsort(x, axis=dim, stable=True, descending=descending)
    return jnp.take_along_axis(x, places, axis=dim), places


def _topk(x: Array, k: int, dim: int, largest: bool, in_order: bool) -> tuple[Array, Array]:
    places = sorting.first(x, k, dim, largest, in_order)
    return jnp.take_along_axis(x, places, axis=dim), places


def _gather(x: Array, dim: int, places: Array, sparse_grad: bool) -> Array:
    inner = [slice(0, n) for n in places.shape]
    inner[dim] = slice(None)
    return jnp.take_along_axis(x[tuple(inner)], places, axis=dim)


def _along(places: Array, dim: int) -> tuple[Array, ...]:
    """Return the indices of the numbers at `places` along an axis."""
    index = list(jnp.meshgrid(*map(jnp.arange, places.shape), indexing="ij"))
    index[dim] = places
    return tuple(index)


def _written(x: Array, index: tuple[Any, ...], source: Any) -> Array:
    """Write numbers into `x`; each gets the gradient of its position, as in PyTorch."""
    value = x.at[index].set(source)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return value
    written = jnp.zeros(x.shape, bool).at[index].set(True)
    linear = jnp.where(written, 0, x).at[index].add(jnp.asarray(source, x.dtype))
    return with_gradient_of(value, linear)


def _scatter(x: Array, dim: int, places: Array, source: Any) -> Array:
    part = source if not getattr(source, "ndim", 0) else source[tuple(map(slice, places.shape))]
    return _written(x, _along(places, dim), part)


def _scatter_add(x: Array, dim: int, places: Array, source: Array) -> Array:
    return x.at[_along(places, dim)].add(source[tuple(map(slice, places.shape))])


def _chosen(x: Array, indices: Sequence[Any]) -> tuple[Any, ...]:
    """Translate PyTorch's indices, some of them lists of known positions, to NumPy's."""
    return tuple(
        slice(None)
        if selector is None
        else np.asarray(selector, int)
        if isinstance(selector, list)
        else selector
        for selector in indices
    )


def _index_put(x: Array, indices: Sequence[Any], values: Array, add: bool) -> Array:
    if any(str(getattr(selector, "dtype", "")) == "bool" for selector in indices):
        (place,) = [i for i, selector in enumerate(indices) if selector is not None]
        mask = indices[place]
        mask = mask.reshape((1,) * place + mask.shape + (1,) * (x.ndim - place - mask.ndim))
        return jnp.where(mask, x + values if add else values, x)
    index = _chosen(x, indices)
    return x.at[index].add(values) if add else _written(x, index, values)


def _put(x: Array, places: Array, source: Array, accumulate: bool = False) -> Array:
    flat, index = x.reshape(-1), (places.reshape(-1),)
    values = source.reshape(-1)
    result = flat.at[index].add(values) if accumulate else _written(flat, index, values)
    return result.reshape(x.shape)


def _share(sizes: Ints, normalization: int) -> float:
    """Return the factor of a Fourier transform: 1, 1 / sqrt(size) or 1 / size."""
    size = float(np.prod(sizes))
    return (1.0, size**-0.5, 1 / size)[normalization]


def _fourier(x: Array, dims: Ints, normalization: int, forward: bool) -> Array:
    out = jnp.fft.fftn(x, axes=dims) if forward else jnp.fft.ifftn(x, axes=dims, norm="forward")
    return out * _share([x.shape[dim] for dim in dims], normalization)


def _fourier_of_reals(x: Array, dims: Ints, normalization: int, half: bool) -> Array:
    spectrum = (jnp.fft.rfftn if half else jnp.fft.fftn)(x, axes=dims)
    return spectrum * _share([x.shape[dim] for dim in dims], normalization)


def _fourier_to_reals(x: Array, dims: Ints, normalization: int, last: int) -> Array:
    sizes = [x.shape[dim] for dim in dims[:-1]] + [last]
    return jnp.fft.irfftn(x, s=sizes, axes=dims, norm="forward") * _share(sizes, normalization)


def _scatter_reduce(
    x: Array, dim: int, places: Array, source: Array, reduce: str, include_self: bool = True
) -> Array:
    """Reduce the numbers of `source` into their positions; `include_self` adds those of `x`."""
    index = _along(places, dim)
    source = source[tuple(map(slice, places.shape))]
    written = jnp.zeros(x.shape, bool).at[index].set(True)
    takes_part = jnp.ones(x.shape, bool) if include_self else ~written
    if reduce == "prod":
        return _products(x, takes_part, index, source)
    if reduce not in ("sum", "mean"):
        return _extremes(x, takes_part, index, source, reduce)
    total = jnp.where(takes_part, x, 0).at[index].add(source)
    if reduce == "sum":
        return total
    count = jnp.maximum(takes_part.astype(int).at[index].add(1), 1).astype(x.dtype)
    return total / count if jnp.issubdtype(x.dtype, jnp.inexact) else total // count


def _products(x: Array, takes_part: Array, index: tuple[Array, ...], source: Array) -> Array:
    """Return products per position; the gradient of each factor is the product of the others."""
    old, new = lax.stop_gradient(x), lax.stop_gradient(source)
    first = jnp.where(takes_part & (old != 0), old, 1)
    others = first.at[index].multiply(jnp.where(new == 0, 1, new))
    zeros = (takes_part & (old == 0)).astype(int).at[index].add((new == 0).astype(int))

    def share(value: Array, product: Array, count: Array) -> Array:
        none = value == 0
        return jnp.where(count - none > 0, 0, product / jnp.where(none, 1, value))

    linear = jnp.where(takes_part, x * share(old, others, zeros), 0)
    linear = linear.at[index].add(source * share(new, others[index], zeros[index]))
    return with_gradient_of(jnp.where(zeros > 0, 0, others), linear)


def _extremes(
    x: Array, takes_part: Array, index: tuple[Array, ...], source: Array, reduce: str
) -> Array:
    """Return extremes per position; equal numbers share the gradient."""
    old, new = lax.stop_gradient(x), lax.stop_gradient(source)
    most = reduce == "amax"
    floating = jnp.issubdtype(x.dtype, jnp.inexact)
    info = jnp.finfo(x.dtype) if floating else jnp.iinfo(x.dtype)
    ends = (-jnp.inf, jnp.inf) if floating else (info.min, info.max)
    end = jnp.asarray(ends[0 if most else 1], x.dtype)
    start = jnp.where(takes_part, old, end).at[index]
    value = start.max(new) if most else start.min(new)
    if not floating:
        return value
    # PyTorch counts the old value of the position even if it is excluded.
    old_wins, new_wins = old == value, new == value[index]
    count = old_wins.astype(x.dtype).at[index].add(new_wins.astype(x.dtype))
    count = jnp.maximum(count, 1)
    linear = jnp.where(takes_part & old_wins, x / count, 0)
    linear = linear.at[index].add(jnp.where(new_wins, source / count[index], 0))
    return with_gradient_of(value, linear)


def _distances(x: Array, y: Array, order: float, mode: int | None = None) -> Array:
    """Compute distances between all pairs of [..., P, M] and [..., R, M], with PyTorch's gradients.

    They are zero for equal vectors; for the maximum norm, all largest differences get one.
    """
    apart = x[..., :, None, :] - y[..., None, :, :]
    size, sign = jnp.abs(lax.stop_gradient(apart)), jnp.sign(lax.stop_gradient(apart))
    if order == 0:
        return (size != 0).sum(-1).astype(apart.dtype)
    if order == jnp.inf:
        value = size.max(-1)
        share = sign * (size == value[..., None])
    elif order == 1:
        value, share = size.sum(-1), sign
    else:
        value = (size**order).sum(-1) ** (1 / order)
        share = _norm_slope(lax.stop_gradient(apart), value[..., None], order)
    return with_gradient_of(value, (share * apart).sum(-1))


def _euclidean(x: Array, y: Array) -> Array:
    """Compute Euclidean distances by a matrix product, as PyTorch does for more than 25 vectors."""
    fixed_x, fixed_y = lax.stop_gradient(x), lax.stop_gradient(y)
    squares = (fixed_x**2).sum(-1)[..., :, None] + (fixed_y**2).sum(-1)[..., None, :]
    value = jnp.sqrt(jnp.maximum(squares - 2 * fixed_x @ fixed_y.mT, 0))
    share = jnp.where(value == 0, 0, 1 / jnp.where(value == 0, 1, value))
    # Of share * |x - y|^2 / 2, with the shares fixed.
    linear = ((x**2).sum(-1)[..., :, None] + (y**2).sum(-1)[..., None, :]) / 2 - x @ y.mT
    return with_gradient_of(value, share * linear)


def _pairs(x: Array, order: float) -> Array:
    rows, columns = jnp.triu_indices(x.shape[0], 1)
    return _distances(x[rows][:, None], x[columns][:, None], order)[:, 0, 0]


def _trilinear(
    x: Array, y: Array, z: Array, new_x: Ints, new_y: Ints, new_z: Ints, summed: Ints, *ignored: int
) -> Array:
    axes = ascii_letters[: x.ndim + len(new_x)]

    def without(gone: Ints) -> str:
        return "".join(letter for place, letter in enumerate(axes) if place not in gone)

    terms = ",".join(map(without, (new_x, new_y, new_z)))
    return jnp.einsum(f"{terms}->{without(summed)}", x, y, z)


TABLE = {
    "aten.sum.dim_IntList": _over(jnp.sum),
    "aten.mean.dim": _over(jnp.mean),
    "aten.mean.default": OperatorRule(
        lambda x, dtype=None: jnp.mean(x if dtype is None else x.astype(dtype))
    ),
    "aten.amax.default": _over(jnp.max),
    "aten.amin.default": _over(jnp.min),
    "aten.var.correction": _over(_variance),
    "aten.std.correction": _over(_deviation),
    "aten.prod.dim_int": OperatorRule(
        lambda x, dim, keepdim, dtype=None: jnp.prod(x, dim, dtype, keepdims=keepdim)
    ),
    "aten.any.dim": OperatorRule(lambda x, dim, keepdim: jnp.any(x, dim, keepdims=keepdim)),
    "aten.any.dims": _over(jnp.any),
    "aten.any.default": OperatorRule(jnp.any),
    "aten.linalg_vector_norm.default": OperatorRule(_norm),
    "aten.cumsum.default": OperatorRule(lambda x, dim, dtype=None: jnp.cumsum(x, dim, dtype)),
    "aten.cumprod.default": OperatorRule(lambda x, dim, dtype=None: jnp.cumprod(x, dim, dtype)),
    "aten.logcumsumexp.default": OperatorRule(lambda x, dim: lax.cumlogsumexp(x, dim % x.ndim)),
    "aten.max.dim": _extreme(jnp.argmax),
    "aten.min.dim": _extreme(jnp.argmin),
    "aten.argmax.default": OperatorRule(
        lambda x, dim, keepdim: jnp.argmax(x, dim, keepdims=keepdim)
    ),
    "aten.argmin.default": OperatorRule(
        lambda x, dim, keepdim: jnp.argmin(x, dim, keepdims=keepdim)
    ),
    "aten._softmax.default": OperatorRule(lambda x, dim, half: jax.nn.softmax(x, axis=dim)),
    "aten._log_softmax.default": OperatorRule(lambda x, dim, half: jax.nn.log_softmax(x, axis=dim)),
    "aten.sort.default": OperatorRule(_sort),
    "aten.sort.stable": OperatorRule(_stable_sort),
    "aten.topk.default": OperatorRule(_topk),
    "aten._fft_c2c.default": OperatorRule(_fourier),
    "aten._fft_r2c.default": OperatorRule(_fourier_of_reals),
    "aten._fft_c2r.default": OperatorRule(_fourier_to_reals),
    "aten.view_as_real.default": OperatorRule(lambda x: jnp.stack([x.real, x.imag], -1)),
    "aten.view_as_complex.default": OperatorRule(lambda x: lax.complex(x[..., 0], x[..., 1])),
    "aten.gather.default": OperatorRule(_gather),
    **{f"aten.scatter.{name}": OperatorRule(_scatter) for name in ("src", "value")},
    "aten.scatter_add.default": OperatorRule(_scatter_add),
    "aten.index.Tensor": OperatorRule(lambda x, indices: x[_chosen(x, indices)]),
    "aten.index_put.default": OperatorRule(_index_put),
    "aten.put.default": OperatorRule(_put),
    "aten.index_select.default": OperatorRule(lambda x, dim, places: jnp.take(x, places, axis=dim)),
    "aten.embedding.default": OperatorRule(lambda table, places, *ignored: table[places]),
    "aten.scatter_reduce.two": OperatorRule(_scatter_reduce),
    "aten._cdist_forward.default": OperatorRule(_distances),
    "aten._euclidean_dist.default": OperatorRule(_euclidean),
    "aten._pdist_forward.default": OperatorRule(_pairs),
    "aten._trilinear.default": OperatorRule(_trilinear),
}
