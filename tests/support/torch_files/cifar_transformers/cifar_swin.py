"""Swin-T in PyTorch as a study at 32 px has it: one table of position biases for all heads.

Source: Liu et al. 2021 (arXiv 2103.14030), with the names and details of
berniwal/swin-transformer-pytorch c921ebf.
"""

import torch
from torch import Tensor, nn

from tests.support.torch_files.layers import (
    ACTIVATIONS,
    ChannelsLast,
    Mean,
    Residual,
    SelfAttention,
    named,
)


def model(
    dim: int = 96,  # channels of the first stage; they double with each
    depths: tuple[int, ...] = (2, 2, 6, 2),  # every second block is shifted
    heads: tuple[int, ...] = (3, 6, 12, 24),
    patch: int = 2,  # how many pixels a side the first stage joins, and each that follows
    merges: tuple[int, ...] = (1, 2, 2),
    window: int = 4,  # side of a window in features
    activation: str = "gelu",  # gelu, relu, silu or softplus, of the feed-forward parts
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    act, ins = ACTIVATIONS[activation], in_channels
    stages: dict[str, nn.Module] = {"last": ChannelsLast()}
    rows = zip(depths, heads, (patch, *merges), strict=True)
    for i, (depth, count, side) in enumerate(rows):
        width = dim << i
        blocks = [block(width, count, window, bool(j % 2), act) for j in range(depth)]
        pairs = [nn.Sequential(*blocks[j : j + 2]) for j in range(0, depth, 2)]
        merge = named(squares=Squares(side), linear=nn.Linear(ins * side**2, width))
        stages[f"stage{i + 1}"] = named(patch_partition=merge, layers=nn.Sequential(*pairs))
        ins = width
    head = nn.Sequential(nn.LayerNorm(ins), nn.Linear(ins, num_classes))
    return named(**stages, mean=Mean(1, 2), mlp_head=head)


class Squares(nn.Module):
    """Squares of pixels of [B, H, W, C] as one pixel each, channel by channel."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(2, (-1, self.side)).unflatten(1, (-1, self.side))
        return x.permute(0, 1, 3, 5, 2, 4).flatten(3)


def block(dim: int, heads: int, window: int, shifted: bool, act: type[nn.Module]) -> nn.Module:
    """Build x + attention(LN(x)), then x + feed-forward(LN(x))."""
    net = nn.Sequential(nn.Linear(dim, 4 * dim), act(), nn.Linear(4 * dim, dim))
    attention = named(norm=nn.LayerNorm(dim), fn=WindowAttention(dim, heads, window, shifted))
    feed = named(norm=nn.LayerNorm(dim), fn=named(net=net))
    return named(attention_block=Residual(fn=attention), mlp_block=Residual(fn=feed))


class WindowAttention(SelfAttention):
    """Attention within each window, plus a bias for each offset of key from query."""

    index: Tensor

    def __init__(self, dim: int, heads: int, window: int, shifted: bool) -> None:
        qkv = nn.Linear(dim, 3 * dim, bias=False)
        super().__init__(heads, to_qkv=qkv, to_out=nn.Linear(dim, dim))
        self.window, self.shift = window, window // 2 if shifted else 0
        at = torch.arange(window)
        row, column = at.repeat_interleave(window), at.repeat(window)
        if shifted:
            self.upper_lower_mask = self.mask(row >= window - self.shift)
            self.left_right_mask = self.mask(column >= window - self.shift)
        self.pos_embedding = nn.Parameter(torch.randn(2 * window - 1, 2 * window - 1))
        index = torch.stack([row - row[:, None], column - column[:, None]]) + window - 1
        self.register_buffer("index", index, persistent=False)

    def mask(self, behind: Tensor) -> nn.Parameter:
        """Part the pixels of a window that are after the map's edge from the others."""
        apart = behind[:, None] != behind
        mask = torch.zeros(apart.shape).masked_fill(apart, float("-inf"))
        return nn.Parameter(mask, requires_grad=False)

    def bias(self, x: Tensor) -> Tensor:
        bias = self.pos_embedding[self.index[0], self.index[1]]
        if self.shift:  # [rows, columns of windows, 1, N, N]
            bias = bias.repeat(*x.shape[1:3], 1, 1, 1)
            bias[-1] += self.upper_lower_mask
            bias[:, -1] += self.left_right_mask
        return bias

    def forward(self, x: Tensor) -> Tensor:
        count, shift = x.shape[1] // self.window, self.shift
        x = x.roll((-shift, -shift), (1, 2))
        # [B, rows, columns of windows, N, D]
        x = x.unflatten(2, (count, -1)).unflatten(1, (count, -1)).transpose(2, 3).flatten(3, 4)
        x = super().forward(x).unflatten(3, (self.window, -1))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2).roll((shift, shift), (1, 2))
