"""XCiT in PyTorch.

Source: El-Nouby et al. 2021 (arXiv 2106.09681).
"""

import math

import torch
from torch import Tensor, nn

from tests.support.torch_files.layers import (
    EPS,
    ChannelsFirst,
    ChannelsLast,
    ClassAttention,
    Residual,
    WithClassToken,
    conv,
    mlp,
    named,
)


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
    embed: dict[str, nn.Module] = {"patch_embed": named(proj=stem(in_channels, dim, stem_strides))}
    embed |= {"pos_embed": FourierPositions(dim), "last": ChannelsLast()}
    embed["blocks"] = nn.Sequential(*[block(dim, heads, gamma_init) for _ in range(depth)])
    embed["tokens"] = nn.Flatten(1, 2)
    last = nn.Sequential(*[ClassBlock(dim, heads, gamma_init, tokens_norm) for _ in range(2)])
    body: dict[str, nn.Module] = {"cls_attn_blocks": last, "norm": nn.LayerNorm(dim, eps=EPS)}
    body["head"] = nn.Linear(dim, num_classes)
    return WithClassToken(embed, body, cls_token=0.02 * torch.randn(1, 1, dim))


def stem(ins: int, dim: int, strides: tuple[int, ...]) -> nn.Sequential:
    """Build 3x3 convolutions with batch norm, GELU between; the channels double up to `dim`."""
    layers: list[nn.Module] = []
    for left, stride in zip(reversed(range(len(strides))), strides, strict=True):
        out = dim >> left
        layers += [nn.Sequential(conv(ins, out, 3, stride), nn.BatchNorm2d(out)), nn.GELU()]
        ins = out
    return nn.Sequential(*layers[:-1])


class FourierPositions(nn.Module):
    """x + a 1x1 convolution of sin and cos of row, then of column, at 16 frequencies."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token_projection = nn.Conv2d(64, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        (height, width), kernel = x.shape[2:], self.token_projection.weight
        # In float32 also for a network in float64: the published networks have it so.
        device = kernel.device
        steps = torch.arange(0, 32, 2, dtype=torch.float32, device=device)
        frequencies = 10000 ** (steps / 32)

        def waves(length):  # [32, length]: sin and cos of one frequency next to each other
            at = torch.arange(1, length + 1, dtype=torch.float32, device=device)
            angle = at / (at[-1] + 1e-6) * 2 * math.pi / frequencies[:, None]
            return torch.stack([angle.sin(), angle.cos()], 1).flatten(0, 1).to(kernel.dtype)

        row, column = waves(height)[:, :, None], waves(width)[:, None]
        grid = [row.expand(-1, -1, width), column.expand(-1, height, -1)]
        return x + self.token_projection(torch.cat(grid)[None])


def block(dim: int, heads: int, gamma: float) -> nn.Module:
    """Build attention, local patch interaction and MLP on [B, H, W, D]; each scaled and added."""
    norm1, norm2, norm3 = (nn.LayerNorm(dim, eps=EPS) for _ in range(3))
    gamma1, gamma2, gamma3 = (gamma * torch.ones(dim) for _ in range(3))
    return Residual(
        {"norm1": norm1, "attn": CrossCovariance(dim, heads), "gamma1": gamma1},
        {"norm3": norm3, "local_mp": local_interaction(dim), "gamma3": gamma3},
        {"norm2": norm2, "mlp": mlp(dim), "gamma2": gamma2},
    )


class CrossCovariance(nn.Module):
    """Attention between channels of [B, H, W, D]: q and k have unit length over the pixels."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        # [B, N, 3 D] -> three of [B, heads, D / heads, N]
        q, k, v = self.qkv(x).flatten(1, 2).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 4, 1)
        q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
        weights = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
        mixed = (weights @ v).permute(0, 3, 1, 2).flatten(2)
        return self.proj(mixed).unflatten(1, x.shape[1:3])


def local_interaction(dim: int) -> nn.Module:
    """Build two depthwise 3x3 convolutions on the grid of patches, GELU and batch norm between."""
    first, last = (conv(dim, dim, groups=dim, bias=True) for _ in range(2))
    layers = {"conv1": first, "act": nn.GELU(), "bn": nn.BatchNorm2d(dim), "conv2": last}
    return named(first=ChannelsFirst(), **layers, last=ChannelsLast())


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
