"""ResNet, wide ResNet and ResNet with GELU in PyTorch.

Sources: He et al. 2016 (arXiv 1512.03385); Zagoruyko & Komodakis 2016 (arXiv 1605.07146); GELU:
Bai et al. 2021 (arXiv 2111.05464). Parity: tests/convert/test_torch_modules.py.
"""

from collections.abc import Callable

from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import conv

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {"relu": nn.functional.relu, "gelu": nn.functional.gelu}


def model(
    depths: tuple[int, ...],
    bottleneck: bool = True,
    width: int = 64,
    base: int = 64,
    activation: str = "relu",
    small_stem: bool = False,
    in_channels: int = 3,
    num_classes: int = 1000,
) -> nn.Module:
    """Build the network of one row.

    Args:
      depths: blocks of each of the four stages.
      bottleneck: blocks of 1x1, 3x3, 1x1 convolutions, else of two 3x3.
      width: inner channels of the first stage's blocks; they double with each stage.
      base: channels of the stem; the first stage returns as many, of bottlenecks 4 times.
      activation: "relu" or "gelu", everywhere.
      small_stem: for 32 px, a 3x3 convolution of stride 1 instead of 7x7, stride 2, and pooling.
    """
    sizes = (width, base)
    return ResNet(depths, bottleneck, sizes, activation, small_stem, in_channels, num_classes)


class ResNet(nn.Module):
    """Stem, four stages, mean over the pixels, linear."""

    def __init__(
        self,
        depths: tuple[int, ...],
        bottleneck: bool,
        sizes: tuple[int, int],
        activation: str,
        small_stem: bool,
        ins: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.act, self.pool = ACTIVATIONS[activation], not small_stem
        width, base = sizes
        self.conv1 = conv(ins, base, 3) if small_stem else conv(ins, base, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(base)
        block, before = Bottleneck if bottleneck else Basic, base
        self.stages = [f"layer{i + 1}" for i in range(len(depths))]
        for i, (name, depth) in enumerate(zip(self.stages, depths, strict=True)):
            out = (4 if bottleneck else 1) * base << i
            rows = [(before, 1 if i == 0 else 2)] + [(out, 1)] * (depth - 1)
            blocks = [block(ins, width << i, out, stride, self.act) for ins, stride in rows]
            self.add_module(name, nn.Sequential(*blocks))
            before = out
        self.fc = nn.Linear(before, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(images)))
        if self.pool:
            x = nn.functional.max_pool2d(x, 3, stride=2, padding=1)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.fc(x.mean((2, 3)))


class Basic(nn.Module):
    """act(x + 3x3(act(3x3(x)))); the stride is the first one's."""

    def __init__(self, ins: int, width: int, outs: int, stride: int, act: Activation) -> None:
        super().__init__()
        self.act = act
        self.conv1, self.bn1 = conv(ins, width, 3, stride=stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, outs, 3), nn.BatchNorm2d(outs)
        self.downsample = shortcut(ins, outs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        return self.act(self.downsample(x) + self.bn2(self.conv2(y)))


class Bottleneck(nn.Module):
    """act(x + 1x1(act(3x3(act(1x1(x)))))); the stride is the 3x3 one's."""

    def __init__(self, ins: int, width: int, outs: int, stride: int, act: Activation) -> None:
        super().__init__()
        self.act = act
        self.conv1, self.bn1 = conv(ins, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride=stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, outs, 1), nn.BatchNorm2d(outs)
        self.downsample = shortcut(ins, outs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(y)))
        return self.act(self.downsample(x) + self.bn3(self.conv3(y)))


def shortcut(ins: int, outs: int, stride: int) -> nn.Module:
    """Build a 1x1 convolution and batch norm where size or channels change, else the identity."""
    if stride == 1 and ins == outs:
        return nn.Identity()
    return nn.Sequential(conv(ins, outs, 1, stride=stride), nn.BatchNorm2d(outs))
