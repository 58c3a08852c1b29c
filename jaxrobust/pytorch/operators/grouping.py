"""Operators of pairs and groups: reductions into places, distances, forms of two vectors."""

from string import ascii_letters

import jax.numpy as jnp
from jax import lax

from jaxrobust.pytorch.operators.gradients import with_gradient_of
from jaxrobust.pytorch.operators.reductions import along, norm_slope
from jaxrobust.pytorch.program import Ints, OperatorRule
from jaxrobust.types import Array


def _scatter_reduce(
    x: Array, dim: int, places: Array, source: Array, reduce: str, include_self: bool = True
) -> Array:
    """Join the numbers of `source` into their places; without `include_self`, of nothing else."""
    index = along(places, dim)
    source = source[tuple(map(slice, places.shape))]
    named = jnp.zeros(x.shape, bool).at[index].set(True)
    own = jnp.ones(x.shape, bool) if include_self else ~named
    if reduce in ("sum", "mean"):
        total = jnp.where(own, x, 0).at[index].add(source)
        if reduce == "sum":
            return total
        count = jnp.maximum(own.astype(int).at[index].add(1), 1)
        floating = jnp.issubdtype(x.dtype, jnp.inexact)
        return total / count.astype(x.dtype) if floating else total // count.astype(x.dtype)
    if reduce == "prod":
        return _products(x, own, index, source)
    return _extremes(x, own, index, source, reduce)


def _products(x: Array, own: Array, index: tuple[Array, ...], source: Array) -> Array:
    """Return products in places; the gradient of each factor is the product of the others."""
    held, given = lax.stop_gradient(x), lax.stop_gradient(source)
    first = jnp.where(own & (held != 0), held, 1)
    others = first.at[index].multiply(jnp.where(given == 0, 1, given))
    zeros = (own & (held == 0)).astype(int).at[index].add((given == 0).astype(int))

    def share(value: Array, product: Array, count: Array) -> Array:
        none = value == 0
        return jnp.where(count - none > 0, 0, product / jnp.where(none, 1, value))

    linear = jnp.where(own, x * share(held, others, zeros), 0)
    linear = linear.at[index].add(source * share(given, others[index], zeros[index]))
    return with_gradient_of(jnp.where(zeros > 0, 0, others), linear)


def _extremes(x: Array, own: Array, index: tuple[Array, ...], source: Array, reduce: str) -> Array:
    """Return extremes in places, of which equal ones share the gradient."""
    held, given = lax.stop_gradient(x), lax.stop_gradient(source)
    most = reduce == "amax"
    floating = jnp.issubdtype(x.dtype, jnp.inexact)
    info = jnp.finfo(x.dtype) if floating else jnp.iinfo(x.dtype)
    ends = (-jnp.inf, jnp.inf) if floating else (info.min, info.max)
    start = jnp.where(own, held, jnp.asarray(ends[0 if most else 1], x.dtype)).at[index]
    value = start.max(given) if most else start.min(given)
    if not floating:
        return value
    # PyTorch counts what lies in the place also where it takes no part.
    mine, theirs = held == value, given == value[index]
    count = mine.astype(x.dtype).at[index].add(theirs.astype(x.dtype))
    each = jnp.maximum(count, 1)
    linear = jnp.where(own & mine, x / each, 0)
    return with_gradient_of(value, linear.at[index].add(jnp.where(theirs, source / each[index], 0)))


def _distances(x: Array, y: Array, order: float, mode: int | None = None) -> Array:
    """Compute distances of [..., P, M] and [..., R, M], each with each; gradients are PyTorch's:

    zero where two are equal, and for the largest difference that of all that are largest.
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
        share = norm_slope(lax.stop_gradient(apart), value[..., None], order)
    return with_gradient_of(value, (share * apart).sum(-1))


def _euclidean(x: Array, y: Array) -> Array:
    """Return the same for order 2 by a product of matrices, as PyTorch does of more than 25."""
    held, other = lax.stop_gradient(x), lax.stop_gradient(y)
    squares = (held**2).sum(-1)[..., :, None] + (other**2).sum(-1)[..., None, :]
    value = jnp.sqrt(jnp.maximum(squares - 2 * held @ other.mT, 0))
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
    "aten.scatter_reduce.two": OperatorRule(_scatter_reduce),
    "aten._cdist_forward.default": OperatorRule(_distances),
    "aten._euclidean_dist.default": OperatorRule(_euclidean),
    "aten._pdist_forward.default": OperatorRule(_pairs),
    "aten._trilinear.default": OperatorRule(_trilinear),
}
