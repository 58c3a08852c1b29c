"""CPVT in PyTorch: patches, and a depthwise convolution over them instead of positions.

Source: Chu et al. 2021 (arXiv 2102.10882). Parity: tests/models/cifar/test_cpvt.py.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import Transformer, patches


def model(
    patch: int = 4,
    dim: int = 512,
    depth: int = 6,
    heads: int = 8,
    hidden: int = 512,
    activation: str = "gelu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Return the network of one row.

    Args:
      patch: side of the patches in pixels.
      dim, depth, heads: width, number of blocks, attention heads.
      hidden: width inside the MLPs.
      activation: relu, silu, softplus or gelu.
    """
    transformer = Transformer(dim, depth, heads, hidden, activation, (dim // heads) ** -0.5)
    head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))
    return CPVT(patch, in_channels, dim, transformer, head)


class CPVT(nn.Module):
    """Class token and patches, a block, their convolution, blocks, head on the class token."""

    def __init__(
        self, patch: int, in_channels: int, dim: int, transformer: Transformer, head: nn.Module
    ) -> None:
        super().__init__()
        self.patch = patch
        self.patch_to_embedding = nn.Linear(patch**2 * in_channels, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.dropout = nn.Dropout(0.1)
        self.transformer = transformer
        conv = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim))
        self.pos_block = nn.ModuleList([nn.Sequential(OrderedDict(proj=conv))])
        self.mlp_head = head

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_to_embedding(patches(images, self.patch))
        height, width = (side // self.patch for side in images.shape[2:])
        x = self.dropout(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1))
        for number in range(len(self.transformer.layers)):
            x = self.transformer.one(number, x)
            if number == 0:
                token, rest = x[:, :1], x[:, 1:].transpose(1, 2)
                rest = rest + self.pos_block[0](rest.unflatten(2, (height, width))).flatten(2)
                x = torch.cat([token, rest.transpose(1, 2)], 1)
        return self.mlp_head(x[:, 0])
