"""CvT-13 in PyTorch: queries, keys and values through depthwise convolutions, no class token.

Source: Wu et al. 2021 (arXiv 2103.15808); names and details: lucidrains/vit-pytorch 69d24fe.
"""

import torch
from torch import Tensor, nn

from tests.support.torch_files.layers import ACTIVATIONS, Residual, attend, conv, named


def model(
    dims: tuple[int, ...] = (64, 192, 384),  # channels of each stage
    depths: tuple[int, ...] = (1, 2, 10),
    heads: tuple[int, ...] = (1, 3, 6),
    head_dim: int = 64,  # channels of a head
    window: int = 3,  # window and stride of the first convolution
    patch: int = 2,
    activation: str = "gelu",  # gelu, relu, silu or softplus, of the feed-forward parts
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    act, ins, stages = ACTIVATIONS[activation], in_channels, []
    for i, (dim, depth, count) in enumerate(zip(dims, depths, heads, strict=True)):
        embed = conv(ins, dim, *((3, 2) if i else (window, patch)), bias=True)
        blocks = []
        for _ in range(depth):
            first, last = nn.Conv2d(dim, 4 * dim, 1), nn.Conv2d(4 * dim, dim, 1)
            net = nn.Sequential(LayerNorm(dim), first, act(), nn.Identity(), last)
            blocks.append(nn.Sequential(Attention(dim, count, head_dim), Residual(net=net)))
        stages.append(nn.Sequential(embed, LayerNorm(dim), named(layers=nn.Sequential(*blocks))))
        ins = dim
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(ins, num_classes))
    return named(layers=nn.Sequential(*stages), to_logits=head)


class LayerNorm(nn.Module):
    """Layer norm over the channels of [B, C, H, W], with scale `g` and offset `b`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.b = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        variance = centred.square().mean(1, keepdim=True)
        return centred * (variance + 1e-5).rsqrt() * self.g + self.b


def project(dim: int, outs: int, stride: int) -> nn.Module:
    """Build a depthwise 3x3 convolution, its norm and a 1x1 one; named `net`."""
    depthwise = conv(dim, dim, 3, stride, groups=dim)
    return named(net=nn.Sequential(depthwise, nn.BatchNorm2d(dim), conv(dim, outs, 1)))


class Attention(nn.Module):
    """x + attention of all pixels of LN(x) to every second one of each row and column."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        inner, self.heads = heads * head_dim, heads
        self.norm = LayerNorm(dim)
        self.to_q, self.to_kv = project(dim, inner, 1), project(dim, 2 * inner, 2)
        self.to_out = nn.Sequential(nn.Conv2d(inner, dim, 1), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm(x)
        maps = (self.to_q(normal), *self.to_kv(normal).chunk(2, 1))
        q, k, v = (map.flatten(2).unflatten(1, (self.heads, -1)).mT for map in maps)
        return x + self.to_out(attend(q, k, v).mT.unflatten(2, x.shape[2:]))
