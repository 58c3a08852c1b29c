"""PVTv2-B1 "linear" in PyTorch: keys and values from 7 x 7 means of the map.

Source: Wang et al. 2022 (arXiv 2106.13797), with the names and details of timm 1.0.9. Parity:
tests/models/cifar/test_stages.py.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import ACTIVATIONS

MEANS = 7


def model(
    dims: tuple[int, ...] = (64, 128, 320, 512),
    depths: tuple[int, ...] = (2, 2, 2, 2),
    heads: tuple[int, ...] = (1, 2, 5, 8),
    ratios: tuple[int, ...] = (8, 8, 4, 4),
    patch: int = 4,
    activation: str = "gelu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Return the network of one row.

    Args:
      dims, depths, heads: channels, blocks and attention heads of each stage.
      ratios: the hidden units of its feed-forward parts by its channels.
      patch: stride of the first convolution, 7x7.
      activation: gelu, relu, silu or softplus, in place of every GELU.
    """
    act, ins, stages = ACTIVATIONS[activation], in_channels, []
    for i, (dim, depth, count, ratio) in enumerate(zip(dims, depths, heads, ratios, strict=True)):
        blocks = [Block(dim, count, ratio * dim, act) for _ in range(depth)]
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        if i:
            parts["downsample"] = Embed(ins, dim, 3, 2)
        parts["blocks"] = nn.Sequential(*blocks)
        parts["norm"] = nn.LayerNorm(dim, eps=1e-6)
        stages.append(nn.Sequential(parts))
        ins = dim
    return PVTv2(Embed(in_channels, dims[0], 7, patch), stages, nn.Linear(ins, num_classes))


class PVTv2(nn.Module):
    """Patches, stages on [B, H, W, C], mean over the map, linear."""

    def __init__(self, embed: nn.Module, stages: list[nn.Sequential], head: nn.Module) -> None:
        super().__init__()
        self.patch_embed, self.stages, self.head = embed, nn.Sequential(*stages), head

    def forward(self, images: Tensor) -> Tensor:
        x = self.stages(self.patch_embed(images.permute(0, 2, 3, 1)))
        return self.head(x.mean((1, 2)))


class Embed(nn.Module):
    """A convolution whose windows overlap, then layer norm, on [B, H, W, C]."""

    def __init__(self, ins: int, outs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(ins, outs, kernel, stride=stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(outs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Block(nn.Module):
    """x + attention(LN(x)), then x + feed-forward(LN(x))."""

    def __init__(self, dim: int, heads: int, hidden: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, act)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden, act)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Attention of all pixels to 7 x 7 means, which a small map repeats its pixels in."""

    def __init__(self, dim: int, heads: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm, self.act = nn.LayerNorm(dim), act()

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1:3]
        means = nn.functional.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), MEANS)
        means = self.act(self.norm(self.sr(means).flatten(2).mT))
        k, v = self.kv(means).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = self.q(x).flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2).unflatten(1, size))


class Mlp(nn.Module):
    """Linear, ReLU, depthwise 3x3, activation, linear."""

    def __init__(self, dim: int, hidden: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act, self.fc2 = act(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc1(x)).permute(0, 3, 1, 2)
        return self.fc2(self.act(self.dwconv(x).permute(0, 2, 3, 1)))
