"""Vision transformer for 32 px in PyTorch: logits scaled by all heads' width, an MLP as head.

Source: Dosovitskiy et al. 2021 (arXiv 2010.11929), with the names of
kentaroy47/vision-transformers-cifar10. Parity: tests/models/cifar/test_vit.py.
"""

import torch
from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import ACTIVATIONS, Transformer, patches


def model(
    patch: int = 4,
    dim: int = 512,
    depth: int = 6,
    heads: int = 8,
    hidden: int = 512,
    activation: str = "gelu",
    image_size: int = 32,
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Return the network of one row.

    Args:
      patch: side of the patches in pixels.
      dim, depth, heads: width, number of blocks, attention heads.
      hidden: width inside the MLPs and inside the head.
      activation: relu, silu, softplus or gelu.
      image_size: side in pixels; the number of positions follows from it.
    """
    transformer = Transformer(dim, depth, heads, hidden, activation, dim**-0.5)
    parts = [nn.LayerNorm(dim), nn.Linear(dim, hidden), ACTIVATIONS[activation](), nn.Dropout(0.1)]
    head = nn.Sequential(*parts, nn.Linear(hidden, num_classes))
    return VisionTransformer(patch, in_channels, dim, image_size // patch, transformer, head)


class VisionTransformer(nn.Module):
    """Patches, class token and positions, blocks, head on the class token."""

    def __init__(
        self,
        patch: int,
        in_channels: int,
        dim: int,
        grid: int,
        transformer: nn.Module,
        head: nn.Module,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.pos_embedding = nn.Parameter(torch.randn(1, grid**2 + 1, dim))
        self.patch_to_embedding = nn.Linear(patch**2 * in_channels, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.dropout = nn.Dropout(0.1)
        self.transformer = transformer
        self.mlp_head = head

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_to_embedding(patches(images, self.patch))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embedding
        return self.mlp_head(self.transformer(self.dropout(x))[:, 0])
