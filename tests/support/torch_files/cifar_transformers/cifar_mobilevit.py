"""MobileViT-S in PyTorch: inverted bottlenecks and transformers across patches of 2x2 pixels.

Source: Mehta & Rastegari 2022 (arXiv 2110.02178), with the names of chinhsuanwu/mobilevit-pytorch.
"""

import torch
from torch import Tensor, nn

from tests.support.torch_files.layers import ACTIVATIONS, Residual, SelfAttention, conv, named


def model(
    channels: tuple[int, ...] = (16, 32, 64, 64, 64, 96, 128, 160),  # of stem and bottlenecks
    strides: tuple[int, ...] = (1, 1, 1, 1, 1, 2, 2, 2),
    dims: tuple[int, ...] = (144, 192, 240),  # width of the transformers
    depths: tuple[int, ...] = (2, 4, 3),
    ratios: tuple[int, ...] = (2, 4, 4),
    heads: int = 4,  # of the attention
    head_width: int = 8,
    expansion: int = 4,  # of the bottlenecks, and of the channels before the classifier
    activation: str = "silu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    act = ACTIVATIONS[activation]
    mvit = []
    for c, dim, ratio, depth in zip(channels[-len(dims) :], dims, ratios, depths, strict=True):
        layers = [layer(dim, ratio * dim, heads, heads * head_width, act) for _ in range(depth)]
        mvit.append(Transformer(c, dim, layers, act))
    pairs = zip(channels, channels[1:], strides[1:], strict=False)
    mv2 = [bottleneck(*pair, expansion, act) for pair in pairs]
    stem = nn.Sequential(*normed(in_channels, channels[0], 3, act, strides[0]))
    last = expansion * channels[-1]
    head = nn.Sequential(*normed(channels[-1], last, 1, act))
    return MobileViT(stem, mv2, mvit, head, nn.Linear(last, num_classes, bias=False))


class MobileViT(nn.Module):
    """Stem, bottlenecks, each of the last with its transformer, 1x1, mean, linear."""

    def __init__(
        self, stem: nn.Module, mv2: list, mvit: list, head: nn.Module, fc: nn.Module
    ) -> None:
        super().__init__()
        self.conv1, self.mv2, self.mvit = stem, nn.ModuleList(mv2), nn.ModuleList(mvit)
        self.conv2, self.fc = head, fc

    def forward(self, images: Tensor) -> Tensor:
        x, plain = self.conv1(images), len(self.mv2) - len(self.mvit)
        for i, part in enumerate(self.mv2):
            x = part(x)
            x = self.mvit[i - plain](x) if i >= plain else x
        return self.fc(self.conv2(x).mean((2, 3)))


def normed(
    ins: int, outs: int, kernel: int, act: type[nn.Module], stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """List a convolution without a bias that keeps the size, batch norm and activation."""
    return [conv(ins, outs, kernel, stride, groups), nn.BatchNorm2d(outs), act()]


def bottleneck(ins: int, outs: int, stride: int, expansion: int, act: type[nn.Module]) -> nn.Module:
    """Build 1x1 to more channels, depthwise 3x3, 1x1 without activation; added to x if it fits."""
    wide = expansion * ins
    layers = normed(ins, wide, 1, act) + normed(wide, wide, 3, act, stride, wide)
    branch = nn.Sequential(*layers, *normed(wide, outs, 1, act)[:-1])
    return Residual(conv=branch) if stride == 1 and ins == outs else named(conv=branch)


class Transformer(nn.Module):
    """3x3 and 1x1 convolution, layers across the patches, 1x1 back; 3x3 of that next to x."""

    def __init__(
        self, channels: int, dim: int, layers: list[nn.Module], act: type[nn.Module]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*normed(channels, channels, 3, act))
        self.conv2 = nn.Sequential(*normed(channels, dim, 1, act))
        self.transformer = named(layers=nn.Sequential(*layers))
        self.conv3 = nn.Sequential(*normed(dim, channels, 1, act))
        self.conv4 = nn.Sequential(*normed(2 * channels, channels, 3, act))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        # [B, D, H, W] -> [B, 4, H / 2 * W / 2, D]
        rows, columns = y.shape[2] // 2, y.shape[3] // 2
        y = y.unflatten(3, (columns, 2)).unflatten(2, (rows, 2)).permute(0, 3, 5, 2, 4, 1)
        y = self.transformer(y.flatten(3, 4).flatten(1, 2))
        y = y.unflatten(2, (rows, columns)).unflatten(1, (2, 2)).permute(0, 5, 3, 1, 4, 2)
        y = y.flatten(4).flatten(2, 3)
        return self.conv4(torch.cat([self.conv3(y), x], 1))


def layer(dim: int, hidden: int, heads: int, inner: int, act: type[nn.Module]) -> nn.Module:
    """Build x + attention(LN(x)), then x + feed-forward(LN(x)), of [B, P, N, D] over N."""
    qkv, out = nn.Linear(dim, 3 * inner, bias=False), nn.Linear(inner, dim)
    attention = SelfAttention(heads, to_qkv=qkv, to_out=nn.Sequential(out))
    first, last = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
    branches = (attention, named(net=nn.Sequential(first, act(), nn.Identity(), last)))
    return nn.Sequential(*(Residual(norm=nn.LayerNorm(dim), fn=branch) for branch in branches))
