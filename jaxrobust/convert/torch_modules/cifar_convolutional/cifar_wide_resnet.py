"""Wide residual networks with biased convolutions in PyTorch, such as WRN-40-10.

Sources: Zagoruyko & Komodakis 2016 (arXiv 1605.07146); names, and where stride and shortcut are, as
in meliketoy/wide-resnet.pytorch (292b3ed). Parity:
tests/models/cifar/test_convolutional.py.
"""

import math

from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import ACTIVATIONS


def model(
    depths: tuple[int, ...],
    width: int,
    activation: str = "relu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Return the network of one row.

    Args:
      depths: blocks of each stage.
      width: 16, 32, 64 times it are the channels of the stages.
      activation: relu, gelu, silu or softplus.
    """
    return WideResNet(tuple(depths), width, ACTIVATIONS[activation](), in_channels, num_classes)


class WideResNet(nn.Module):
    """Stem, stages, norm and activation, mean over the pixels, linear."""

    def __init__(
        self,
        depths: tuple[int, ...],
        width: int,
        act: nn.Module,
        in_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.act, self.stages = act, len(depths)
        self.conv1 = conv(in_channels, 16, 3)
        ins = 16
        for i, depth in enumerate(depths):
            outs = 16 * 2**i * width
            first = Block(ins, outs, 1 if i == 0 else 2, act)
            rest = [Block(outs, outs, 1, act) for _ in range(depth - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(first, *rest))
            ins = outs
        self.bn1 = nn.BatchNorm2d(ins, momentum=0.9)
        self.linear = nn.Linear(ins, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images)
        for i in range(self.stages):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return self.linear(self.act(self.bn1(x)).mean((2, 3)))


class Block(nn.Module):
    """Two convolutions behind norm and activation each; the second one has the stride."""

    def __init__(self, ins: int, outs: int, stride: int, act: nn.Module) -> None:
        super().__init__()
        self.act = act
        self.bn1 = nn.BatchNorm2d(ins)
        self.conv1 = conv(ins, outs, 3)
        self.dropout = nn.Dropout(0.3)
        self.bn2 = nn.BatchNorm2d(outs)
        self.conv2 = conv(outs, outs, 3, stride)
        self.shortcut = nn.Sequential()
        if stride != 1 or ins != outs:
            self.shortcut.append(conv(ins, outs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.conv1(self.act(self.bn1(x))))
        return self.conv2(self.act(self.bn2(y))) + self.shortcut(x)


def conv(ins: int, outs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Return a convolution with bias that keeps the size, but for its stride."""
    made = nn.Conv2d(ins, outs, kernel, stride=stride, padding=kernel // 2)
    nn.init.xavier_uniform_(made.weight, gain=math.sqrt(2))
    assert made.bias is not None
    nn.init.zeros_(made.bias)
    return made
