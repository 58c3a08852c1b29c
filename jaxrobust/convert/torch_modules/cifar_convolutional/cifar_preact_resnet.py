"""Residual networks with preactivation in PyTorch, such as PreActResNet-50.

Sources: He et al. 2016 (arXiv 1603.05027); names, and what is missing before the last pooling, as
in kuangliu/pytorch-cifar (49b7aa9). Parity:
tests/models/cifar/test_convolutional.py.
"""

from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import ACTIVATIONS


def model(
    depths: tuple[int, ...] = (3, 4, 6, 3),
    width: int = 64,
    small_stem: bool = True,
    last_norm: bool = False,
    activation: str = "relu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Return the network of one row.

    Args:
      depths: blocks of each stage.
      width: inner channels of the first stage's blocks; they double with each stage.
      small_stem: for 32 px, a 3x3 convolution; else 7x7, stride 2, and pooling.
      last_norm: norm and activation before the last pooling.
      activation: relu, gelu, silu or softplus.
    """
    act = ACTIVATIONS[activation]()
    return PreActResNet(tuple(depths), width, small_stem, last_norm, act, in_channels, num_classes)


class PreActResNet(nn.Module):
    """Stem, stages, mean over the pixels, linear."""

    def __init__(
        self,
        depths: tuple[int, ...],
        width: int,
        small_stem: bool,
        last_norm: bool,
        act: nn.Module,
        in_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.act, self.last_norm, self.stages = act, last_norm, len(depths)
        if small_stem:
            self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
            self.pool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        ins = 64
        for number, depth in enumerate(depths, 1):
            blocks = []
            for place in range(depth):
                blocks.append(Block(ins, width, 2 if number > 1 and place == 0 else 1, act))
                ins = 4 * width
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            width = 2 * width
        if last_norm:
            self.bn = nn.BatchNorm2d(ins)
        self.linear = nn.Linear(ins, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.conv1(images))
        for number in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{number}")(x)
        if self.last_norm:
            x = self.act(self.bn(x))
        return self.linear(x.mean((2, 3)))


class Block(nn.Module):
    """Norm and activation before each of three convolutions; a projection reads the first ones."""

    def __init__(self, ins: int, width: int, stride: int, act: nn.Module) -> None:
        super().__init__()
        self.act = act
        self.bn1 = nn.BatchNorm2d(ins)
        self.conv1 = nn.Conv2d(ins, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.projects = stride != 1 or ins != 4 * width
        if self.projects:
            self.shortcut = nn.Sequential(nn.Conv2d(ins, 4 * width, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        before = self.act(self.bn1(x))
        kept = self.shortcut(before) if self.projects else x
        y = self.conv1(before)
        y = self.conv2(self.act(self.bn2(y)))
        return self.conv3(self.act(self.bn3(y))) + kept
