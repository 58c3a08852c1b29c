"""CoAtNet-0 in PyTorch, whose last four stages convolve or attend by choice.

Source: Dai et al. 2021 (arXiv 2106.04803); names and details: chinhsuanwu/coatnet-pytorch d3ef1c3.
"""

import torch
from torch import Tensor, nn

from tests.support.torch_files.layers import (
    ACTIVATIONS,
    Residual,
    SelfAttention,
    Square,
    Squeeze,
    Tokens,
    conv,
    named,
)


def model(
    order: str = "CCTT",  # of the stages after the stem, C convolutions or T attention
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
                blocks.append(convolve(ins, outs, j == 0, act))
            else:
                attention = Attention(ins, outs, side, heads, head_dim)
                blocks.append(attend_and_feed(ins, outs, j == 0, attention, act))
            ins = outs
        stages[f"s{i}"] = blocks
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return named(**stages, pool=pool, fc=nn.Linear(ins, num_classes, bias=False))


def convolve(ins: int, outs: int, halves: bool, act: type[nn.Module]) -> nn.Module:
    """Build x + BN(1x1(squeeze(act(BN(depthwise(act(BN(1x1(BN(x)))))))))."""
    hidden = 4 * ins
    branch = [conv(ins, hidden, 1, 1 + halves), nn.BatchNorm2d(hidden), act()]
    branch += [conv(hidden, hidden, groups=hidden), nn.BatchNorm2d(hidden), act()]
    branch += [Squeeze(hidden, ins // 4, act), conv(hidden, outs, 1), nn.BatchNorm2d(outs)]
    own = named(norm=nn.BatchNorm2d(ins), fn=nn.Sequential(*branch))
    return Residual(shortcut(ins, outs, halves) | {"conv": own})


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


def attend_and_feed(
    ins: int, outs: int, halves: bool, attention: nn.Module, act: type[nn.Module]
) -> nn.Module:
    """Build x + attention(LN(x)), then x + feed-forward(LN(x)), on [B, C, H, W]."""
    net = nn.Sequential(nn.Linear(outs, 4 * ins), act(), nn.Identity(), nn.Linear(4 * ins, outs))
    attn = named(norm=nn.LayerNorm(ins), fn=attention)
    ff = named(norm=nn.LayerNorm(outs), fn=named(net=net))
    into = named(pool=nn.MaxPool2d(3, 2, 1), tokens=Tokens()) if halves else Tokens()
    first = shortcut(ins, outs, halves) | {"attn": nn.Sequential(into, attn, Square())}
    return Residual(first, {"ff": nn.Sequential(Tokens(), ff, Square())})


def shortcut(ins: int, outs: int, halves: bool) -> dict[str, nn.Module]:
    """Name the layer that halves the map and changes its channels; none where it stays."""
    return {"proj": Pooled(ins, outs, 1, bias=False)} if halves else {}


class Pooled(nn.Conv2d):
    """A convolution of the largest numbers of each 3x3 window, at half the size."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.max_pool2d(x, 3, stride=2, padding=1))
