"""ConvNeXt with PatchStem or ConvStem in PyTorch.

Sources: Liu et al. 2022 (arXiv 2201.03545); stems: Singh, Croce, Hein 2023 (arXiv 2303.01870).
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import EPS, ChannelNorm, conv_stem, mlp


def model(
    depths: tuple[int, ...],  # blocks of each stage
    dims: tuple[int, ...],
    stem_widths: tuple[int, ...] = (),  # of the ConvStem; empty: PatchStem
    stem_strides: tuple[int, ...] = (4,),
    stem_kernels: tuple[int, ...] = (),
    downsample_strides: tuple[int, ...] | None = None,  # of the 2x2 convolutions
    gamma_init: float = 1e-6,  # of the layer scale
    in_channels: int = 3,
    num_classes: int = 1000,
) -> nn.Module:
    stem = conv_stem(in_channels, stem_widths, stem_strides, stem_kernels) if stem_widths else None
    if stem is None:
        (stride,) = stem_strides
        conv = nn.Conv2d(in_channels, dims[0], stride, stride=stride)
        stem = nn.Sequential(conv, ChannelNorm(dims[0], eps=EPS))
    strides = downsample_strides or (2,) * (len(dims) - 1)
    return ConvNeXt(stem, depths, dims, strides, gamma_init, num_classes)


class ConvNeXt(nn.Module):
    """Stem, stages, mean over the pixels, layer norm, linear."""

    def __init__(
        self,
        stem: nn.Module,
        depths: tuple[int, ...],
        dims: tuple[int, ...],
        strides: tuple[int, ...],
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
