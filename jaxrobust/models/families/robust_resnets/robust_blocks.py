"""Blocks of residual networks: RobustResBlocks, basic blocks, and the ablations between them.

Source: Huang et al. 2022 (arXiv 2212.11005) and, for basic blocks and RobustResBlocks, its released
code. The paper prints the sizes of the others, which fix their widths; the places of their parts
are our interpretation.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families import residual
from jaxrobust.models.kernels import pooling
from jaxrobust.models.kernels.primitives import widened
from jaxrobust.models.modules.basic import ACTIVATIONS, Linear
from jaxrobust.models.modules.draws import Draws, Drop, branches, fan_out, torch_default
from jaxrobust.models.modules.norms import NORMS
from jaxrobust.types import Array


class Kind(NamedTuple):
    """How a block's channels depend on its planes P."""

    outs: int  # times P
    inner: float  # times P
    middle: str = ""  # the 3x3 between two 1x1: full, grouped, parts, depthwise; empty: two 3x3


BLOCKS = {
    "basic": Kind(outs=1, inner=1),
    "bottleneck": Kind(4, 1, "full"),
    "aggregated": Kind(4, 1.5, "grouped"),
    "hierarchical": Kind(4, 2, "parts"),
    "inverted": Kind(1, 4, "depthwise"),  # the paper prints no size; MobileNet's expansion
}
# Applied to the last convolution's output, the inner 3x3's output, the block's input before the
# shortcut, or as a third branch after another norm.
SE = ("none", "standard", "conv3x3", "identity", "residual")


conv = functools.partial(residual.conv, init=fan_out)


class Squeeze(nnx.Module):
    """Scale each channel by a sigmoid of two linear maps of the channel means."""

    def __init__(
        self, channels: int, hidden: int, rngs: Draws, activation: str = "relu", bias: bool = False
    ) -> None:
        maps: dict[str, Any] = {"bias": bias, "init": torch_default, "rngs": rngs}
        self.fc1, self.fc2 = Linear(channels, hidden, **maps), Linear(hidden, channels, **maps)
        self.act = ACTIVATIONS[activation]

    def __call__(self, x: Array) -> Array:
        gate = jax.nn.sigmoid(self.fc2(self.act(self.fc1(x.mean(axis=(1, 2))))))
        # In float32: the gate's gradient is a sum over pixels.
        wide, gate = widened(x, gate)
        return (wide * gate[:, None, None]).astype(x.dtype)


