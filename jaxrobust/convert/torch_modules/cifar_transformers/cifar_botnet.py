"""BoTNet-50 in PyTorch: a ResNet-50 whose last stage attends.

Source: Srinivas et al. 2021 (arXiv 2101.11605), with the names and the unscaled logits of
leaderj1001/BottleneckTransformers. Parity: tests/models/cifar/test_hybrids.py.
"""

import torch
from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import ACTIVATIONS


def model(
    depths: tuple[int, ...] = (3, 4, 6, 3),
    width: int = 64,
    heads: int = 4,
    small_stem: bool = True,
    image_size: int = 32,
    activation: str = "relu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Return the network of one row.

    Args:
      depths: blocks of each stage; those of the last one attend.
      width: inner channels of the first stage's blocks; they double with each stage.
      small_stem: 3x3 without stride, for 32 px; else 7x7 with stride 2 and pooling.
      activation: everywhere, a name in ACTIVATIONS.
      image_size: side in pixels; the attention's positions depend on it.
    """
    act, sizes = ACTIVATIONS[activation](), (image_size, in_channels, num_classes)
    return BoTNet(depths, width, heads, small_stem, act, *sizes)


class BoTNet(nn.Module):
    """Stem, stages, mean over the pixels, linear."""

    def __init__(
        self,
        depths: tuple[int, ...],
        width: int,
        heads: int,
        small_stem: bool,
        act: nn.Module,
        image_size: int,
        in_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        kernel, stride = (3, 1) if small_stem else (7, 2)
        self.conv1 = nn.Conv2d(in_channels, 64, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.pool = nn.Identity() if small_stem else nn.MaxPool2d(3, 2, 1)
        self.stages, self.act = len(depths), act
        side, ins = image_size if small_stem else image_size // 4, 64
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                stride = 2 if i and j == 0 else 1
                attends = side if i == len(depths) - 1 else None
                blocks.append(Bottleneck(ins, width * 2**i, stride, heads, act, attends))
                ins, side = 4 * width * 2**i, side // stride
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.fc = nn.Sequential(nn.Dropout(0.3), nn.Linear(ins, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.act(self.bn1(self.conv1(images))))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(x.mean((2, 3)))


class Bottleneck(nn.Module):
    """act(x + 1x1(act(3x3(act(1x1(x)))))); with a side of its map, attention for 3x3."""

    def __init__(
        self, ins: int, width: int, stride: int, heads: int, act: nn.Module, side: int | None
    ) -> None:
        super().__init__()
        outs, self.act = 4 * width, act
        self.conv1, self.bn1 = nn.Conv2d(ins, width, 1, bias=False), nn.BatchNorm2d(width)
        if side is None:
            self.conv2: nn.Module = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        else:
            pool = [nn.AvgPool2d(stride)] if stride > 1 else []
            self.conv2 = nn.Sequential(Attention(width, heads, side), *pool)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outs, 1, bias=False), nn.BatchNorm2d(outs)
        project = [nn.Conv2d(ins, outs, 1, stride), nn.BatchNorm2d(outs)]
        self.shortcut = nn.Sequential(*(project if stride > 1 or ins != outs else []))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(y)))
        return self.act(self.bn3(self.conv3(y)) + self.shortcut(x))


class Attention(nn.Module):
    """Softmax over j of q_i.k_j + r_i.q_j, r the sum of a row's and a column's embedding."""

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.rel_h = nn.Parameter(torch.randn(1, heads, dim // heads, 1, side))
        self.rel_w = nn.Parameter(torch.randn(1, heads, dim // heads, side, 1))
        self.query, self.key, self.value = (nn.Conv2d(dim, dim, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        # [B, D, H, W] -> [B, heads, D / heads, N]
        parts = (self.query(x), self.key(x), self.value(x))
        q, k, v = (part.flatten(2).unflatten(1, (self.heads, -1)) for part in parts)
        r = (self.rel_h + self.rel_w).flatten(3)
        weights = (q.mT @ k + r.mT @ q).softmax(-1)
        return (v @ weights.mT).reshape(x.shape)
