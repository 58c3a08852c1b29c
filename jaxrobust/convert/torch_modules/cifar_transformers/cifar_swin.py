"""Swin-T in PyTorch as a study at 32 px has it: one table of position biases for all heads.

Source: Liu et al. 2021 (arXiv 2103.14030), with the names and details of
berniwal/swin-transformer-pytorch c921ebf. Parity: tests/models/cifar/test_stages.py.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import ACTIVATIONS


def model(
    dim: int = 96,
    depths: tuple[int, ...] = (2, 2, 6, 2),
    heads: tuple[int, ...] = (3, 6, 12, 24),
    patch: int = 2,
    merges: tuple[int, ...] = (1, 2, 2),
    window: int = 4,
    activation: str = "gelu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Return the network of one row.

    Args:
      dim: channels of the first stage; they double with each.
      depths, heads: blocks and attention heads of each stage; every second block is shifted.
      patch, merges: how many pixels a side the first stage joins, and each that follows.
      window: side of a window in features.
      activation: gelu, relu, silu or softplus, of the feed-forward parts.
    """
    act, ins = ACTIVATIONS[activation], in_channels
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    rows = zip(depths, heads, (patch, *merges), strict=True)
    for i, (depth, count, side) in enumerate(rows):
        width = dim << i
        blocks = [block(width, count, window, bool(j % 2), act) for j in range(depth)]
        pairs = [nn.Sequential(*blocks[j : j + 2]) for j in range(0, depth, 2)]
        parts = {"patch_partition": Merge(ins, width, side), "layers": nn.Sequential(*pairs)}
        stages[f"stage{i + 1}"] = nn.Sequential(OrderedDict(parts))
        ins = width
    head = nn.Sequential(nn.LayerNorm(ins), nn.Linear(ins, num_classes))
    return Swin(stages, head)


class Swin(nn.Module):
    """Stages on [B, H, W, C], mean over the map, layer norm and linear."""

    def __init__(self, stages: OrderedDict[str, nn.Module], head: nn.Module) -> None:
        super().__init__()
        for name, stage in stages.items():
            self.add_module(name, stage)
        self.names, self.mlp_head = list(stages), head

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 2, 3, 1)
        for name in self.names:
            x = self.get_submodule(name)(x)
        return self.mlp_head(x.mean((1, 2)))


class Merge(nn.Module):
    """Squares of pixels as one, channel by channel, then linear."""

    def __init__(self, ins: int, outs: int, side: int) -> None:
        super().__init__()
        self.side, self.linear = side, nn.Linear(ins * side**2, outs)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(2, (-1, self.side)).unflatten(1, (-1, self.side))
        return self.linear(x.permute(0, 1, 3, 5, 2, 4).flatten(3))


class Residual(nn.Module):
    """x + fn(x)."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(x)


class Behind(nn.Module):
    """`fn` of the layer norm of the input."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(dim), fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


def block(dim: int, heads: int, window: int, shifted: bool, act: type[nn.Module]) -> nn.Module:
    """Return x + attention(LN(x)), then x + feed-forward(LN(x))."""
    net = nn.Sequential(nn.Linear(dim, 4 * dim), act(), nn.Linear(4 * dim, dim))
    mlp = Behind(dim, nn.Sequential(OrderedDict(net=net)))
    attn = Behind(dim, Attention(dim, heads, window, shifted))
    parts = {"attention_block": Residual(attn), "mlp_block": Residual(mlp)}
    return nn.Sequential(OrderedDict(parts))


class Attention(nn.Module):
    """Attention within each window, plus a bias for each offset of key from query."""

    index: Tensor

    def __init__(self, dim: int, heads: int, window: int, shifted: bool) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, window // 2 if shifted else 0
        at = torch.arange(window)
        row, column = at.repeat_interleave(window), at.repeat(window)
        if shifted:
            for name, along in (("upper_lower_mask", row), ("left_right_mask", column)):
                behind = along >= window - self.shift
                apart = behind[:, None] != behind
                mask = torch.zeros(apart.shape).masked_fill(apart, float("-inf"))
                self.register_parameter(name, nn.Parameter(mask, requires_grad=False))
        self.pos_embedding = nn.Parameter(torch.randn(2 * window - 1, 2 * window - 1))
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim)
        index = torch.stack([row - row[:, None], column - column[:, None]]) + window - 1
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        count, shift = x.shape[1] // self.window, self.shift
        x = x.roll((-shift, -shift), (1, 2))
        # [B, rows, columns of windows, N, D]
        x = x.unflatten(2, (count, -1)).unflatten(1, (count, -1)).transpose(2, 3).flatten(3, 4)
        q, k, v = self.to_qkv(x).unflatten(4, (3, self.heads, -1)).movedim(4, 0).transpose(-3, -2)
        weights = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        weights = weights + self.pos_embedding[self.index[0], self.index[1]]
        if shift:
            weights[:, -1] += self.upper_lower_mask
            weights[:, :, -1] += self.left_right_mask
        x = self.to_out((weights.softmax(-1) @ v).transpose(-3, -2).flatten(4))
        x = x.unflatten(3, (self.window, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x.roll((shift, shift), (1, 2))
