"""Isotropic ConvNeXt with PatchStem or ConvStem in PyTorch; this file needs nothing but torch.

    net = model(**ROW)
    net.load_state_dict(torch.load("weights.pt", weights_only=True))
    logits = net.eval()(images)  # f32[B,3,H,W] in [0, 1] -> f32[B,C]

Sources: Liu et al. 2022 (arXiv 2201.03545), section 3.3, and the names of its published weights;
stem: Singh, Croce, Hein 2023 (arXiv 2303.01870). Parity: tests/exchange/test_torch_modules.py.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

EPS = 1e-6  # of every layer norm


def model(
    *,
    depth: int,
    dim: int,
    stem_widths: Sequence[int] = (),
    stem_strides: Sequence[int] = (16,),
    in_channels: int = 3,
    num_classes: int = 1000,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """Return the network of one row; with `mean` and `std` its first layer normalises the images.

    Args:
      depth, dim: number of blocks and their channels.
      stem_widths: channels of the ConvStem's 3x3 convolutions, before its 1x1 to `dim`; empty for
        a PatchStem, whose kernel is as large as its stride.
    """
    if stem_widths:
        stem = conv_stem(in_channels, stem_widths, stem_strides, dim)
    else:
        (stride,) = stem_strides
        stem = nn.Conv2d(in_channels, dim, stride, stride=stride)  # no norm follows
    net = IsotropicConvNeXt(stem, depth, dim, num_classes)
    return net if mean is None or std is None else normalized(net, mean, std)


class IsotropicConvNeXt(nn.Module):
    """Stem, blocks of one width, mean over the pixels, layer norm, linear."""

    def __init__(self, stem: nn.Module, depth: int, dim: int, num_classes: int) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*[Block(dim) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(images)).mean((2, 3))))


class Block(nn.Module):
    """x + MLP(LN(depthwise 7x7(x))), without a layer scale."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.pwconv2(functional.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv_stem(ins: int, widths: Sequence[int], strides: Sequence[int], dim: int) -> nn.Module:
    """3x3 convolution, layer norm, GELU for each width, then 1x1, under the name `stem`."""
    layers: list[nn.Module] = []
    for out, stride in zip(widths, strides, strict=True):
        conv = nn.Conv2d(ins, out, 3, stride=stride, padding=1)
        layers += [conv, ChannelNorm(out, eps=EPS), nn.GELU()]
        ins = out
    layers.append(nn.Conv2d(ins, dim, 1))
    return nn.Sequential(OrderedDict(stem=nn.Sequential(*layers)))


class Normalize(nn.Module):
    """(images - mean) / std for each channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def normalized(net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """Return the network behind its normalisation: the names `normalize.*` and `model.*`."""
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), model=net))
