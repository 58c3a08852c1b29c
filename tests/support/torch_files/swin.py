"""Swin transformer in PyTorch.

Source: Liu et al. 2021 (arXiv 2103.14030).
"""

import torch
from torch import Tensor, nn

from tests.support.torch_files.layers import (
    ChannelsLast,
    Mean,
    Residual,
    SelfAttention,
    mlp,
    named,
)


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
        # Rounded down, as timm decides about windows, though a merge pads an odd map.
        whole = max(1, image_size // (patch << i))
        size, shift = (window, window // 2) if whole > window else (whole, 0)
        attentions = [Attention(dim << i, count, side, size, shift * (j % 2)) for j in range(depth)]
        blocks = nn.Sequential(*[block(dim << i, attention, eps) for attention in attentions])
        down = Merge(dim << (i - 1), eps) if i else nn.Identity()
        layers.append(named(downsample=down, blocks=blocks))
    stem, last = nn.Conv2d(in_channels, dim, patch, stride=patch), dim << (len(layers) - 1)
    embed = named(proj=stem, last=ChannelsLast(), norm=nn.LayerNorm(dim, eps=eps))
    parts = {"patch_embed": embed, "layers": nn.Sequential(*layers)}
    head = named(fc=nn.Linear(last, num_classes))
    return named(**parts, norm=nn.LayerNorm(last, eps=eps), mean=Mean(1, 2), head=head)


class Merge(nn.Module):
    """The four neighbors of a 2x2 square, column by column, next to each other; then linear."""

    def __init__(self, ins: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * ins, eps=eps)
        self.reduction = nn.Linear(4 * ins, 2 * ins, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = nn.functional.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x))


def block(dim: int, attention: nn.Module, eps: float) -> nn.Module:
    """Build x + attention(LN(x)), then x + MLP(LN(x)), of [B, H, W, C]."""
    first = {"norm1": nn.LayerNorm(dim, eps=eps), "attn": attention}
    return Residual(first, {"norm2": nn.LayerNorm(dim, eps=eps), "mlp": mlp(dim)})


class Attention(SelfAttention):
    """Attention within windows, shifted or not, plus a bias for each offset of key from query."""

    index: Tensor
    mask: Tensor

    def __init__(self, dim: int, heads: int, side: int, window: int, shift: int) -> None:
        super().__init__(heads, qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim))
        self.window, self.shift, self.pad = window, shift, -side % window
        table = 0.02 * torch.randn((2 * window - 1) ** 2, heads)
        self.relative_position_bias_table = nn.Parameter(table)
        at = torch.arange(window)
        row, column = at.repeat_interleave(window), at.repeat(window)
        rows = row[:, None] - row + window - 1
        index = rows * (2 * window - 1) + column[:, None] - column + window - 1
        self.register_buffer("index", index, persistent=False)
        mask = shift_mask(side + self.pad, window, shift) if shift else torch.zeros(1, 1, 1)
        self.register_buffer("mask", mask, persistent=False)

    def bias(self, x: Tensor) -> Tensor:  # [windows or 1, heads, N, N]
        return self.relative_position_bias_table[self.index].permute(2, 0, 1) + self.mask[:, None]

    def forward(self, x: Tensor) -> Tensor:
        side, shift = x.shape[1], self.shift
        x = nn.functional.pad(x.roll((-shift, -shift), (1, 2)), (0, 0, 0, self.pad, 0, self.pad))
        x = merged(super().forward(windows(x, self.window)), side + self.pad)
        return x[:, :side, :side].roll((shift, shift), (1, 2))


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
    """Compute [windows, N, N]: -100 where the shift made strangers neighbors, else 0."""
    at = torch.arange(side)
    band = (at >= side - window).long() + (at >= side - shift).long()
    label = windows((3 * band[:, None] + band)[None, :, :, None], window)[0, :, :, 0]
    return -100.0 * (label[:, :, None] != label[:, None])
