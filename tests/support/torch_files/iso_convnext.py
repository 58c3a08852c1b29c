"""Isotropic ConvNeXt with PatchStem or ConvStem in PyTorch.

Sources: Liu et al. 2022 (arXiv 2201.03545), section 3.3, and the names of its published weights;
stem: Singh, Croce, Hein 2023 (arXiv 2303.01870).
"""

from torch import nn

from tests.support.torch_files.layers import (
    EPS,
    ChannelsLast,
    Mean,
    PixelConv,
    Residual,
    conv_stem,
    named,
)


def model(
    depth: int,  # number of blocks and their channels
    dim: int,
    stem_widths: tuple[int, ...] = (),  # of the ConvStem; empty: PatchStem, without a norm
    stem_strides: tuple[int, ...] = (16,),
    stem_kernels: tuple[int, ...] = (),
    in_channels: int = 3,
    num_classes: int = 1000,
) -> nn.Module:
    stem = conv_stem(in_channels, stem_widths, stem_strides, stem_kernels, dim)
    blocks = nn.Sequential(*[block(dim) for _ in range(depth)])
    parts = {"stem": stem, "last": ChannelsLast(), "blocks": blocks, "mean": Mean(1, 2)}
    return named(**parts, norm=nn.LayerNorm(dim, eps=EPS), head=nn.Linear(dim, num_classes))


def block(dim: int) -> nn.Module:
    """Build x + MLP(LN(depthwise 7x7(x))), of [B, H, W, C], without a layer scale."""
    depthwise, norm = PixelConv(dim, dim, 7, padding=3, groups=dim), nn.LayerNorm(dim, eps=EPS)
    first, last = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
    return Residual(dwconv=depthwise, norm=norm, pwconv1=first, act=nn.GELU(), pwconv2=last)
