"""DCNv3's sampling: of each pixel a weighted sum of values at nine places next to the grid.

Source: Wang et al. 2022 (arXiv 2211.05778), section 3.1, and the authors' pure-PyTorch operator in
OpenGVLab/InternImage. Parity: tests/models/kernels/test_deformable.py.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.models.kernels.deformable import corners, planes, products
from jaxrobust.models.kernels.deformable.bounded import Bounded
from jaxrobust.models.kernels.deformable.places import (
    POINTS,
    SIDE,
    GridGeometry,
    points_of,
    reached,
)

Array = jax.Array

# name -> what has `forward` and `backward`. Gathers take any geometry; the two others, which have
# none but for what their windows do not reach, take that of the network.
IMPLEMENTATIONS: dict[str, Any] = {
    "gathers": corners,
    "planes": Bounded(planes),
    "products": Bounded(products),
}
_ON = {"cpu": "planes", "tpu": "products", "default": "gathers"}


class _Static(NamedTuple):
    """The constants of a call."""

    geometry: GridGeometry
    implementation: str | None


@functools.partial(jax.jit, static_argnames=("static", "part"))
def _rule(static: _Static, part: str, *operands: Any) -> Any:
    """Traced once for all layers of one size: a trace of all platforms' rules takes 0.2 s."""
    names = {p: static.implementation or name for p, name in _ON.items()}
    if not static.geometry.is_plain:
        names = dict.fromkeys(_ON, "gathers")
    rules = {
        platform: functools.partial(getattr(IMPLEMENTATIONS[name], part), static.geometry)
        for platform, name in names.items()
    }
    return lax.platform_dependent(*operands, **rules)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _deformable(static: _Static, value: Array, offsets: Array, mask: Array) -> Array:
    return _rule(static, "forward", value, offsets, mask).astype(value.dtype)


def _backward(static, operands, g):
    # Nothing is kept but the operands: weights are computed again, as are samples. And inside of
    # the rule, as differentiating through a choice of platform would keep what every branch keeps.
    gradients = _rule(static, "backward", *operands, g)
    return tuple(d.astype(o.dtype) for d, o in zip(gradients, operands, strict=True))


_deformable.defvjp(lambda static, *o: (_deformable(static, *o), o), _backward)


def deformable(
    value: Array,
    offsets: Array,
    mask: Array,
    *,
    groups: int,
    offset_scale: float = 1.0,
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    implementation: str | None = None,
) -> Array:
    """Sum values at nine places of each pixel, in each group of channels: f[B,H',W',C].

    Point p = 3 kx + ky of a group samples its channels bilinearly at row i + s (ky - 1 + oy) and
    column j + s (kx - 1 + ox), with s = `offset_scale`; what lies outside of the map is zero.
    Places and weights are float32 also where values are bfloat16. Where a place is a whole number,
    at which there is no derivative, gradients for offsets are those to its right and below, as the
    reference's. Never more than one sampled map is held.

    Args:
      value: f[B,H,W,C]; C / `groups` neighbouring channels are a group.
      offsets: f[B,H',W',groups*9*2], for each point the column's offset, then the row's, in pixels.
      mask: f[B,H',W',groups*9], the points' weights, of which a softmax is taken already.
      stride, padding, dilation: of the grid of nine, in pixels; others than 1, 1, 1 use gathers.
      implementation: a name in `IMPLEMENTATIONS`; None chooses by platform.
    Raises:
      ValueError: channels that groups do not divide, a map smaller than the grid, shapes or types
        that do not belong together, or, of arrays outside of a trace, offsets that are not finite.
    Source: Wang et al. 2022 (arXiv 2211.05778), equation 2; parity:
      tests/models/kernels/test_deformable.py against the authors' code (31c962d).
    """
    geometry = GridGeometry(value.shape[1:3], groups, offset_scale, stride, padding, dilation)
    _check(value, offsets, mask, geometry)
    return _deformable(_Static(geometry, implementation), value, offsets, mask)


def outside(offsets: Array, *, offset_scale: float = 1.0) -> Array:
    """Count the points that lie beyond the window, which takes offsets in [-2, 2) pixels: i32[].

    They are sampled by gathers, one by one; `offsets` and its scale are those of `deformable`, on
    the grid without stride and dilation.
    """
    groups = offsets.shape[3] // (2 * POINTS)
    points = points_of(offsets, offsets[..., : groups * POINTS], groups=groups)
    around = GridGeometry(offsets.shape[1:3], groups, offset_scale).from_grid(points)
    return (~reached(around.y, around.x)).sum()


def _check(value: Array, offsets: Array, mask: Array, geometry: GridGeometry) -> None:
    (_, height, width, channels), groups = value.shape, geometry.groups
    if groups < 1 or channels % groups:
        raise ValueError(
            f"{channels} channels are not {groups} groups of equal size; choose groups that divide "
            "the channels"
        )
    if min(geometry.out) < 1:
        raise ValueError(
            f"a map of {height}x{width} with padding={geometry.padding} is smaller than the grid "
            f"of {SIDE}x{SIDE} points with dilation={geometry.dilation}; use a larger image, or "
            "more padding"
        )
    wanted = {"offsets": (offsets, 2 * POINTS), "mask": (mask, POINTS)}
    for name, (array, numbers) in wanted.items():
        shape = (value.shape[0], *geometry.out, groups * numbers)
        if array.shape != shape:
            raise ValueError(f"{name} of shape {array.shape} must be {shape} for {groups} groups")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} are {array.dtype}; give floats, offsets in pixels")
    if not isinstance(offsets, jax.core.Tracer) and not jnp.isfinite(offsets).all():
        raise ValueError(
            "offsets hold NaN or infinity, which are not places; look for the first layer whose "
            "output is not finite"
        )
