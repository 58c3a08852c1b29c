"""Vision transformer with PatchStem or ConvStem in PyTorch.

Sources: Dosovitskiy et al. 2021 (arXiv 2010.11929); Touvron et al. 2022 (DeiT III, arXiv
2204.07118); stem: Singh, Croce, Hein 2023 (arXiv 2303.01870).
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import EPS, SelfAttention, conv_stem, mlp


def model(
    dim: int,  # width
    depth: int,
    heads: int,
    stem_widths: tuple[int, ...] = (),  # of the ConvStem; empty: PatchStem
    stem_strides: tuple[int, ...] = (16,),
    stem_kernels: tuple[int, ...] = (),
    class_position: bool = True,  # the class token has a position too (DeiT III: it has none)
    gamma_init: float | None = None,  # of the layer scale; None without one
    image_size: int = 224,  # side in pixels; the number of positions follows from it
    in_channels: int = 3,
    num_classes: int = 1000,
) -> nn.Module:
    side = image_size
    for stride in stem_strides:
        side = -(-side // stride) if stem_widths else side // stride
    if stem_widths:
        stem = conv_stem(in_channels, stem_widths, stem_strides, stem_kernels, dim)
    else:
        (stride,) = stem_strides
        stem = nn.Conv2d(in_channels, dim, stride, stride=stride)
    positions = side**2 + class_position
    blocks = nn.Sequential(*[Block(dim, heads, gamma_init) for _ in range(depth)])
    return VisionTransformer(stem, blocks, dim, positions, class_position, num_classes)


class VisionTransformer(nn.Module):
    """Patches, class token and positions, blocks, layer norm, linear on the class token."""

    def __init__(
        self,
        stem: nn.Module,
        blocks: nn.Module,
        dim: int,
        positions: int,
        class_position: bool,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.class_position = class_position
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, positions, dim))
        self.patch_embed = nn.Sequential(OrderedDict(proj=stem))
        self.blocks = blocks
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        token = self.cls_token.expand(len(x), -1, -1)
        if self.class_position:
            x = torch.cat([token, x], 1) + self.pos_embed
        else:
            x = torch.cat([token, x + self.pos_embed], 1)
        return self.head(self.norm(self.blocks(x))[:, 0])


class Block(nn.Module):
    """x + ls1(attention(LN(x))), then x + ls2(MLP(LN(x)))."""

    def __init__(self, dim: int, heads: int, gamma_init: float | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        qkv, proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn = SelfAttention(heads, qkv=qkv, proj=proj)
        self.ls1 = nn.Identity() if gamma_init is None else LayerScale(dim, gamma_init)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = mlp(dim)
        self.ls2 = nn.Identity() if gamma_init is None else LayerScale(dim, gamma_init)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class LayerScale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, dim: int, gamma_init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), gamma_init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
