"""ResNeXt in PyTorch, at 32 and at 224 pixels.

Sources: Xie et al. 2017 (arXiv 1611.05431); names and the small stem as in kuangliu/pytorch-cifar
(49b7aa9). Parity:
tests/models/cifar/test_convolutional.py.
"""

from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import ACTIVATIONS


def model(
    depths: tuple[int, ...] = (3, 3, 3),
    groups: int = 2,
    width: int = 64,
    small_stem: bool = True,
    activation: str = "relu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Return the network of one row.

    Args:
      depths: blocks of each stage.
      groups: of the 3x3 convolutions.
      width: channels of a group in the first stage; they double with each stage.
      small_stem: for 32 px, a 1x1 convolution; else 7x7, stride 2, and pooling.
      activation: relu, gelu, silu or softplus.
    """
    act = ACTIVATIONS[activation]()
    return ResNeXt(tuple(depths), groups, width, small_stem, act, in_channels, num_classes)


class ResNeXt(nn.Module):
    """Stem, stages, mean over the pixels, linear."""

    def __init__(
        self,
        depths: tuple[int, ...],
        groups: int,
        width: int,
        small_stem: bool,
        act: nn.Module,
        in_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.act, self.stages = act, len(depths)
        if small_stem:
            self.conv1 = nn.Conv2d(in_channels, 64, 1, bias=False)
            self.pool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(64)
        ins, inner = 64, groups * width
        for number, depth in enumerate(depths, 1):
            blocks = []
            for place in range(depth):
                stride = 2 if number > 1 and place == 0 else 1
                blocks.append(Block(ins, inner, stride, groups, act))
                ins = 2 * inner
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            inner = 2 * inner
        self.linear = nn.Linear(ins, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.act(self.bn1(self.conv1(images))))
        for number in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return self.linear(x.mean((2, 3)))


class Block(nn.Module):
    """Three convolutions with a norm behind each, the second one in groups."""

    def __init__(self, ins: int, inner: int, stride: int, groups: int, act: nn.Module) -> None:
        super().__init__()
        self.act, outs = act, 2 * inner
        self.conv1 = nn.Conv2d(ins, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outs)
        self.shortcut = nn.Sequential()
        if stride != 1 or ins != outs:
            self.shortcut.append(nn.Conv2d(ins, outs, 1, stride=stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(y)))
        return self.act(self.bn3(self.conv3(y)) + self.shortcut(x))
