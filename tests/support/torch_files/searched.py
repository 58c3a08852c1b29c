"""Networks of searched cells in PyTorch: RobNet, AdvRush and RACL.

Sources: Guo et al. 2020 (arXiv 1911.10695); Mok et al. 2021 (arXiv 2108.01289); Dong et al. 2020
(arXiv 2009.00902); the macro: Liu et al. 2019 (arXiv 1806.09055).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.support.torch_files.layers import Residual, conv, named

Steps = tuple[tuple[tuple[str, int], ...], ...]


class Cell(NamedTuple):
    """The steps of both kinds of cells, whether norms have weights, and a detail of the names."""

    normal: Steps
    reduction: Steps
    affine: bool = True
    wrapped: bool = False


def dense(*codes: str) -> Steps:
    """List steps that read every state before them."""
    return tuple(tuple((op, i) for i, op in enumerate(code.split())) for code in codes)


def pairs(*steps: str) -> Steps:
    """List the steps of written edges, such as "sep3 1, skip 0"."""
    edges = [[edge.split() for edge in step.split(", ")] for step in steps]
    return tuple(tuple((op, int(state)) for op, state in step) for step in edges)


ROBNET = dense("both both", "both both both", "sep3 both sep3 skip", "both sep3 sep3 sep3 both")
CELLS = {
    "robnet": Cell(ROBNET, ROBNET, affine=False, wrapped=True),
    "advrush": Cell(
        pairs("sep3 1, sep3 0", "sep5 0, sep3 1", "sep3 1, sep3 0", "skip 0, sep3 1"),
        pairs("sep3 0, sep3 1", "skip 0, dil3 2", "skip 0, avg3 1", "skip 0, skip 2"),
    ),
    "racl": Cell(
        pairs("sep3 0, sep3 1", "sep5 0, skip 1", "sep3 0, skip 3", "sep3 3, skip 4"),
        pairs("sep3 0, sep5 1", "avg3 0, dil3 1", "sep3 0, sep5 1", "sep3 2, dil3 3"),
    ),
}


def model(
    cell: str,  # robnet, advrush or racl
    channels: int,  # of the first cells' states; they double where the map is reduced
    cells: int,
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    return Searched(CELLS[cell], channels, cells, in_channels, num_classes)


class Searched(nn.Module):
    """Stem, cells that read the two before them, mean over the pixels, linear."""

    def __init__(
        self, cell: Cell, channels: int, cells: int, in_channels: int, num_classes: int
    ) -> None:
        super().__init__()
        width, before, reduced = channels, (3 * channels, 3 * channels), False
        self.stem = nn.Sequential(conv(in_channels, 3 * channels), nn.BatchNorm2d(3 * channels))
        self.cells = nn.ModuleList()
        for i in range(cells):
            reduces = i in (cells // 3, 2 * cells // 3)
            width *= 2 if reduces else 1
            self.cells.append(Block(cell, before, width, reduces, reduced))
            before, reduced = (before[1], width * len(cell.normal)), reduces
        self.classifier = nn.Linear(before[1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        old = new = self.stem(images)
        for cell in self.cells:
            old, new = new, cell(old, new)
        return self.classifier(new.mean((2, 3)))


class Block(nn.Module):
    """One cell."""

    def __init__(
        self, cell: Cell, ins: tuple[int, int], width: int, reduces: bool, reduced: bool
    ) -> None:
        super().__init__()
        old = Reduce if reduced else project
        self.preprocess0 = old(ins[0], width, cell.affine)
        self.preprocess1 = project(ins[1], width, cell.affine)
        self.steps = cell.reduction if reduces else cell.normal
        edges = [edge for step in self.steps for edge in step]
        made = [
            OPERATIONS[op](width, 2 if reduces and state < 2 else 1, cell.affine)
            for op, state in edges
        ]
        self._ops = nn.ModuleList([named(op=op) for op in made] if cell.wrapped else made)

    def forward(self, old: Tensor, new: Tensor) -> Tensor:
        states, ops = [self.preprocess0(old), self.preprocess1(new)], iter(self._ops)
        for step in self.steps:
            edges = [next(ops)(states[state]) for _, state in step]
            states.append(sum(edges[1:], edges[0]))
        return torch.cat(states[2:], 1)


def project(ins: int, outs: int, affine: bool) -> nn.Module:
    """Build ReLU, 1x1 convolution, norm."""
    norm = nn.BatchNorm2d(outs, affine=affine)
    return named(op=nn.Sequential(nn.ReLU(), conv(ins, outs, 1), norm))


class Reduce(nn.Module):
    """ReLU, two 1x1 convolutions of stride 2, one of them a pixel further on, together, norm."""

    def __init__(self, ins: int, outs: int, affine: bool) -> None:
        super().__init__()
        self.conv_1, self.conv_2 = (conv(ins, outs // 2, 1, 2) for _ in range(2))
        self.bn = nn.BatchNorm2d(outs, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], 1))


def separable(
    channels: int, stride: int, affine: bool, kernel: int = 3, dilation: int = 1, times: int = 2
) -> nn.Module:
    """Build ReLU, depthwise convolution, 1x1 convolution and norm, once or twice."""
    layers: list[nn.Module] = []
    for own in (stride, 1)[:times]:
        depthwise = conv(channels, channels, kernel, own, channels, dilation=dilation)
        norm = nn.BatchNorm2d(channels, affine=affine)
        layers += [nn.ReLU(), depthwise, conv(channels, channels, 1), norm]
    return named(op=nn.Sequential(*layers))


def both(channels: int, stride: int, affine: bool) -> nn.Module:
    """Build the sum of a separable convolution and a skip."""
    return Residual(conv=separable(channels, stride, affine), res=skip(channels, stride, affine))


def skip(channels: int, stride: int, affine: bool) -> nn.Module:
    """Build the identity, or the layers that reduce the map."""
    return nn.Identity() if stride == 1 else Reduce(channels, channels, affine)


OPERATIONS: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "sep3": separable,
    "sep5": lambda channels, stride, affine: separable(channels, stride, affine, 5),
    "dil3": lambda channels, stride, affine: separable(channels, stride, affine, 3, 2, 1),
    "skip": skip,
    "avg3": lambda channels, stride, affine: nn.AvgPool2d(3, stride, 1, count_include_pad=False),
    "both": both,
}
