"""DCNv3's sampling: a weighted sum of values at nine places around each pixel's grid.

Source: Wang et al. 2022 (arXiv 2211.05778), section 3.1, and the authors' pure-PyTorch operator in
OpenGVLab/InternImage. Parity: tests/models/kernels/test_deformable.py.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.models.kernels import tpu
from jaxrobust.models.kernels.deformable import bounded, corners
from jaxrobust.models.kernels.deformable.places import (
    POINTS,
    SIDE,
    GridGeometry,
    points_of,
    reached,
)
from jaxrobust.models.kernels.primitives import device_kind

Array = jax.Array

# Modules with `forward` and `backward`. Gathers accept any grid, the kernel InternImage's.
IMPLEMENTATIONS: dict[str, Any] = {"gathers": corners, "kernel": bounded}
_ON = {"tpu": "kernel", "default": "gathers"}


class _Static(NamedTuple):
    """The constants of a call."""

    geometry: GridGeometry
    implementation: str | None


@functools.partial(jax.jit, static_argnames=("static", "part"))
def _rule(static: _Static, part: str, *operands: Any) -> Any:
    """Trace once for all layers of one size: tracing the rules of all platforms takes 0.2 s."""
    names = {p: static.implementation or name for p, name in _ON.items()}
    if not (device_kind().startswith("TPU") or tpu.interpreted.value):
        del names["tpu"]  # tracing the kernels takes 4 s for four sizes
    if not static.geometry.is_plain:
        names = dict.fromkeys(_ON, "gathers")

    def rule(*operands: Array, name: str) -> Any:
        outs = getattr(IMPLEMENTATIONS[name], part)(static.geometry, *operands)
        alike = operands[0] if part == "forward" else operands[:3]
        return jax.tree.map(lambda out, operand: out.astype(operand.dtype), outs, alike)

    rules = {platform: functools.partial(rule, name=name) for platform, name in names.items()}
    return lax.platform_dependent(*operands, **rules)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _deformable(static: _Static, value: Array, offsets: Array, mask: Array) -> Array:
    return _rule(static, "forward", value, offsets, mask)


def _backward(static, operands, g):
    # Only the operands are kept; weights and samples are recomputed. The choice of platform is
    # inside the rule: differentiating through it would keep the residuals of every branch.
    return _rule(static, "backward", *operands, g)


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
    """Sum values at nine places around each pixel, per group of channels: f[B,H',W',C].

    Point p = 3 kx + ky of a group samples its channels bilinearly at row i + s (ky - 1 + oy) and
    column j + s (kx - 1 + ox), with s = `offset_scale`; outside the map values are zero. Places and
    weights are float32 even if values are bfloat16. At integer places, which have no derivative,
    the gradients for offsets are those to the right and below, as in the reference. At most one
    sampled map is held at a time.

    Args:
      value: f[B,H,W,C]; C / `groups` consecutive channels form a group.
      offsets: f[B,H',W',groups*9*2], per point the column's offset, then the row's, in pixels.
      mask: f[B,H',W',groups*9], the points' weights, already after the softmax.
      stride, padding, dilation: of the grid, in pixels; values other than 1, 1, 1 use gathers.
      implementation: a name in `IMPLEMENTATIONS`; None chooses by platform.
    Raises:
      ValueError: groups that do not divide the channels, a map smaller than the grid, shapes or
        types that do not match, or, outside a trace, offsets that are not finite.
    Source: Wang et al. 2022 (arXiv 2211.05778), equation 2; parity:
      tests/models/kernels/test_deformable.py against the authors' code (31c962d).
    """
    geometry = GridGeometry(value.shape[1:3], groups, offset_scale, stride, padding, dilation)
    _check(value, offsets, mask, geometry)
    return _deformable(_Static(geometry, implementation), value, offsets, mask)


def outside(offsets: Array, *, offset_scale: float = 1.0) -> Array:
    """Count the points beyond the window, which covers offsets in [-2, 2) pixels: i32[].

    These are sampled by gathers, one by one. `offsets` and its scale are as in `deformable`, on the
    grid without stride and dilation.
    """
    groups = offsets.shape[3] // (2 * POINTS)
    points = points_of(offsets, offsets[..., : groups * POINTS], groups=groups)
    around = GridGeometry(offsets.shape[1:3], groups, offset_scale).from_grid(points)
    return (~reached(around.y, around.x)).sum()


def _check(value: Array, offsets: Array, mask: Array, geometry: GridGeometry) -> None:
    (_, height, width, channels), groups = value.shape, geometry.groups
    if groups < 1 or channels % groups:
        raise ValueError(
            f"{channels} channels cannot form {groups} groups of equal size; choose groups that "
            "divide the channels"
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
            raise ValueError(f"shape {array.shape} of {name} must be {shape} for {groups} groups")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} are {array.dtype}; give floats, offsets in pixels")
    if not isinstance(offsets, jax.core.Tracer) and not jnp.isfinite(offsets).all():
        raise ValueError(
            "offsets contain NaN or infinity; look for the first layer whose output is not finite"
        )
