"""CoAtNet-0 in PyTorch, whose last four stages convolve or attend by choice.

Source: Dai et al. 2021 (arXiv 2106.04803); names and details: chinhsuanwu/coatnet-pytorch d3ef1c3.
"""

import torch
from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import ACTIVATIONS, SelfAttention, Squeeze, conv, named


def model(
    order: str = "CCTT",  # of the stages behind the stem, C convolutions or T attention
    dims: tuple[int, ...] = (64, 96, 192, 384, 768),  # channels of stem and stages
    depths: tuple[int, ...] = (2, 2, 3, 5, 2),
    heads: int = 8,  # of attention
    head_dim: int = 32,
    activation: str = "gelu",
    image_size: int = 32,  # side in pixels, of all images; each stage halves it
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    act, ins = ACTIVATIONS[activation], in_channels
    stages: dict[str, nn.Module] = {}
    for i, (kind, outs, depth) in enumerate(zip("S" + order, dims, depths, strict=True)):
        side, blocks = image_size >> (i + 1), nn.Sequential()
        for j in range(depth):
            if kind == "S":
                stem = conv(ins, outs, 3, 1 + (j == 0))
                blocks.append(nn.Sequential(stem, nn.BatchNorm2d(outs), act()))
            elif kind == "C":
                blocks.append(Convolve(ins, outs, j == 0, act))
            else:
                attention = Attention(ins, outs, side, heads, head_dim)
                blocks.append(Attend(ins, outs, j == 0, attention, act))
            ins = outs
        stages[f"s{i}"] = blocks
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return named(**stages, pool=pool, fc=nn.Linear(ins, num_classes, bias=False))


class Convolve(nn.Module):
    """x + BN(1x1(squeeze(act(BN(depthwise(act(BN(1x1(BN(x)))))))))."""

    def __init__(self, ins: int, outs: int, halves: bool, act: type[nn.Module]) -> None:
        super().__init__()
        self.halves, hidden = halves, 4 * ins
        if halves:
            self.proj = conv(ins, outs, 1)
        first = nn.Conv2d(ins, hidden, 1, stride=1 + halves, bias=False)
        depthwise = conv(hidden, hidden, groups=hidden)
        branch = [first, nn.BatchNorm2d(hidden), act(), depthwise, nn.BatchNorm2d(hidden), act()]
        branch += [Squeeze(hidden, ins // 4, act), conv(hidden, outs, 1), nn.BatchNorm2d(outs)]
        self.conv = named(norm=nn.BatchNorm2d(ins), fn=nn.Sequential(*branch))

    def forward(self, x: Tensor) -> Tensor:
        return (self.proj(pooled(x)) if self.halves else x) + self.conv(x)


class Attention(SelfAttention):
    """Attention among all tokens [B, N, D], plus a learned bias for each offset and head."""

    relative_index: Tensor

    def __init__(self, ins: int, outs: int, side: int, heads: int, head_dim: int) -> None:
        inner, offsets = heads * head_dim, 2 * side - 1
        qkv, out = nn.Linear(ins, 3 * inner, bias=False), nn.Linear(inner, outs)
        super().__init__(heads, to_qkv=qkv, to_out=nn.Sequential(out, nn.Identity()))
        self.relative_bias_table = nn.Parameter(torch.zeros(offsets**2, heads))
        at = torch.arange(side)
        rows = at.repeat_interleave(side)[:, None] - at.repeat_interleave(side) + side - 1
        columns = at.repeat(side)[:, None] - at.repeat(side) + side - 1
        self.register_buffer("relative_index", (rows * offsets + columns).reshape(-1, 1))

    def bias(self, x: Tensor) -> Tensor:
        bias = self.relative_bias_table[self.relative_index[:, 0]]
        return bias.reshape(x.shape[1], x.shape[1], -1).permute(2, 0, 1)


class Attend(nn.Module):
    """x + attention(LN(x)), then x + feed-forward(LN(x)), on [B, C, H, W]."""

    def __init__(
        self, ins: int, outs: int, halves: bool, attention: nn.Module, act: type[nn.Module]
    ) -> None:
        super().__init__()
        self.halves = halves
        if halves:
            self.proj = conv(ins, outs, 1)
        first, last = nn.Linear(outs, 4 * ins), nn.Linear(4 * ins, outs)
        net = nn.Sequential(first, act(), nn.Identity(), last)
        attn = named(norm=nn.LayerNorm(ins), fn=attention)
        ff = named(norm=nn.LayerNorm(outs), fn=named(net=net))
        # The second of three places, as around it the repository turns maps into tokens and back.
        self.attn = nn.Sequential(nn.Identity(), attn, nn.Identity())
        self.ff = nn.Sequential(nn.Identity(), ff, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        x = pooled(x) if self.halves else x
        shortcut = self.proj(x) if self.halves else x
        tokens = shortcut.flatten(2).mT + self.attn(x.flatten(2).mT)
        return (tokens + self.ff(tokens)).mT.unflatten(2, x.shape[2:])


def pooled(x: Tensor) -> Tensor:
    """Take the largest of each 3x3 window, at half the size."""
    return nn.functional.max_pool2d(x, 3, stride=2, padding=1)
