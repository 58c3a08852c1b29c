"""CPVT in PyTorch: patches, and a depthwise convolution over them instead of positions.

Source: Chu et al. 2021 (arXiv 2102.10882).
"""

import torch
from torch import Tensor, nn

from tests.support.torch_files.layers import ACTIVATIONS, Patches, named, vit_block


def model(
    patch: int = 4,  # side of the patches in pixels
    dim: int = 512,  # width
    depth: int = 6,
    heads: int = 8,
    hidden: int = 512,  # width inside the MLPs
    activation: str = "gelu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    scale, act = (dim // heads) ** -0.5, ACTIVATIONS[activation]
    blocks = [vit_block(dim, heads, hidden, act, scale) for _ in range(depth)]
    head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))
    return CPVT(patch, in_channels, dim, blocks, head)


class CPVT(nn.Module):
    """Class token and patches, a block, their convolution, blocks, head on the class token."""

    def __init__(
        self, patch: int, in_channels: int, dim: int, blocks: list[nn.Module], head: nn.Module
    ) -> None:
        super().__init__()
        self.patches = Patches(patch)
        self.patch_to_embedding = nn.Linear(patch**2 * in_channels, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.dropout = nn.Dropout(0.1)
        self.transformer = named(layers=nn.Sequential(*blocks))
        conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.pos_block = nn.Sequential(named(proj=nn.Sequential(conv)))
        self.mlp_head = head

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_to_embedding(self.patches(images))
        size = [side // self.patches.side for side in images.shape[2:]]
        x = self.dropout(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1))
        first, *blocks = self.transformer.get_submodule("layers").children()
        x = first(x)
        token, grid = x[:, :1], x[:, 1:].mT.unflatten(2, size)
        x = torch.cat([token, (grid + self.pos_block(grid)).flatten(2).mT], 1)
        for block in blocks:
            x = block(x)
        return self.mlp_head(x[:, 0])
