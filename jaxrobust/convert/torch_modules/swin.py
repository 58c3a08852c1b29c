"""Swin transformer in PyTorch.

Source: Liu et al. 2021 (arXiv 2103.14030).
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import mlp


def model(
    dim: int,  # channels of the first stage; they double with each
    depths: tuple[int, ...],  # blocks and attention heads of each stage
    heads: tuple[int, ...],
    patch: int = 4,  # sides of a patch in pixels and of a window in features
    window: int = 7,
    eps: float = 1e-5,  # of every layer norm
    image_size: int = 224,
    in_channels: int = 3,
    num_classes: int = 1000,
) -> nn.Module:
    layers, side = [], image_size // patch
    for i, (depth, count) in enumerate(zip(depths, heads, strict=True)):
        if i:
            side = (side + 1) // 2
        size, shift = (window, window // 2) if side > window else (side, 0)
        shifts = [shift * (j % 2) for j in range(depth)]
        blocks = [Block(dim << i, count, side, size, s, eps) for s in shifts]
        down = Merge(dim << (i - 1), eps) if i else nn.Identity()
        parts = {"downsample": down, "blocks": nn.Sequential(*blocks)}
        layers.append(nn.Sequential(OrderedDict(parts)))
    stem = nn.Conv2d(in_channels, dim, patch, stride=patch)
    return Swin(stem, nn.Sequential(*layers), dim, dim << (len(layers) - 1), eps, num_classes)


class Swin(nn.Module):
    """Patches, stages on [B, H, W, C], layer norm, mean over the map, linear."""

    def __init__(
        self, stem: nn.Module, layers: nn.Module, dim: int, last: int, eps: float, num_classes: int
    ) -> None:
        super().__init__()
        embed = {"proj": stem, "norm": nn.LayerNorm(dim, eps=eps)}
        self.patch_embed = nn.ModuleDict(embed)
        self.layers = layers
        self.norm = nn.LayerNorm(last, eps=eps)
        self.head = nn.Sequential(OrderedDict(fc=nn.Linear(last, num_classes)))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed["proj"](images).permute(0, 2, 3, 1)
        x = self.layers(self.patch_embed["norm"](x))
        return self.head(self.norm(x).mean((1, 2)))


class Merge(nn.Module):
    """The four neighbours of a 2x2 square, column by column, beside each other; then linear."""

    def __init__(self, ins: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * ins, eps=eps)
        self.reduction = nn.Linear(4 * ins, 2 * ins, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = nn.functional.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x))


class Block(nn.Module):
    """x + attention(LN(x)) within windows, shifted or not, then x + MLP(LN(x))."""

    mask: Tensor

    def __init__(
        self, dim: int, heads: int, side: int, window: int, shift: int, eps: float
    ) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = mlp(dim)
        self.pad = -side % window
        mask = shift_mask(side + self.pad, window, shift) if shift else torch.zeros(1, 1, 1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[1]
        y = self.norm1(x).roll((-self.shift, -self.shift), (1, 2))
        y = nn.functional.pad(y, (0, 0, 0, self.pad, 0, self.pad))
        y = merged(self.attn(windows(y, self.window), self.mask), side + self.pad)
        y = y[:, :side, :side].roll((self.shift, self.shift), (1, 2))
        x = x + y
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Attention within each window, plus a learned bias for each offset of key from query."""

    index: Tensor

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        table = 0.02 * torch.randn((2 * window - 1) ** 2, heads)
        self.relative_position_bias_table = nn.Parameter(table)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        at = torch.arange(window)
        row, column = at.repeat_interleave(window), at.repeat(window)
        rows = row[:, None] - row + window - 1
        index = rows * (2 * window - 1) + column[:, None] - column + window - 1
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attend in each of W windows, [B, W, N, D]; the mask [W or 1, N or 1, N or 1] is added."""
        # [B, W, N, 3 D] -> three of [B, W, heads, N, D / heads]
        q, k, v = self.qkv(x).unflatten(3, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        bias = self.relative_position_bias_table[self.index].permute(2, 0, 1)
        weights = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + bias + mask[:, None]
        return self.proj((weights.softmax(-1) @ v).transpose(2, 3).flatten(3))


def windows(x: Tensor, side: int) -> Tensor:
    """Cut [B, H, W, D] into squares: [B, windows, side^2, D]."""
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def merged(x: Tensor, height: int) -> Tensor:
    """Undo `windows` for a square map."""
    side = round(x.shape[2] ** 0.5)
    count = height // side
    x = x.unflatten(2, (side, side)).unflatten(1, (count, count))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def shift_mask(side: int, window: int, shift: int) -> Tensor:
    """Compute [windows, N, N]: -100 where the shift made strangers neighbours, else 0."""
    at = torch.arange(side)
    band = (at >= side - window).long() + (at >= side - shift).long()
    label = windows((3 * band[:, None] + band)[None, :, :, None], window)[0, :, :, 0]
    return -100.0 * (label[:, :, None] != label[:, None])
