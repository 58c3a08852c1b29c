"""Pooling, built like `layers`."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.models.kernels.primitives import per_platform, widened

Array = jax.Array


def _pool_lines(x: Array, axis: int) -> list[Array]:
    """Return the first, second and third entries of the windows along `axis`."""
    stop = (x.shape[axis] - 3) // 2 * 2 + 1
    return [lax.slice_in_dim(x, i, i + stop, 2, axis) for i in range(3)]


def _pool_axis(x: Array, axis: int) -> Array:
    return functools.reduce(jnp.maximum, _pool_lines(x, axis))


def _pool_axis_gradient(x: Array, g: Array, axis: int) -> Array:
    first, second, third = _pool_lines(x, axis)
    in_first = (first >= second) & (first >= third)
    in_second = ~in_first & (second >= third)
    zero = jnp.zeros((), g.dtype)

    def padded(g, low, high):
        return lax.pad(g, zero, [(low, high, 0) if i == axis else (0, 0, 0) for i in range(4)])

    even = padded(jnp.where(in_first, g, zero), 0, 1)
    even = even + padded(jnp.where(in_first | in_second, zero, g), 1, 0)
    odd = padded(jnp.where(in_second, g, zero), 0, 1)
    both = jnp.stack([even, odd], axis + 1)
    both = both.reshape(*g.shape[:axis], -1, *g.shape[axis + 1 :])
    missing = x.shape[axis] - both.shape[axis]
    return padded(both, 0, missing)


def _pool_padded(x: Array, padding: int) -> Array:
    sides = (padding, padding, 0)
    return lax.pad(x, jnp.array(-jnp.inf, x.dtype), [(0, 0, 0), sides, sides, (0, 0, 0)])


@per_platform
def _pool_rows(x: Array, *, padding: int) -> Array:
    return _pool_axis(_pool_padded(x, padding), 2)


@per_platform
def _pool_columns(x: Array) -> Array:
    return _pool_axis(x, 1)


@per_platform
def _pool_columns_gradient(x: Array, g: Array) -> Array:
    return _pool_axis_gradient(x, g, 1)


@per_platform
def _pool_rows_gradient(x: Array, g: Array, *, padding: int) -> Array:
    height, width = (slice(padding, padding + side) for side in x.shape[1:3])
    return _pool_axis_gradient(_pool_padded(x, padding), g, 2)[:, height, width]


def _pool_backward(padding, x, g):
    # The first maximum in row-major order is the first one in the first row that contains it.
    to_rows = _pool_columns_gradient(_pool_rows(x, padding=padding), g)
    return (_pool_rows_gradient(x, to_rows, padding=padding),)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(x: Array, padding: int = 1) -> Array:
    """Return the maximum of every 3x3 window of f[B,H,W,C], stride 2, padding 0 or 1.

    Among equal values the first one in row-major order gets the gradient, as in torch.
    """
    return _pool_columns(_pool_rows(x, padding=padding))


max_pool.defvjp(lambda x, padding: (max_pool(x, padding), x), _pool_backward)


def _pairs(x: Array, axis: int) -> tuple[Array, Array]:
    """Return the first and second entries of pairs along `axis`; an odd last one is dropped."""
    stop = x.shape[axis] // 2 * 2
    first, second = (lax.slice_in_dim(x, i, stop, 2, axis) for i in range(2))
    return first, second


def _takes_second(first: Array, second: Array) -> Array:
    return (second > first) | (second != second)  # NaN is the largest, as in torch


def _larger(x: Array, axis: int) -> Array:
    first, second = _pairs(x, axis)
    return jnp.where(_takes_second(first, second), second, first)


def _larger_gradient(x: Array, g: Array, axis: int) -> Array:
    takes, zero = _takes_second(*_pairs(x, axis)), jnp.zeros((), g.dtype)
    both = jnp.stack([jnp.where(takes, zero, g), jnp.where(takes, g, zero)], axis + 1)
    both = both.reshape(*g.shape[:axis], -1, *g.shape[axis + 1 :])
    missing = x.shape[axis] - both.shape[axis]
    return lax.pad(both, zero, [(0, missing if i == axis else 0, 0) for i in range(4)])


@per_platform
def _halved(x: Array) -> Array:
    return _larger(_larger(x, 2), 1)


@per_platform
def _halved_gradient(x: Array, g: Array) -> Array:
    # The first maximum in row-major order is the first one in the first row that contains it.
    return _larger_gradient(x, _larger_gradient(_larger(x, 2), g, 1), 2)


@jax.custom_vjp
def max_pool_2x2(x: Array) -> Array:
    """Return the maximum of every 2x2 window of f[B,H,W,C], stride 2, dropping an odd last line.


    Among equal values the first one in row-major order gets the gradient, as in torch.
    """
    return _halved(x)


max_pool_2x2.defvjp(lambda x: (_halved(x), x), lambda x, g: (_halved_gradient(x, g),))


@per_platform
def _quartered(x: Array) -> Array:
    for axis in (2, 1):
        first, second = _pairs(x, axis)
        x = first + second
    return x / 4


def avg_pool_2x2(x: Array) -> Array:
    """Average every 2x2 window of f[B,H,W,C], stride 2, dropping an odd last row or column."""
    return _quartered(x)


@per_platform
def _sums(x: Array, *, stride: int) -> Array:
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for axis, size in ((1, height), (2, width)):
        lines = [lax.slice_in_dim(x, i, i + size, stride, axis) for i in range(3)]
        x = lines[0] + lines[1] + lines[2]
    return x


def avg_pool(x: Array, *, stride: int, count_padding: bool) -> Array:
    """Return the mean of every 3x3 window of f[B,H,W,C], padding 1.

    `count_padding`: divide by 9 at the border too, counting zeros; else by the number of pixels in
    the window.
    """
    sums = _sums(x, stride=stride)
    if count_padding:
        return sums / 9
    return sums / _sums(jnp.ones((1, *x.shape[1:3], 1), x.dtype), stride=stride)


Windows = list[tuple[int, int]]


def _adaptive_windows(size: int, count: int) -> Windows:
    """List the starts and stops of PyTorch's `count` windows along an axis: they overlap by a pixel
    if `count` does not divide `size`, and repeat pixels if it is larger.
    """
    return [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def _readers(size: int, windows: Windows) -> Windows:
    """Return the windows that read each of `size` pixels: the first, and the one after the last."""
    return [
        (sum(stop <= i for _, stop in windows), sum(start <= i for start, _ in windows))
        for i in range(size)
    ]


def _window_sums(x: Array, axis: int, windows: Windows) -> Array:
    lines = [lax.slice_in_dim(x, i, i + 1, 1, axis) for i in range(x.shape[axis])]
    return jnp.concatenate([functools.reduce(jnp.add, lines[i:j]) for i, j in windows], axis)


def _window_sizes(axis: int, windows: Windows, dtype: jnp.dtype) -> Array:
    shape = [-1 if i == axis else 1 for i in range(4)]
    return jnp.array([stop - start for start, stop in windows], dtype).reshape(shape)


@per_platform
def _adaptive(x: Array, *, count: int) -> Array:
    (wide,) = widened(x)
    for axis in (1, 2):
        windows = _adaptive_windows(x.shape[axis], count)
        sizes = _window_sizes(axis, windows, wide.dtype)
        wide = _window_sums(wide, axis, windows) / sizes
    return wide.astype(x.dtype)


@per_platform
def _adaptive_gradient(g: Array, *, sizes: tuple[int, int]) -> Array:
    (wide,) = widened(g)
    for axis, size in enumerate(sizes, 1):
        windows = _adaptive_windows(size, g.shape[axis])
        wide = wide / _window_sizes(axis, windows, wide.dtype)
        wide = _window_sums(wide, axis, _readers(size, windows))
    return wide.astype(g.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _adaptive_pool(x: Array, count: int, sizes: tuple[int, int]) -> Array:
    del sizes
    return _adaptive(x, count=count)


_adaptive_pool.defvjp(
    lambda x, count, sizes: (_adaptive(x, count=count), None),
    lambda count, sizes, _, g: (_adaptive_gradient(g, sizes=sizes),),
)


def adaptive_avg_pool(x: Array, count: int) -> Array:
    """Average f[B,H,W,C] over `count` x `count` windows, divided as in PyTorch."""
    return _adaptive_pool(x, count, (x.shape[1], x.shape[2]))
