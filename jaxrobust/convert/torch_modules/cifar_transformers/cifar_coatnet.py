"""CoAtNet-0 in PyTorch, whose last four stages convolve or attend by choice.

Source: Dai et al. 2021 (arXiv 2106.04803), with the names and details of
chinhsuanwu/coatnet-pytorch d3ef1c3. Parity: tests/models/cifar/test_stages.py.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import ACTIVATIONS


def model(
    order: str = "CCTT",
    dims: tuple[int, ...] = (64, 96, 192, 384, 768),
    depths: tuple[int, ...] = (2, 2, 3, 5, 2),
    heads: int = 8,
    head_dim: int = 32,
    activation: str = "gelu",
    image_size: int = 32,
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Return the network of one row.

    Args:
      order: of the stages behind the stem, C convolutions or T attention.
      dims, depths: channels and blocks of the stem and of these stages.
      heads, head_dim: of attention.
      activation: gelu, relu, silu or softplus.
      image_size: side in pixels, of all images; each stage halves it.
    """
    act, ins = ACTIVATIONS[activation], in_channels
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (kind, outs, depth) in enumerate(zip("S" + order, dims, depths, strict=True)):
        side, blocks = image_size >> (i + 1), []
        for j in range(depth):
            if kind == "S":
                blocks.append(stem(ins, outs, j == 0, act))
            elif kind == "C":
                blocks.append(Convolve(ins, outs, j == 0, act))
            else:
                blocks.append(Attend(ins, outs, j == 0, side, heads, head_dim, act))
            ins = outs
        stages[f"s{i}"] = nn.Sequential(*blocks)
    stages["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    stages["fc"] = nn.Linear(ins, num_classes, bias=False)
    return nn.Sequential(stages)


def stem(ins: int, outs: int, halves: bool, act: type[nn.Module]) -> nn.Module:
    """Return a 3x3 convolution with its norm and activation."""
    conv = nn.Conv2d(ins, outs, 3, stride=1 + halves, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outs), act())


class Behind(nn.Module):
    """`fn` of the normalised input."""

    def __init__(self, norm: nn.Module, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = norm, fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class Squeeze(nn.Module):
    """Scale each channel by a sigmoid of two linear maps of all channels' means."""

    def __init__(self, channels: int, hidden: int, act: type[nn.Module]) -> None:
        super().__init__()
        first = nn.Linear(channels, hidden, bias=False)
        last = nn.Linear(hidden, channels, bias=False)
        self.fc = nn.Sequential(first, act(), last, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class Convolve(nn.Module):
    """x + BN(1x1(squeeze(act(BN(depthwise(act(BN(1x1(BN(x)))))))))."""

    def __init__(self, ins: int, outs: int, halves: bool, act: type[nn.Module]) -> None:
        super().__init__()
        self.halves, hidden = halves, 4 * ins
        if halves:
            self.proj = nn.Conv2d(ins, outs, 1, bias=False)
        branch = nn.Sequential(
            nn.Conv2d(ins, hidden, 1, stride=1 + halves, bias=False),
            nn.BatchNorm2d(hidden),
            act(),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            act(),
            Squeeze(hidden, ins // 4, act),
            nn.Conv2d(hidden, outs, 1, bias=False),
            nn.BatchNorm2d(outs),
        )
        self.conv = Behind(nn.BatchNorm2d(ins), branch)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.proj(pooled(x)) if self.halves else x
        return shortcut + self.conv(x)


class Attention(nn.Module):
    """Attention among all tokens [B, N, D], plus a learned bias for each offset and head."""

    relative_index: Tensor

    def __init__(self, ins: int, outs: int, side: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        offsets = 2 * side - 1
        self.relative_bias_table = nn.Parameter(torch.zeros(offsets**2, heads))
        at = torch.arange(side)
        rows = at.repeat_interleave(side)[:, None] - at.repeat_interleave(side) + side - 1
        columns = at.repeat(side)[:, None] - at.repeat(side) + side - 1
        self.register_buffer("relative_index", (rows * offsets + columns).reshape(-1, 1))
        self.to_qkv = nn.Linear(ins, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head_dim, outs), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        q, k, v = self.to_qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.relative_bias_table[self.relative_index[:, 0]]
        bias = bias.reshape(tokens, tokens, -1).permute(2, 0, 1)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias).softmax(-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class Attend(nn.Module):
    """x + attention(LN(x)), then x + feed-forward(LN(x)), on [B, C, H, W]."""

    def __init__(
        self,
        ins: int,
        outs: int,
        halves: bool,
        side: int,
        heads: int,
        head_dim: int,
        act: type[nn.Module],
    ) -> None:
        super().__init__()
        self.halves = halves
        if halves:
            self.proj = nn.Conv2d(ins, outs, 1, bias=False)
        attn = Behind(nn.LayerNorm(ins), Attention(ins, outs, side, heads, head_dim))
        first, last = nn.Linear(outs, 4 * ins), nn.Linear(4 * ins, outs)
        net = nn.Sequential(first, act(), nn.Identity(), last)
        ff = Behind(nn.LayerNorm(outs), nn.Sequential(OrderedDict(net=net)))
        # The second of three places, as around it the repository turns maps into tokens and back.
        self.attn = nn.Sequential(nn.Identity(), attn, nn.Identity())
        self.ff = nn.Sequential(nn.Identity(), ff, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        x = pooled(x) if self.halves else x
        shortcut = self.proj(x) if self.halves else x
        size = x.shape[2:]
        tokens = shortcut.flatten(2).mT + self.attn(x.flatten(2).mT)
        return (tokens + self.ff(tokens)).mT.unflatten(2, size)


def pooled(x: Tensor) -> Tensor:
    """Return the largest of each 3x3 window, at half the size."""
    return nn.functional.max_pool2d(x, 3, stride=2, padding=1)
