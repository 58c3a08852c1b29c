"""CaiT in PyTorch.

Source: Touvron et al. 2021 (arXiv 2103.17239).
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import EPS, ClassAttention, mlp


def model(
    dim: int,  # width, number of blocks on the patches, attention heads
    depth: int,
    heads: int,
    gamma_init: float = 1e-5,  # of the layer scales
    class_depth: int = 2,  # layers in which only the class token attends
    stem_strides: tuple[int, ...] = (16,),  # of the one convolution; its kernel is as large
    image_size: int = 224,  # side in pixels; the number of positions follows from it
    in_channels: int = 3,
    num_classes: int = 1000,
) -> nn.Module:
    (stride,) = stem_strides
    stem = nn.Conv2d(in_channels, dim, stride, stride=stride)
    positions = (image_size // stride) ** 2
    blocks = nn.Sequential(*[Block(dim, heads, gamma_init) for _ in range(depth)])
    last = nn.ModuleList([ClassBlock(dim, heads, gamma_init) for _ in range(class_depth)])
    return Cait(stem, blocks, last, dim, positions, num_classes)


class Cait(nn.Module):
    """Patches and positions, blocks on the patches, class attention, linear on the class token."""

    def __init__(
        self,
        stem: nn.Module,
        blocks: nn.Module,
        last: nn.ModuleList,
        dim: int,
        positions: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, positions, dim))
        self.patch_embed = nn.Sequential(OrderedDict(proj=stem))
        self.blocks = blocks
        self.blocks_token_only = last
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        patches = self.blocks(patches + self.pos_embed)
        token = self.cls_token.expand(len(patches), -1, -1)
        for block in self.blocks_token_only:
            token = block(token, patches)
        return self.head(self.norm(token)[:, 0])


class Block(nn.Module):
    """x + gamma_1 * attention(LN(x)), then x + gamma_2 * MLP(LN(x))."""

    def __init__(self, dim: int, heads: int, gamma: float) -> None:
        super().__init__()
        self.gamma_1, self.gamma_2 = scale(dim, gamma), scale(dim, gamma)
        self.norm1, self.attn = nn.LayerNorm(dim, eps=EPS), TalkingHeads(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=EPS), mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma_1 * self.attn(self.norm1(x))
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class TalkingHeads(nn.Module):
    """Attention whose heads are mixed linearly before (proj_l) and after (proj_w) the softmax."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.proj_l, self.proj_w = nn.Linear(heads, heads), nn.Linear(heads, heads)

    def forward(self, x: Tensor) -> Tensor:
        # [B, N, 3 D] -> three of [B, heads, N, D / heads]
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        weights = self.proj_l(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        weights = self.proj_w(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class ClassBlock(nn.Module):
    """The class token attends to itself and the patches, which stay as they are."""

    def __init__(self, dim: int, heads: int, gamma: float) -> None:
        super().__init__()
        self.gamma_1, self.gamma_2 = scale(dim, gamma), scale(dim, gamma)
        self.norm1, self.attn = nn.LayerNorm(dim, eps=EPS), ClassAttention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=EPS), mlp(dim)

    def forward(self, token: Tensor, patches: Tensor) -> Tensor:
        u = torch.cat([token, patches], 1)
        token = token + self.gamma_1 * self.attn(self.norm1(u))
        return token + self.gamma_2 * self.mlp(self.norm2(token))


def scale(dim: int, value: float) -> nn.Parameter:
    """Build a layer scale: one factor for each channel."""
    return nn.Parameter(torch.full((dim,), float(value)))
