"""MobileViT-S in PyTorch: inverted bottlenecks and transformers across patches of 2x2 pixels.

Source: Mehta & Rastegari 2022 (arXiv 2110.02178), with the names of chinhsuanwu/mobilevit-pytorch.
Parity: tests/models/cifar/test_hybrids.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import ACTIVATIONS


def model(
    channels: tuple[int, ...] = (16, 32, 64, 64, 64, 96, 128, 160),
    strides: tuple[int, ...] = (1, 1, 1, 1, 1, 2, 2, 2),
    dims: tuple[int, ...] = (144, 192, 240),
    depths: tuple[int, ...] = (2, 4, 3),
    ratios: tuple[int, ...] = (2, 4, 4),
    heads: int = 4,
    head_width: int = 8,
    expansion: int = 4,
    activation: str = "silu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Return the network of one row.

    Args:
      channels, strides: of the stem and of the bottlenecks.
      dims, depths, ratios: of the transformers behind the last bottlenecks: width, layers, hidden
        units of the feed-forward in widths.
      heads, head_width: of the attention.
      activation: everywhere, a name in ACTIVATIONS.
      expansion: of the bottlenecks, and of the channels before the classifier.
    """
    act = ACTIVATIONS[activation]()
    mvit = [
        Transformer(c, dim, ratio * dim, depth, heads, head_width, act)
        for c, dim, ratio, depth in zip(channels[-len(dims) :], dims, ratios, depths, strict=True)
    ]
    return MobileViT(channels, strides, mvit, expansion, act, in_channels, num_classes)


class MobileViT(nn.Module):
    """Stem, bottlenecks, each of the last with its transformer, 1x1, mean, linear."""

    def __init__(
        self,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        mvit: Sequence[nn.Module],
        expansion: int,
        act: nn.Module,
        in_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*conv(in_channels, channels[0], 3, act, strides[0]))
        pairs = zip(channels, channels[1:], strides[1:], strict=False)
        self.mv2 = nn.ModuleList([Bottleneck(*pair, expansion, act) for pair in pairs])
        self.mvit = nn.ModuleList(mvit)
        last = expansion * channels[-1]
        self.conv2 = nn.Sequential(*conv(channels[-1], last, 1, act))
        self.fc = nn.Linear(last, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images)
        plain = len(self.mv2) - len(self.mvit)
        for i, bottleneck in enumerate(self.mv2):
            x = bottleneck(x)
            if i >= plain:
                x = self.mvit[i - plain](x)
        return self.fc(self.conv2(x).mean((2, 3)))


def conv(
    ins: int, outs: int, kernel: int, act: nn.Module, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Return a convolution without a bias that keeps the size, batch norm and activation."""
    own = nn.Conv2d(ins, outs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [own, nn.BatchNorm2d(outs), act]


class Bottleneck(nn.Module):
    """1x1 to more channels, depthwise 3x3, 1x1 without activation; added to x where it fits."""

    def __init__(self, ins: int, outs: int, stride: int, expansion: int, act: nn.Module) -> None:
        super().__init__()
        wide = expansion * ins
        *project, _ = conv(wide, outs, 1, act)
        depthwise = conv(wide, wide, 3, act, stride, wide)
        self.conv = nn.Sequential(*conv(ins, wide, 1, act), *depthwise, *project)
        self.adds = stride == 1 and ins == outs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class Transformer(nn.Module):
    """3x3 and 1x1 convolution, layers across the patches, 1x1 back; 3x3 of that beside x."""

    def __init__(
        self,
        channels: int,
        dim: int,
        hidden: int,
        depth: int,
        heads: int,
        width: int,
        act: nn.Module,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*conv(channels, channels, 3, act))
        self.conv2 = nn.Sequential(*conv(channels, dim, 1, act))
        self.transformer = Layers(dim, hidden, depth, heads, width, act)
        self.conv3 = nn.Sequential(*conv(dim, channels, 1, act))
        self.conv4 = nn.Sequential(*conv(2 * channels, channels, 3, act))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        # [B, D, H, W] -> [B, 4, H / 2 * W / 2, D]
        rows, columns = y.shape[2] // 2, y.shape[3] // 2
        y = y.unflatten(3, (columns, 2)).unflatten(2, (rows, 2)).permute(0, 3, 5, 2, 4, 1)
        y = self.transformer(y.flatten(3, 4).flatten(1, 2))
        y = y.unflatten(2, (rows, columns)).unflatten(1, (2, 2)).permute(0, 5, 3, 1, 4, 2)
        y = y.flatten(4).flatten(2, 3)
        return self.conv4(torch.cat([self.conv3(y), x], 1))


class Layers(nn.Module):
    """x + attention(LN(x)) and x + feed-forward(LN(x)), again and again."""

    def __init__(
        self, dim: int, hidden: int, depth: int, heads: int, width: int, act: nn.Module
    ) -> None:
        super().__init__()
        both = (lambda: Attention(dim, heads, width), lambda: FeedForward(dim, hidden, act))
        layers = [[Residual(dim, make()) for make in both] for _ in range(depth)]
        self.layers = nn.Sequential(*(nn.Sequential(*layer) for layer in layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Residual(nn.Module):
    """x + f(LN(x))."""

    def __init__(self, dim: int, function: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(dim), function

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(self.norm(x))


class FeedForward(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, dim: int, hidden: int, act: nn.Module) -> None:
        super().__init__()
        linears = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.net = nn.Sequential(linears[0], act, nn.Identity(), linears[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Attention(nn.Module):
    """Softmax attention of [B, P, N, D] over N; the map to queries, keys and values has no bias."""

    def __init__(self, dim: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * heads * width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * width, dim))

    def forward(self, x: Tensor) -> Tensor:
        # [B, P, N, 3 h d] -> three of [B, P, h, N, d]
        q, k, v = self.to_qkv(x).unflatten(3, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(2, 3).flatten(3))
