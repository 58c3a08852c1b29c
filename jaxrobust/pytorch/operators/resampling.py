"""Pooling and resizing of channels-last images."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrobust.pytorch.program import ChannelsLast, Ints, OperatorRule
from jaxrobust.types import Array


class _Axis(NamedTuple):
    """The windows along one side of an image."""

    place: int  # of the axis
    side: int
    size: int
    stride: int
    padding: int
    dilation: int
    windows: int

    def parts(self, x: Array, fill: float) -> list[Array]:
        """Return the first number of every window, then the second, and so on."""
        last = (self.windows - 1) * self.stride + 1
        needed = last + self.dilation * (self.size - 1) - self.padding
        around = [(0, 0, 0)] * x.ndim
        around[self.place] = (self.padding, needed - self.side, 0)  # cropped if negative
        x = lax.pad(x, jnp.asarray(fill, x.dtype), around)
        starts = [offset * self.dilation for offset in range(self.size)]
        return [lax.slice_in_dim(x, s, s + last, self.stride, self.place) for s in starts]

    def counted(self, with_padding: bool) -> np.ndarray:
        """Count the numbers of every window, with or without padding."""
        first = np.arange(self.windows) * self.stride - self.padding
        beyond = np.minimum(first + self.size, self.side + self.padding * with_padding)
        return beyond - (first if with_padding else np.maximum(first, 0))


def _axes(
    x: Array, size: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool
) -> list[_Axis]:
    sides = x.shape[1:-1]
    every = [tuple(v) * (len(sides) if len(v) == 1 else 1) for v in (size, padding, dilation)]
    steps = tuple(stride) * (len(sides) if len(stride) == 1 else 1) or every[0]
    axes = []
    for place, (side, w, s, p, d) in enumerate(
        zip(sides, every[0], steps, every[1], every[2], strict=True), 1
    ):
        span = side + 2 * p - d * (w - 1) - 1
        count = (-(-span // s) if ceil_mode else span // s) + 1
        # The last window must begin inside the image or in the left padding.
        beyond = ceil_mode and (count - 1) * s >= side + p
        axes.append(_Axis(place, side, w, s, p, d, count - beyond))
    return axes


def _wins(y: Array, x: Array) -> Array:
    return (y > x) | jnp.isnan(y)  # the first of equal numbers gets the gradient, as in PyTorch


def _first_largest(x: Array, y: Array) -> Array:
    return jnp.where(_wins(y, x), y, x)


class _Largest(Sequence[Any]):
    """Result of a max pooling: values and their positions, computed on demand."""

    def __init__(self, values: Array, places: Callable[[], Array]) -> None:
        self._values, self._places = values, places

    def __len__(self) -> int:
        return 2

    def __getitem__(self, place: Any) -> Any:
        if place not in (0, 1):
            raise IndexError(place)
        return ChannelsLast(self._places() if place else self._values)


def _numbered(x: Array) -> Array:
    sides = x.shape[1:-1]
    return jnp.broadcast_to(jnp.arange(np.prod(sides)).reshape(1, *sides, 1), x.shape)


def _larger_pair(x: tuple[Array, Array], y: tuple[Array, Array]) -> tuple[Array, Array]:
    wins = _wins(y[0], x[0])
    return jnp.where(wins, y[0], x[0]), jnp.where(wins, y[1], x[1])


def _max_pool(x: Array, *options: Any) -> _Largest:  # as of `_axes`
    axes = _axes(x, *options)[::-1]

    def places() -> Array:
        pair = lax.stop_gradient(x), _numbered(x)
        for axis in axes:
            both = zip(axis.parts(pair[0], -np.inf), axis.parts(pair[1], 0), strict=True)
            pair = functools.reduce(_larger_pair, both)
        return pair[1]

    values = x
    for axis in axes:
        values = functools.reduce(_first_largest, axis.parts(values, -np.inf))
    return _Largest(values, places)


def _average_pool(
    x: Array,
    size: Ints,
    stride: Ints,
    padding: Ints,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None = None,
) -> ChannelsLast:
    axes = _axes(x, size, stride, padding, (1,), ceil_mode)
    for axis in axes:
        x = functools.reduce(jnp.add, axis.parts(x, 0.0))
    counts = [axis.counted(count_include_pad) for axis in axes]
    divisors = divisor or functools.reduce(np.multiply.outer, counts)[..., None]
    return ChannelsLast(x / jnp.asarray(divisors, x.dtype))


def _bins(side: int, count: int) -> list[slice]:
    return [slice(i * side // count, -(-(i + 1) * side // count)) for i in range(count)]


def _adaptive(x: Array, counts: Ints, reduce: Callable[..., Array]) -> Array:
    for axis, count in reversed(list(enumerate(counts, 1))):
        side = x.shape[axis]
        if side % count == 0:
            parts = x.reshape(*x.shape[:axis], count, side // count, *x.shape[axis + 1 :])
            x = reduce(parts, axis + 1)
        else:
            bins = [lax.slice_in_dim(x, b.start, b.stop, axis=axis) for b in _bins(side, count)]
            x = jnp.stack([reduce(part, axis) for part in bins], axis)
    return x


def _adaptive_max(x: Array, counts: Ints) -> _Largest:
    def largest(x: Array, axis: int) -> Array:
        at = jnp.expand_dims(jnp.argmax(x, axis), axis)
        return jnp.squeeze(jnp.take_along_axis(x, at, axis), axis)

    def places() -> Array:
        values, numbers = lax.stop_gradient(x), _numbered(x)
        for axis, count in reversed(list(enumerate(counts, 1))):
            parts = [
                [lax.slice_in_dim(a, b.start, b.stop, axis=axis) for a in (values, numbers)]
                for b in _bins(values.shape[axis], count)
            ]
            at = [jnp.expand_dims(jnp.argmax(part[0], axis), axis) for part in parts]
            pairs = zip(parts, at, strict=True)
            best = [[jnp.take_along_axis(a, p, axis) for a in part] for part, p in pairs]
            values, numbers = (jnp.concatenate(of, axis) for of in zip(*best, strict=True))
        return numbers

    return _Largest(_adaptive(x, counts, largest), places)


def _ratios(x: Array, sizes: Ints | None, factors: Sequence[float] | None) -> list[Any]:
    """Return (from, to, step) of each side; step is the distance of neighbors in the old image."""
    olds = x.shape[1:-1]
    if sizes is None:
        assert factors is not None
        return [(o, int(np.floor(o * f)), 1 / f) for o, f in zip(olds, factors, strict=True)]
    return [(o, n, o / n) for o, n in zip(olds, sizes, strict=True)]


def _nearest(x: Array, sizes: Ints | None, factors: Sequence[float] | None) -> ChannelsLast:
    for axis, (old, new, step) in enumerate(_ratios(x, sizes, factors), 1):
        places = np.floor(np.arange(new) * np.float32(step)).astype(int)
        x = jnp.take(x, np.minimum(places, old - 1), axis=axis)
    return ChannelsLast(x)


def _linear(
    x: Array, sizes: Ints | None, align: bool, factors: Sequence[float] | None
) -> ChannelsLast:
    for axis, (old, new, step) in enumerate(_ratios(x, sizes, factors), 1):
        at = np.arange(new) * ((old - 1) / max(new - 1, 1) if align else step)
        at = np.maximum(at if align else at + 0.5 * step - 0.5, 0)
        low = np.minimum(np.floor(at).astype(int), old - 1)
        share = (at - low).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
        below, above = (jnp.take(x, i, axis=axis) for i in (low, np.minimum(low + 1, old - 1)))
        x = below + (above - below) * jnp.asarray(share, x.dtype)
    return ChannelsLast(x)


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Return Keys' kernel with a = -0.5, which PyTorch uses for antialiasing."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _smoothed(
    kernel: Callable[[np.ndarray], np.ndarray], reach: int
) -> Callable[..., ChannelsLast]:
    """Return an antialiased resizing: the kernel, of this reach, widens when shrinking."""

    def resize(x: Array, sizes: Ints, align: bool, *factors: float | None) -> ChannelsLast:
        for axis, (old, new) in enumerate(zip(x.shape[1:-1], sizes, strict=True), 1):
            factor = factors[axis - 1] if len(factors) >= axis else None
            step = (old - 1) / max(new - 1, 1) if align else 1 / factor if factor else old / new
            wide = max(step, 1.0)
            centres = step * (np.arange(new) + 0.5)
            low = np.maximum((centres - reach * wide + 0.5).astype(int), 0)
            high = np.minimum((centres + reach * wide + 0.5).astype(int), old)
            at = np.arange(old)
            weights = kernel((at - centres[:, None] + 0.5) / wide)
            weights = weights * ((at >= low[:, None]) & (at < high[:, None]))
            shares = jnp.asarray(weights / weights.sum(1, keepdims=True), x.dtype)
            x = jnp.moveaxis(jnp.tensordot(shares, x, (1, axis)), 0, axis)
        return ChannelsLast(x)

    return resize


TABLE = {
    "aten.max_pool2d_with_indices.default": OperatorRule(None, _max_pool),
    "aten.max_pool3d_with_indices.default": OperatorRule(None, _max_pool),
    "aten.avg_pool2d.default": OperatorRule(None, _average_pool),
    "aten.avg_pool3d.default": OperatorRule(None, _average_pool),
    **dict.fromkeys(
        ("aten._adaptive_avg_pool2d.default", "aten._adaptive_avg_pool3d.default"),
        OperatorRule(None, lambda x, counts: ChannelsLast(_adaptive(x, counts, jnp.mean))),
    ),
    "aten.adaptive_max_pool2d.default": OperatorRule(None, _adaptive_max),
    "aten.adaptive_max_pool3d.default": OperatorRule(None, _adaptive_max),
    "aten._upsample_bilinear2d_aa.default": OperatorRule(None, _smoothed(_triangle, 1)),
    "aten._upsample_bicubic2d_aa.default": OperatorRule(None, _smoothed(_cubic, 2)),
    "aten.upsample_nearest2d.vec": OperatorRule(None, _nearest),
    "aten.upsample_bilinear2d.vec": OperatorRule(None, _linear),
}
