"""ConvNeXt with PatchStem or ConvStem in PyTorch.

Sources: Liu et al. 2022 (arXiv 2201.03545); stems: Singh, Croce, Hein 2023 (arXiv 2303.01870).
"""

import torch
from torch import nn

from tests.support.torch_files.layers import (
    EPS,
    ChannelNorm,
    ChannelsLast,
    Mean,
    PixelConv,
    Residual,
    conv_stem,
    mlp,
    named,
)


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
    if stem_widths:
        stem = conv_stem(in_channels, stem_widths, stem_strides, stem_kernels)
    else:
        patches = conv_stem(in_channels, (), stem_strides, project=dims[0])
        stem = nn.Sequential(patches, ChannelNorm(dims[0], eps=EPS))
    strides, stages = downsample_strides or (2,) * (len(dims) - 1), []
    for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        down = nn.Sequential()
        if i:
            shrink = PixelConv(dims[i - 1], dim, 2, strides[i - 1])
            down = nn.Sequential(nn.LayerNorm(dims[i - 1], eps=EPS), shrink)
        blocks = nn.Sequential(*[block(dim, gamma_init) for _ in range(depth)])
        stages.append(named(downsample=down, blocks=blocks))
    parts = {"stem": stem, "last": ChannelsLast(), "stages": nn.Sequential(*stages)}
    head = named(norm=nn.LayerNorm(dims[-1], EPS), fc=nn.Linear(dims[-1], num_classes))
    return named(**parts, mean=Mean(1, 2), head=head)


def block(dim: int, gamma_init: float) -> nn.Module:
    """Build x + gamma * MLP(LN(depthwise 7x7(x))), of [B, H, W, C]."""
    depthwise = PixelConv(dim, dim, 7, padding=3, groups=dim)
    layers = {"conv_dw": depthwise, "norm": nn.LayerNorm(dim, eps=EPS), "mlp": mlp(dim)}
    return Residual(**layers, gamma=torch.full((dim,), gamma_init))
