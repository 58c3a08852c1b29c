"""DenseNet-BC in PyTorch, at 32 and at 224 pixels.

Sources: Huang et al. 2017 (arXiv 1608.06993); names, and the order of channels, as in
kuangliu/pytorch-cifar (49b7aa9). Parity:
tests/models/cifar/test_convolutional.py.
"""

import torch
from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import ACTIVATIONS


def model(
    depths: tuple[int, ...] = (16, 16, 16, 16),
    growth: int = 12,
    stem: int = 24,
    small_stem: bool = True,
    activation: str = "relu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Return the network of one row.

    Args:
      depths: layers of each stage.
      growth: channels that each layer adds.
      stem: channels of the first convolution.
      small_stem: for 32 px, a 3x3 convolution; else 7x7, stride 2, norm and pooling.
      activation: relu, gelu, silu or softplus.
    """
    act = ACTIVATIONS[activation]()
    return DenseNet(tuple(depths), growth, stem, small_stem, act, in_channels, num_classes)


class DenseNet(nn.Module):
    """Stem, stages with transitions between them, norm and activation, mean, linear."""

    def __init__(
        self,
        depths: tuple[int, ...],
        growth: int,
        stem: int,
        small_stem: bool,
        act: nn.Module,
        in_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.act, self.small_stem = act, small_stem
        if small_stem:
            self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, stem, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(stem)
        self.parts, channels = [], stem
        for number, depth in enumerate(depths, 1):
            if number > 1:
                self.parts.append(f"trans{number - 1}")
                self.add_module(self.parts[-1], Transition(channels, act))
                channels = channels // 2
            layers = []
            for _ in range(depth):
                layers.append(Layer(channels, growth, act))
                channels += growth
            self.parts.append(f"dense{number}")
            self.add_module(self.parts[-1], nn.Sequential(*layers))
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images)
        if not self.small_stem:
            x = nn.functional.max_pool2d(self.act(self.bn1(x)), 3, stride=2, padding=1)
        for name in self.parts:
            x = self.get_submodule(name)(x)
        return self.linear(self.act(self.bn(x)).mean((2, 3)))


class Layer(nn.Module):
    """New channels of a 1x1 and a 3x3 convolution, in front of those that are there."""

    def __init__(self, ins: int, growth: int, act: nn.Module) -> None:
        super().__init__()
        self.act = act
        self.bn1 = nn.BatchNorm2d(ins)
        self.conv1 = nn.Conv2d(ins, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.act(self.bn1(x)))
        return torch.cat([self.conv2(self.act(self.bn2(y))), x], 1)


class Transition(nn.Module):
    """Half as many channels, rounded down, and half the side."""

    def __init__(self, ins: int, act: nn.Module) -> None:
        super().__init__()
        self.act = act
        self.bn = nn.BatchNorm2d(ins)
        self.conv = nn.Conv2d(ins, ins // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(self.conv(self.act(self.bn(x))), 2)
