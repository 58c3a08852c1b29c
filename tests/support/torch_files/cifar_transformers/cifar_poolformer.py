"""PoolFormer in PyTorch: pooling in the place of attention.

Source: Yu et al. 2022 (arXiv 2111.11418), with the names of sail-sg/poolformer.
"""

import torch
from torch import Tensor, nn

from tests.support.torch_files.layers import ACTIVATIONS, Mean, named


def model(
    depths: tuple[int, ...] = (2, 2, 6, 2),  # blocks of each stage
    dims: tuple[int, ...] = (64, 128, 320, 512),
    patch: int = 3,  # window and stride of the first convolution
    stride: int = 2,
    gamma_init: float = 1e-5,  # of the factors of each branch's channels
    activation: str = "gelu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    act, parts = ACTIVATIONS[activation], []
    first = nn.Conv2d(in_channels, dims[0], patch, stride, (patch - stride + 1) // 2)
    for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        if i:
            parts.append(named(proj=nn.Conv2d(dims[i - 1], dim, 3, 2, 1)))
        parts.append(nn.Sequential(*[Block(dim, gamma_init, act()) for _ in range(depth)]))
    stages = {"patch_embed": named(proj=first), "network": nn.Sequential(*parts)}
    head = nn.Linear(dims[-1], num_classes)
    return named(**stages, norm=nn.GroupNorm(1, dims[-1]), mean=Mean(), head=head)


class Block(nn.Module):
    """x + s1 * (pool(GN(x)) - GN(x)), then x + s2 * MLP(GN(x))."""

    def __init__(self, dim: int, gamma: float, act: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, dim), nn.GroupNorm(1, dim)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.mlp = named(fc1=nn.Conv2d(dim, 4 * dim, 1), act=act, fc2=nn.Conv2d(4 * dim, dim, 1))
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), float(gamma)))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), float(gamma)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.layer_scale_1[:, None, None] * (self.pool(y) - y)
        return x + self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x))
