"""ConvNeXt with PatchStem or ConvStem in PyTorch; this file needs nothing but torch.

    net = model(**ROW)
    net.load_state_dict(torch.load("weights.pt", weights_only=True))
    logits = net.eval()(images)  # f32[B,3,H,W] in [0, 1] -> f32[B,C]

Sources: Liu et al. 2022 (arXiv 2201.03545); stems: Singh, Croce, Hein 2023 (arXiv 2303.01870).
Parity: tests/exchange/test_torch_modules.py.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

EPS = 1e-6  # of every layer norm


def model(
    *,
    depths: Sequence[int],
    dims: Sequence[int],
    stem_widths: Sequence[int] = (),
    stem_strides: Sequence[int] = (4,),
    downsample_strides: Sequence[int] | None = None,
    gamma_init: float = 1e-6,
    in_channels: int = 3,
    num_classes: int = 1000,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """Return the network of one row; with `mean` and `std` its first layer normalises the images.

    Args:
      depths, dims: blocks and channels of each stage.
      stem_widths: channels of the ConvStem's 3x3 convolutions; empty for a PatchStem, whose
        kernel is as large as its stride.
      downsample_strides: of the 2x2 convolution between two stages; default 2 everywhere.
      gamma_init: of the layer scale.
    """
    stem = conv_stem(in_channels, stem_widths, stem_strides) if stem_widths else None
    if stem is None:
        (stride,) = stem_strides
        conv = nn.Conv2d(in_channels, dims[0], stride, stride=stride)
        stem = nn.Sequential(conv, ChannelNorm(dims[0], eps=EPS))
    strides = downsample_strides or [2] * (len(dims) - 1)
    net = ConvNeXt(stem, depths, dims, strides, gamma_init, num_classes)
    return net if mean is None or std is None else normalized(net, mean, std)


class ConvNeXt(nn.Module):
    """Stem, stages, mean over the pixels, layer norm, linear."""

    def __init__(
        self,
        stem: nn.Module,
        depths: Sequence[int],
        dims: Sequence[int],
        strides: Sequence[int],
        gamma_init: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.stem = stem
        rows = zip([0, *dims[:-1]], dims, depths, [0, *strides], strict=True)
        self.stages = nn.Sequential(*[Stage(*row, gamma_init) for row in rows])
        layers = {"norm": nn.LayerNorm(dims[-1], EPS), "fc": nn.Linear(dims[-1], num_classes)}
        self.head = nn.Sequential(OrderedDict(layers))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(images)).mean((2, 3)))


class Stage(nn.Module):
    """Layer norm and strided 2x2 convolution (but for the first stage), then the blocks."""

    def __init__(self, ins: int, dim: int, depth: int, stride: int, gamma_init: float) -> None:
        super().__init__()
        down: list[nn.Module] = []
        if ins:
            down = [ChannelNorm(ins, eps=EPS), nn.Conv2d(ins, dim, 2, stride=stride)]
        self.downsample = nn.Sequential(*down)
        self.blocks = nn.Sequential(*[Block(dim, gamma_init) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class Block(nn.Module):
    """x + gamma * MLP(LN(depthwise 7x7(x)))."""

    def __init__(self, dim: int, gamma_init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), gamma_init))
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.mlp = mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.mlp(y)).permute(0, 3, 1, 2)


def mlp(dim: int) -> nn.Module:
    """Linear to four times the width, exact GELU, linear back."""
    layers = {"fc1": nn.Linear(dim, 4 * dim), "act": nn.GELU(), "fc2": nn.Linear(4 * dim, dim)}
    return nn.Sequential(OrderedDict(layers))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv_stem(ins: int, widths: Sequence[int], strides: Sequence[int]) -> nn.Module:
    """3x3 convolution, layer norm, GELU for each width, under the name `stem`."""
    layers: list[nn.Module] = []
    for out, stride in zip(widths, strides, strict=True):
        conv = nn.Conv2d(ins, out, 3, stride=stride, padding=1)
        layers += [conv, ChannelNorm(out, eps=EPS), nn.GELU()]
        ins = out
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
