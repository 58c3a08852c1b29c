"""Pooling and resizing of images, whose channels lie last."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrobust.interop.program import Last, Row
from jaxrobust.types import Array


class _Windows:
    """Where the windows of a pooling lie."""

    def __init__(
        self,
        x: Array,
        size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool,
    ):
        sides = x.ndim - 2
        each = lambda value: tuple(value) * (sides if len(value) == 1 else 1)  # noqa: E731
        self.size, self.padding, self.dilation = each(size), each(padding), each(dilation)
        self.stride = each(stride) if stride else self.size
        self.sides = x.shape[1:-1]
        self.counts = [self._count(axis, ceil_mode) for axis in range(sides)]
        self.around = [
            (p, max(0, (n - 1) * s + d * (w - 1) + 1 - side - p))
            for side, w, s, p, d, n in zip(
                self.sides,
                self.size,
                self.stride,
                self.padding,
                self.dilation,
                self.counts,
                strict=True,
            )
        ]

    def _count(self, axis: int, ceil_mode: bool) -> int:
        """Return how many windows there are; one must begin inside or in the padding before."""
        side, pad, stride = self.sides[axis], self.padding[axis], self.stride[axis]
        rest = side + 2 * pad - self.dilation[axis] * (self.size[axis] - 1) - 1
        count = (-(-rest // stride) if ceil_mode else rest // stride) + 1
        return count - 1 if ceil_mode and (count - 1) * stride >= side + pad else count

    def counted(self, with_padding: bool) -> list[np.ndarray]:
        """Return how many pixels the windows of each axis have, those of the padding or not."""
        found = []
        for axis, side in enumerate(self.sides):
            pad = self.padding[axis]
            first = np.arange(self.counts[axis]) * self.stride[axis] - pad
            beyond = np.minimum(first + self.size[axis], side + (pad if with_padding else 0))
            found.append(beyond - (first if with_padding else np.maximum(first, 0)))
        return found

    def reduce(self, x: Array, start: float, operation: Callable[..., Array]) -> Array:
        """Return `operation` over every window; what the last ones do not need is cut off."""
        cut = tuple(
            slice(0, (n - 1) * s + d * (w - 1) + 1 - p)
            for n, s, d, w, p in zip(
                self.counts, self.stride, self.dilation, self.size, self.padding, strict=True
            )
        )
        return lax.reduce_window(
            x[(slice(None), *cut)],
            np.asarray(start, x.dtype),
            operation,
            (1, *self.size, 1),
            (1, *self.stride, 1),
            ((0, 0), *self.around, (0, 0)),
            window_dilation=(1, *self.dilation, 1),
        )


def _max_pool(
    x: Array,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Last, None]:
    windows = _Windows(x, size, stride, padding, dilation, ceil_mode)
    return Last(windows.reduce(x, -np.inf, lax.max)), None


def _average_pool(
    x: Array,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None = None,
) -> Last:
    windows = _Windows(x, size, stride, padding, (1,), ceil_mode)
    sums = windows.reduce(x, 0.0, lax.add)
    if divisor:
        return Last(sums / divisor)
    counts = functools.reduce(np.multiply.outer, windows.counted(count_include_pad))
    return Last(sums / jnp.asarray(counts[..., None], x.dtype))


def _bins(side: int, count: int) -> list[slice]:
    """Return the parts of a side that an adaptive pooling joins; they may overlap."""
    return [slice(i * side // count, -(-(i + 1) * side // count)) for i in range(count)]


def _adaptive(x: Array, counts: Sequence[int], reduce: Callable[..., Array]) -> Array:
    """Return `reduce` over the parts of each side in turn."""
    for axis, count in enumerate(counts, 1):
        side = x.shape[axis]
        if side % count == 0:
            parts = x.reshape(*x.shape[:axis], count, side // count, *x.shape[axis + 1 :])
            x = reduce(parts, axis + 1)
        else:
            whole = [lax.slice_in_dim(x, b.start, b.stop, axis=axis) for b in _bins(side, count)]
            x = jnp.stack([reduce(part, axis) for part in whole], axis)
    return x


def _adaptive_average(x: Array, counts: Sequence[int]) -> Last:
    return Last(_adaptive(x, counts, jnp.mean))


def _adaptive_max(x: Array, counts: Sequence[int]) -> tuple[Last, None]:
    return Last(_adaptive(x, counts, jnp.max)), None


def _ratios(x: Array, sizes: Sequence[int] | None, factors: Sequence[float] | None) -> list[Any]:
    """Return (from, to, step) of each side: how far apart neighbours lie in the old one."""
    olds = x.shape[1:-1]
    if sizes is None:
        assert factors is not None
        return [(o, int(np.floor(o * f)), 1 / f) for o, f in zip(olds, factors, strict=True)]
    return [(o, n, o / n) for o, n in zip(olds, sizes, strict=True)]


def _nearest(x: Array, sizes: Sequence[int] | None, factors: Sequence[float] | None) -> Last:
    for axis, (old, new, step) in enumerate(_ratios(x, sizes, factors), 1):
        places = np.floor(np.arange(new) * np.float32(step)).astype(int)
        x = jnp.take(x, np.minimum(places, old - 1), axis=axis)
    return Last(x)


def _linear(
    x: Array, sizes: Sequence[int] | None, align: bool, factors: Sequence[float] | None
) -> Last:
    """Return images resized by linear interpolation, one side after the other."""
    for axis, (old, new, step) in enumerate(_ratios(x, sizes, factors), 1):
        at = np.arange(new) * ((old - 1) / max(new - 1, 1) if align else step)
        at = np.maximum(at if align else at + 0.5 * step - 0.5, 0)
        low = np.minimum(np.floor(at).astype(int), old - 1)
        share = (at - low).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
        below, above = (jnp.take(x, i, axis=axis) for i in (low, np.minimum(low + 1, old - 1)))
        x = below + (above - below) * jnp.asarray(share, x.dtype)
    return Last(x)


TABLE = {
    "aten.max_pool2d_with_indices.default": Row(None, _max_pool),
    "aten.max_pool3d_with_indices.default": Row(None, _max_pool),
    "aten.avg_pool2d.default": Row(None, _average_pool),
    "aten.avg_pool3d.default": Row(None, _average_pool),
    "aten._adaptive_avg_pool2d.default": Row(None, _adaptive_average),
    "aten._adaptive_avg_pool3d.default": Row(None, _adaptive_average),
    "aten.adaptive_max_pool2d.default": Row(None, _adaptive_max),
    "aten.upsample_nearest2d.vec": Row(None, _nearest),
    "aten.upsample_bilinear2d.vec": Row(None, _linear),
}
