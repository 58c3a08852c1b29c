"""Cells from architecture search, and the operations on their edges.

Sources: RobNet, Guo et al. 2020 (arXiv 1911.10695); AdvRush, Mok et al. 2021 (arXiv 2108.01289);
RACL, Dong et al. 2020 (arXiv 2009.00902); their operations: Liu et al. 2019 (DARTS, arXiv
1806.09055).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.kernels import pooling
from jaxrobust.models.kernels.layers import relu
from jaxrobust.models.modules.basic import BatchNorm, Conv
from jaxrobust.models.modules.draws import (
    Draws,
    Drop,
    Initializer,
    branches,
    torch_default,
    torch_uniform,
)
from jaxrobust.types import Array

# The steps of a cell, each the sum of its edges: an operation and the state that it reads. States
# 0 and 1 are the outputs of the two previous cells; the steps' own outputs follow.
Steps = tuple[tuple[tuple[str, int], ...], ...]


class Cell(NamedTuple):
    """The result of a search."""

    normal: Steps
    reduction: Steps  # of the cells that halve the map, at a third and two thirds of the network
    affine: bool = True  # whether its batch norms have scale and bias
    wrapped: bool = False  # whether the authors' names have a module around each operation


def _dense(*codes: str) -> Steps:
    return tuple(tuple((op, i) for i, op in enumerate(code.split())) for code in codes)


def _pairs(*steps: str) -> Steps:
    """Parse steps from texts of edges, such as "sep3 1, skip 0"."""
    edges = (step.split(", ") for step in steps)
    return tuple(tuple((op, int(state)) for op, state in map(str.split, edge)) for edge in edges)


_ROBNET = _dense("both both", "both both both", "sep3 both sep3 skip", "both sep3 sep3 sep3 both")
CELLS = {
    "robnet": Cell(_ROBNET, _ROBNET, affine=False, wrapped=True),
    "advrush": Cell(
        _pairs("sep3 1, sep3 0", "sep5 0, sep3 1", "sep3 1, sep3 0", "skip 0, sep3 1"),
        _pairs("sep3 0, sep3 1", "skip 0, dil3 2", "skip 0, avg3 1", "skip 0, skip 2"),
    ),
    "racl": Cell(
        _pairs("sep3 0, sep3 1", "sep5 0, skip 1", "sep3 0, skip 3", "sep3 3, skip 4"),
        _pairs("sep3 0, sep5 1", "avg3 0, dil3 1", "sep3 0, sep5 1", "sep3 2, dil3 3"),
    ),
}


class Maker(NamedTuple):
    """Settings and random draws for all parts of a cell."""

    variant: Any  # the row
    rngs: Draws

    def conv(
        self, ins: int, outs: int, kernel: int = 1, init: Initializer = torch_default, **more: Any
    ) -> Conv:
        """Make a convolution without bias."""
        return Conv(ins, outs, kernel, bias=False, init=init, rngs=self.rngs, **more)

    def norm(self, channels: int) -> BatchNorm:
        """Make a batch norm of the cell."""
        v = self.variant
        options: dict[str, Any] = {"group": v.bn_group, "momentum": v.bn_momentum}
        return BatchNorm(channels, affine=CELLS[v.cell].affine, **options)


class Separable(nnx.Module):
    """ReLU, depthwise convolution, 1x1 convolution and norm, once or twice."""

    def __init__(
        self, channels: int, stride: int, make: Maker, kernel: int, *, dilation: int, times: int
    ) -> None:
        self.times = times
        options = {"groups": channels, "dilation": dilation, "padding": dilation * (kernel // 2)}
        init = torch_uniform(kernel * kernel)  # draws once, `torch_default` twice
        for i in range(1, times + 1):
            conv_stride = stride if i == 1 else 1
            depthwise = make.conv(channels, channels, kernel, init, stride=conv_stride, **options)
            setattr(self, f"dw{i}", depthwise)
            setattr(self, f"pw{i}", make.conv(channels, channels))
            setattr(self, f"bn{i}", make.norm(channels))

    def __call__(self, x: Array, train: bool) -> Array:
        for i in range(1, self.times + 1):
            dw, pw, bn = (getattr(self, f"{part}{i}") for part in ("dw", "pw", "bn"))
            x = bn(pw(dw(relu(x))), train)
        return x


class Reduce(nnx.Module):
    """ReLU, two 1x1 convolutions of stride 2 shifted by a pixel, concatenated, norm."""

    def __init__(self, ins: int, outs: int, make: Maker) -> None:
        self.conv_1, self.conv_2 = (make.conv(ins, outs // 2, stride=2) for _ in range(2))
        self.bn = make.norm(outs)

    def __call__(self, x: Array, train: bool) -> Array:
        x = relu(x)
        halves = [self.conv_1(x), self.conv_2(x[:, 1:, 1:])]
        return self.bn(jnp.concatenate(halves, -1), train)


class Project(nnx.Module):
    """ReLU, 1x1 convolution, norm."""

    def __init__(self, ins: int, outs: int, make: Maker) -> None:
        self.conv, self.bn = make.conv(ins, outs), make.norm(outs)

    def __call__(self, x: Array, train: bool) -> Array:
        return self.bn(self.conv(relu(x)), train)


class Both(nnx.Module):
    """The sum of a separable convolution and a skip."""

    def __init__(self, channels: int, stride: int, make: Maker) -> None:
        self.conv = _separable(channels, stride, make)
        self.res = _skip(channels, stride, make)

    def __call__(self, x: Array, train: bool) -> Array:
        return self.conv(x, train) + self.res(x, train)


class Identity(nnx.Module):
    """The input itself."""

    def __call__(self, x: Array, train: bool) -> Array:
        return x


class Mean(nnx.Module):
    """3x3 average pooling with windows cropped at the border."""

    def __init__(self, stride: int) -> None:
        self.stride = stride

    def __call__(self, x: Array, train: bool) -> Array:
        return pooling.avg_pool(x, stride=self.stride, count_padding=False)


def _separable(channels: int, stride: int, make: Maker, kernel: int = 3) -> Any:
    return Separable(channels, stride, make, kernel, dilation=1, times=2)


def _skip(channels: int, stride: int, make: Maker) -> Any:
    return Identity() if stride == 1 else Reduce(channels, channels, make)


# name -> (width, stride, maker) -> module
OPERATIONS: dict[str, Callable[[int, int, Maker], Any]] = {
    "sep3": _separable,
    "sep5": lambda width, stride, make: _separable(width, stride, make, 5),
    "dil3": lambda width, stride, make: Separable(width, stride, make, 3, dilation=2, times=1),
    "skip": _skip,
    "avg3": lambda width, stride, make: Mean(stride),
    "both": Both,
}


class Place(NamedTuple):
    """The settings of a cell that depend on its position in the network."""

    width: int
    reduces: bool
    after_reduction: bool


class Block(nnx.Module):
    """One cell: the outputs of the two previous cells -> the previous output and its own."""

    def __init__(self, ins: tuple[int, int], place: Place, make: Maker) -> None:
        width, cell = place.width, CELLS[make.variant.cell]
        old = Reduce if place.after_reduction else Project
        self.preprocess0, self.preprocess1 = old(ins[0], width, make), Project(ins[1], width, make)
        self.steps = cell.reduction if place.reduces else cell.normal
        edges = [edge for step in self.steps for edge in step]
        strides = [2 if place.reduces and state < 2 else 1 for _, state in edges]
        pairs = zip(edges, strides, strict=True)
        self.ops = nnx.List([OPERATIONS[op](width, stride, make) for (op, _), stride in pairs])

    def __call__(
        self, inputs: tuple[Array, Array], drop: Drop | None, train: bool
    ) -> tuple[Array, Array]:
        paths = iter(branches(drop, len(self.ops)))
        states = [self.preprocess0(inputs[0], train), self.preprocess1(inputs[1], train)]
        ops = iter(self.ops)
        for step in self.steps:
            edges = [(next(ops), next(paths), states[state]) for _, state in step]
            outputs = [
                op(x, train) if isinstance(op, Identity) else path(op(x, train))
                for op, path, x in edges
            ]
            states.append(sum(outputs[1:], outputs[0]))
        return inputs[1], jnp.concatenate(states[2:], -1)