class Block(nnx.Module):
    """x plus a branch of two or three convolutions, each with a norm and an activation.

    `bn1` precedes `conv1`, `bn2` follows it and so on; without preactivation each norm follows the
    convolution with its number.
    """

    def __init__(self, ins: int, planes: int, stride: int, v: Any, rngs: Draws) -> None:
        kind = BLOCKS[v.block]
        inner, outs = inner_of(planes, v), planes * kind.outs
        if v.preact:
            self.bn1 = norm_of(ins, v)
        if kind.middle:
            self.conv1 = conv(ins, inner, 1, rngs)
            self.conv2, norm = _middle(inner, stride, v, rngs)
            self.conv3 = conv(inner, outs, 1, rngs)
            behind = [norm_of(inner, v), norm]
        else:
            self.conv1 = conv(ins, inner, v.kernel_size, rngs, stride)
            self.conv2 = conv(inner, outs, v.kernel_size, rngs)
            behind = [norm_of(inner, v)]
        for i, norm in enumerate(behind if v.preact else [*behind, norm_of(outs, v)]):
            setattr(self, f"bn{i + 1 + v.preact}", norm)
        if v.se == "residual":
            self.se_bn = norm_of(outs, v)
        if v.se != "none":
            channels = {"conv3x3": inner, "identity": ins}.get(v.se, outs)
            reduced = ins if v.se == "identity" else outs
            if v.se_reduction > reduced:
                raise ValueError(
                    f"se_reduction={v.se_reduction} exceeds the {reduced} channels that it "
                    f"reduces; use at most {reduced}, which leaves one hidden unit"
                )
            self.se = Squeeze(channels, reduced // v.se_reduction, rngs)
        projects = v.residual and (stride > 1 or ins != outs)
        self.shortcut = nnx.List([conv(ins, outs, 1, rngs, stride)] if projects else [])
        self.act, self.stride, self.variant = ACTIVATIONS[v.activation], stride, v

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        v, (path,) = self.variant, branches(drop, 1)
        normed = self.act(self.bn1(x, train)) if v.preact else x
        y = self._branch(x if v.first_conv == "raw" else normed, train)
        if v.se == "standard":
            y = self.se(y)
        elif v.se == "residual":
            y = y + self.se(self.se_bn(y, train))
        y = path(y)
        if v.residual:
            source = normed if self.shortcut else x
            source = self.se(source) if v.se == "identity" else source
            y = y + (self.shortcut[0](source) if self.shortcut else source)
        return y if v.preact else self.act(y)

    def _behind(self, number: int) -> Any:
        return getattr(self, f"bn{number + self.variant.preact}")

    def _branch(self, x: Array, train: bool) -> Array:
        x = self.act(self._behind(1)(self.conv1(x), train))
        if BLOCKS[self.variant.block].middle:
            x = self.conv3(self._inner(x, train))
            return x if self.variant.preact else self._behind(3)(x, train)
        x = self.conv2(x)
        return x if self.variant.preact else self._behind(2)(x, train)

    def _inner(self, x: Array, train: bool) -> Array:
        """Apply the 3x3 convolution between the two 1x1, then its norm and activation."""
        v, norm = self.variant, self._behind(2)
        if BLOCKS[v.block].middle != "parts":
            x = self.conv2(x)
            return self.act(norm(self.se(x) if v.se == "conv3x3" else x, train))
        *parts, last = jnp.split(x, v.scales, axis=-1)
        outputs: list[Array] = []
        for part, conv, part_norm in zip(parts, self.conv2, norm, strict=True):
            # A part also reads the previous part, unless the block reduces the map.
            part = part + outputs[-1] if outputs and self.stride == 1 else part
            outputs.append(self.act(part_norm(conv(part), train)))
        if self.stride > 1:
            last = pooling.avg_pool(last, stride=self.stride, count_padding=True)
        return jnp.concatenate([*outputs, last], -1)


def inner_of(planes: int, v: Any) -> int:
    """Return the channels between a block's 1x1 convolutions, or its two 3x3 ones."""
    kind = BLOCKS[v.block]
    if not v.base_width:
        return int(planes * kind.inner)
    # As the authors compute it: floats in another order may round down to one less.
    width = math.floor(planes * (v.base_width / _UNIT)) * v.groups
    return width * v.scales if kind.middle == "parts" else width


def norm_of(channels: int, v: Any) -> Any:
    """Make the norm that a row asks for."""
    return NORMS[v.norm](channels, v.bn_group, v.bn_momentum)


def _middle(inner: int, stride: int, v: Any, rngs: Draws) -> tuple[Any, Any]:
    """Return a block's inner 3x3 convolution and norm, or lists with one per part."""
    middle = BLOCKS[v.block].middle
    if middle == "parts":
        width, count = inner // v.scales, v.scales - 1
        options: dict[str, Any] = {"stride": stride, "groups": v.groups}
        convs = [conv(width, width, v.kernel_size, rngs, **options) for _ in range(count)]
        return nnx.List(convs), nnx.List([norm_of(width, v) for _ in range(count)])
    groups = {"full": 1, "grouped": v.groups, "depthwise": inner}[middle]
    return conv(inner, inner, v.kernel_size, rngs, stride, groups=groups), norm_of(inner, v)


def check(v: Any, planes: Sequence[int]) -> None:
    """Raise `ValueError` if a row's channels do not divide into its parts and groups."""
    middle = BLOCKS[v.block].middle
    if v.kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={v.kernel_size} has no center pixel; give an odd number")
    if v.first_conv == "raw" and not (middle and v.preact):
        raise ValueError(
            "first_conv='raw' needs preactivated blocks that begin with a 1x1 convolution; give "
            "first_conv='activated'"
        )
    if v.se == "conv3x3" and middle in ("", "parts"):
        raise ValueError(
            f"se='conv3x3' needs one 3x3 convolution between two 1x1, which block={v.block!r} "
            "lacks; use block='bottleneck', or se='residual'"
        )
    if v.se == "identity" and not v.residual:
        raise ValueError("se='identity' scales the shortcut; leave residual=False out")
    if middle == "parts":
        _check_parts(v)
    if v.base_width:
        _check_base_width(v, planes)
        return  # these channels consist of groups
    inner = BLOCKS[v.block].inner
    unit = {"grouped": v.groups, "parts": v.scales * v.groups}.get(middle, 1)
    for number in planes:
        if number * inner % unit:
            least = next(n for n in itertools.count(1) if n * inner % unit == 0)
            parts = f"{v.scales} parts of " if middle == "parts" else ""
            raise ValueError(
                f"planes={number}: the {number * inner:g} inner channels of its {v.block} block "
                f"are not divisible into {parts}{v.groups} groups; use planes that are multiples "
                f"of {least}"
            )


def _check_base_width(v: Any, planes: Sequence[int]) -> None:
    if BLOCKS[v.block].middle not in ("grouped", "parts"):
        raise ValueError(
            f"base_width={v.base_width} only applies to blocks with grouped 3x3 convolutions, not "
            f"to block={v.block!r}; leave it out, or use block='aggregated' or 'hierarchical'"
        )
    if not math.floor(min(planes) * (v.base_width / _UNIT)):
        raise ValueError(
            f"base_width={v.base_width} leaves a block of {min(planes)} planes without channels; "
            f"use at least {math.ceil(_UNIT / min(planes))}"
        )


_UNIT = 160  # planes at which a group has `base_width` channels
# Defaults of the authors' constructor for values that a config does not set, along with a base
# width of 64.
_RELEASED = {"scales": 4, "groups": 8, "se_reduction": 16}


def _check_parts(v: Any) -> None:
    if v.scales < 2:
        raise ValueError(
            f"scales={v.scales} does not divide a hierarchical block into parts; use at least 2, "
            "or block='aggregated'"
        )
    released = all(getattr(v, name) == value for name, value in _RELEASED.items())
    if released and not v.base_width:
        options = ", ".join(f"{name}={value}" for name, value in _RELEASED.items())
        raise ValueError(
            f"{options} are the defaults of the authors' code, which also sets base_width=64 (its "
            "A1 has 144,344,330 parameters instead of 19,222,738); set base_width=64 too, or leave "
            "the three options out for the paper's values 8, 4 and 64"
        )
