"""XCiT in PyTorch.

Source: El-Nouby et al. 2021 (arXiv 2106.09681).
"""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import EPS, ClassAttention, mlp


def model(
    dim: int,  # width
    depth: int,
    heads: int,
    tokens_norm: bool = True,  # class attention: norm of all tokens, or of one
    stem_strides: tuple[int, ...] = (2, 2, 2, 2),  # each doubles the channels, up to `dim`
    gamma_init: float = 1.0,
    in_channels: int = 3,
    num_classes: int = 1000,
) -> nn.Module:
    blocks = nn.ModuleList([Block(dim, heads, gamma_init) for _ in range(depth)])
    last = nn.Sequential(*[ClassBlock(dim, heads, gamma_init, tokens_norm) for _ in range(2)])
    return Xcit(stem(in_channels, dim, stem_strides), blocks, last, dim, num_classes)


class Xcit(nn.Module):
    """Stem and positions, blocks on the patches, class attention, linear on the class token."""

    def __init__(
        self, stem: nn.Module, blocks: nn.ModuleList, last: nn.Module, dim: int, num_classes: int
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.patch_embed = nn.Sequential(OrderedDict(proj=stem))
        self.pos_embed = FourierPositions(dim)
        self.blocks = blocks
        self.cls_attn_blocks = last
        self.norm, self.head = nn.LayerNorm(dim, eps=EPS), nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        grid = self.patch_embed(images)
        x = (grid + self.pos_embed(*grid.shape[2:])).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, *grid.shape[2:])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return self.head(self.norm(self.cls_attn_blocks(x))[:, 0])


def stem(ins: int, dim: int, strides: tuple[int, ...]) -> nn.Sequential:
    """Build 3x3 convolutions with batch norm, GELU between; the channels double up to `dim`."""
    layers: list[nn.Module] = []
    for left, stride in zip(reversed(range(len(strides))), strides, strict=True):
        out = dim >> left
        conv = nn.Conv2d(ins, out, 3, stride=stride, padding=1, bias=False)
        layers += [nn.Sequential(conv, nn.BatchNorm2d(out)), nn.GELU()]
        ins = out
    return nn.Sequential(*layers[:-1])


class FourierPositions(nn.Module):
    """sin and cos of row, then of column, at 16 frequencies, through a 1x1 convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token_projection = nn.Conv2d(64, dim, 1)

    def forward(self, height: int, width: int) -> Tensor:
        kernel = self.token_projection.weight
        # In float32 also for a network in float64: the published networks have it so.
        device = kernel.device
        steps = torch.arange(0, 32, 2, dtype=torch.float32, device=device)
        frequencies = 10000 ** (steps / 32)

        def waves(length):  # [32, length]: sin and cos of one frequency beside each other
            at = torch.arange(1, length + 1, dtype=torch.float32, device=device)
            angle = at / (at[-1] + 1e-6) * 2 * math.pi / frequencies[:, None]
            return torch.stack([angle.sin(), angle.cos()], 1).flatten(0, 1).to(kernel.dtype)

        row, column = waves(height)[:, :, None], waves(width)[:, None]
        grid = [row.expand(-1, -1, width), column.expand(-1, height, -1)]
        return self.token_projection(torch.cat(grid)[None])


class Block(nn.Module):
    """Cross-covariance attention, local patch interaction, MLP; each scaled and added."""

    def __init__(self, dim: int, heads: int, gamma: float) -> None:
        super().__init__()
        scales = (nn.Parameter(gamma * torch.ones(dim)) for _ in range(3))
        self.gamma1, self.gamma3, self.gamma2 = scales
        self.norm1, self.attn = nn.LayerNorm(dim, eps=EPS), CrossCovariance(dim, heads)
        self.norm3, self.local_mp = nn.LayerNorm(dim, eps=EPS), local_interaction(dim)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=EPS), mlp(dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x + self.gamma1 * self.attn(self.norm1(x))
        grid = self.norm3(x).transpose(1, 2).unflatten(2, (height, width))
        x = x + self.gamma3 * self.local_mp(grid).flatten(2).transpose(1, 2)
        return x + self.gamma2 * self.mlp(self.norm2(x))


class CrossCovariance(nn.Module):
    """Attention between channels: q and k have unit length over the tokens."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        # [B, N, 3 D] -> three of [B, heads, D / heads, N]
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 4, 1)
        q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
        weights = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
        return self.proj((weights @ v).permute(0, 3, 1, 2).flatten(2))


def local_interaction(dim: int) -> nn.Module:
    """Build two depthwise 3x3 convolutions on the grid of patches, GELU and batch norm between."""
    first, last = (nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in range(2))
    layers = {"conv1": first, "act": nn.GELU(), "bn": nn.BatchNorm2d(dim), "conv2": last}
    return nn.Sequential(OrderedDict(layers))


class ClassBlock(nn.Module):
    """The class token attends to all; the patches change too, as in the published networks."""

    def __init__(self, dim: int, heads: int, gamma: float, tokens_norm: bool) -> None:
        super().__init__()
        self.tokens_norm = tokens_norm
        self.gamma1, self.gamma2 = (nn.Parameter(gamma * torch.ones(dim)) for _ in range(2))
        self.norm1, self.attn = nn.LayerNorm(dim, eps=EPS), ClassAttention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=EPS), mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm1(x)
        x = x + self.gamma1 * torch.cat([self.attn(u), u[:, 1:]], 1)
        token = self.norm2(x[:, :1])
        patches = self.norm2(x[:, 1:]) if self.tokens_norm else x[:, 1:]
        return torch.cat([token + self.gamma2 * self.mlp(token), 2 * patches], 1)
