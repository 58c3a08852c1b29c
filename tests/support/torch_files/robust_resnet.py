"""RobustResNets, their wide residual baselines and the blocks between them in PyTorch.

Source: Huang et al. 2022 (arXiv 2212.11005).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.support.torch_files.layers import ACTIVATIONS, ChannelNorm, Squeeze, named

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(channels // 8, channels),
    "layer": ChannelNorm,
    "instance": nn.InstanceNorm2d,
}
# block -> (its output and its inner channels in units of its planes, its 3x3 between two 1x1)
BLOCKS: dict[str, tuple[int, float, str]] = {
    "basic": (1, 1, ""),
    "bottleneck": (4, 1, "full"),
    "aggregated": (4, 1.5, "grouped"),
    "hierarchical": (4, 2, "parts"),
    "inverted": (1, 4, "depthwise"),
}


class Row(NamedTuple):
    """What all blocks of a network have in common."""

    block: str = "basic"  # basic, bottleneck, aggregated, hierarchical or inverted
    se: str = "none"  # none, standard, conv3x3, identity or residual
    se_reduction: int = 64  # the channels of squeeze and excitation by its hidden units
    kernel_size: int = 3  # of the convolutions called 3x3, but for the stem
    scales: int = 8  # of the inner 3x3 convolutions
    groups: int = 4
    base_width: int = 0  # channels of a group in a block of 160 planes; 0: those of `BLOCKS`
    activation: str = "relu"
    norm: str = "batch"  # batch, group, layer or instance
    preact: bool = True  # norm and activation before each convolution, else after it
    residual: bool = True  # whether blocks have a shortcut
    first_conv: str = "activated"  # what a first 1x1 reads: activated, or raw


def model(
    depths: tuple[int, ...],  # blocks of each stage
    widths: tuple[int, ...] = (),  # of each stage; 16, 32, 64 times it are the planes
    planes: tuple[int, ...] = (),  # channels of each stage's blocks; empty: those of `widths`
    in_channels: int = 3,
    num_classes: int = 10,
    **row: Any,  # fields of `Row`
) -> nn.Module:
    own = tuple(planes) or tuple((16 << i) * width for i, width in enumerate(widths))
    return RobustResNet(tuple(depths), own, Row(**row), in_channels, num_classes)


class RobustResNet(nn.Module):
    """Stem, stages, norm and activation, mean over the pixels, linear."""

    def __init__(
        self,
        depths: tuple[int, ...],
        planes: tuple[int, ...],
        row: Row,
        in_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.row, self.act = row, ACTIVATIONS[row.activation]()
        self.stem_conv = conv(in_channels, 16, 3)
        ins, stages = 16, []
        for i, (depth, width) in enumerate(zip(depths, planes, strict=True)):
            outs = width * BLOCKS[row.block][0]
            rows = [(ins, 2 if i else 1)] + [(outs, 1)] * (depth - 1)
            blocks = [Block(a, width, stride, row) for a, stride in rows]
            stages.append(named(layer=nn.Sequential(*blocks)))
            ins = outs
        self.blocks = nn.ModuleList(stages)
        self.norm1 = NORMS[row.norm](ins if row.preact else 16)
        self.fc = nn.Linear(ins, num_classes)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem_conv(images)
        x = x if self.row.preact else self.act(self.norm1(x))
        for stage in self.blocks:
            x = stage(x)
        x = self.act(self.norm1(x)) if self.row.preact else x
        return self.fc(x.mean((2, 3)))


class Block(nn.Module):
    """x plus a branch of two or three convolutions, each with its norm and activation."""

    def __init__(self, ins: int, planes: int, stride: int, row: Row) -> None:
        super().__init__()
        expansion, wider, self.middle = BLOCKS[row.block]
        inner, outs = int(planes * wider), planes * expansion
        if row.base_width:
            inner = math.floor(planes * (row.base_width / 160)) * row.groups
            inner *= row.scales if self.middle == "parts" else 1
        self.row, self.stride, self.act = row, stride, ACTIVATIONS[row.activation]()
        norm, size = NORMS[row.norm], row.kernel_size
        behind: list[nn.Module] = [norm(inner)]
        if self.middle == "parts":
            width, count = inner // row.scales, row.scales - 1
            parts = [conv(width, width, size, stride, row.groups) for _ in range(count)]
            convs = [conv(ins, inner, 1), nn.ModuleList(parts), conv(inner, outs, 1)]
            behind.append(nn.ModuleList([norm(width) for _ in range(count)]))
        elif self.middle:
            groups = {"full": 1, "grouped": row.groups, "depthwise": inner}[self.middle]
            own = conv(inner, inner, size, stride, groups)
            convs = [conv(ins, inner, 1), own, conv(inner, outs, 1)]
            behind.append(norm(inner))
        else:
            convs = [conv(ins, inner, size, stride), conv(inner, outs, size)]
        if row.preact:
            self.bn1 = norm(ins)
        else:
            behind.append(norm(outs))
        for i, module in enumerate(convs, 1):
            self.add_module(f"conv{i}", module)
            if i <= len(behind):
                self.add_module(f"bn{i + row.preact}", behind[i - 1])
        if row.se == "residual":
            self.se_bn = norm(outs)
        if row.se != "none":
            reduced = ins if row.se == "identity" else outs
            channels = inner if row.se == "conv3x3" else reduced
            self.se = Squeeze(channels, reduced // row.se_reduction)
        self.projects = row.residual and (stride > 1 or ins != outs)
        if self.projects:
            self.shortcut = nn.Sequential(conv(ins, outs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        row = self.row
        before = self.act(self.bn1(x)) if row.preact else x
        y = self.branch(x if row.first_conv == "raw" else before)
        if row.se == "standard":
            y = self.se(y)
        elif row.se == "residual":
            y = y + self.se(self.se_bn(y))
        if row.residual:
            source = before if self.projects else x
            source = self.se(source) if row.se == "identity" else source
            y = y + (self.shortcut(source) if self.projects else source)
        return y if row.preact else self.act(y)

    def conv(self, number: int) -> nn.Module:
        """Build a convolution, or those of its parts."""
        return self.get_submodule(f"conv{number}")

    def behind(self, number: int) -> nn.Module:
        """Build the norm behind a convolution."""
        return self.get_submodule(f"bn{number + self.row.preact}")

    def branch(self, x: Tensor) -> Tensor:
        """Apply the convolutions to the input."""
        x = self.act(self.behind(1)(self.conv(1)(x)))
        last = 3 if self.middle else 2
        if self.middle == "parts":
            x = self.parts(x)
        elif self.middle:
            x = self.conv(2)(x)
            x = self.act(self.behind(2)(self.se(x) if self.row.se == "conv3x3" else x))
        x = self.conv(last)(x)
        return x if self.row.preact else self.behind(last)(x)

    def parts(self, x: Tensor) -> Tensor:
        """Build the 3x3 convolutions of all parts but the last one."""
        *parts, rest = x.chunk(self.row.scales, 1)
        made: list[Tensor] = []
        for i, part in enumerate(parts):
            part = part + made[-1] if made and self.stride == 1 else part
            conv, norm = (many.get_submodule(str(i)) for many in (self.conv(2), self.behind(2)))
            made.append(self.act(norm(conv(part))))
        if self.stride > 1:
            rest = nn.functional.avg_pool2d(rest, 3, stride=self.stride, padding=1)
        return torch.cat([*made, rest], 1)


def conv(ins: int, outs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Build a convolution without bias that keeps the size, but for its stride."""
    made = nn.Conv2d(ins, outs, kernel, stride, kernel // 2, groups=groups, bias=False)
    nn.init.normal_(made.weight, std=math.sqrt(2 / (kernel * kernel * outs)))
    return made
