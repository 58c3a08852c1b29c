"""Blocks of convolutions and batch norms."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from jaxrobust.models.families import residual
from jaxrobust.models.modules.basic import ACTIVATIONS, BatchNorm
from jaxrobust.models.modules.draws import Draws, Drop, branches
from jaxrobust.types import Array


class ConvNorm(nnx.Module):
    """Convolution that keeps the size apart from its stride, no bias; batch norm; activation."""

    def __init__(
        self,
        ins: int,
        outs: int,
        kernel: int,
        v: Any,
        rngs: Draws,
        *,
        act: bool = True,
        **options: Any,
    ) -> None:
        self.conv = residual.conv(ins, outs, kernel, rngs, **options)
        self.bn = BatchNorm(outs, group=v.bn_group)
        self.act = ACTIVATIONS[v.activation] if act else None

    def __call__(self, x: Array, train: bool) -> Array:
        x = self.bn(self.conv(x), train)
        return x if self.act is None else self.act(x)


class Bottleneck(nnx.Module):
    """act(x + 1x1(act(3x3(act(1x1(x)))))), each with a norm; the 3x3 has the stride.

    `middle` makes the 3x3 convolution, or its replacement, from its channels and stride.
    """

    expansion = 4  # output channels per channel of the 3x3 convolution
    bias = True  # of the shortcut's convolution

    def __init__(
        self,
        ins: int,
        outs: int,
        stride: int,
        v: Any,
        rngs: Draws,
        *,
        middle: Callable[[int, int], nnx.Module],
    ) -> None:
        inner = outs // self.expansion
        norm = lambda channels: BatchNorm(channels, group=v.bn_group)  # noqa: E731
        self.conv1, self.bn1 = residual.conv(ins, inner, 1, rngs), norm(inner)
        self.conv2, self.bn2 = middle(inner, stride), norm(inner)
        self.conv3, self.bn3 = residual.conv(inner, outs, 1, rngs), norm(outs)
        self.shortcut = residual.shortcut(ins, outs, stride, v, rngs, bias=self.bias)
        self.act = ACTIVATIONS[v.activation]

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        (path,) = branches(drop, 1)
        y = self.act(self.bn1(self.conv1(x), train))
        y = self.act(self.bn2(self.conv2(y), train))
        y = self.bn3(self.conv3(y), train)
        return self.act(residual.through(self.shortcut, x, train) + path(y))
