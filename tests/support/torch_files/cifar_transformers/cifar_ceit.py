"""CeiT-T in PyTorch: a convolutional stem, and feed-forwards that convolve the patches.

Source: Yuan et al. 2021 (arXiv 2103.11816), with the names of rishikksh20/CeiT-pytorch.
"""

import torch
from torch import Tensor, nn

from tests.support.torch_files.layers import (
    ACTIVATIONS,
    Patches,
    Residual,
    SelfAttention,
    Square,
    TokenNorm,
    Tokens,
    WithClassToken,
    named,
)


def model(
    dim: int = 192,  # width
    depth: int = 12,
    heads: int = 3,
    patch: int = 4,  # side of the patches of the stem's map, a quarter of the image
    stem_width: int = 32,  # channels of the stem
    image_size: int = 32,  # side in pixels; the number of positions follows from it
    activation: str = "gelu",  # of the feed-forwards, a name in ACTIVATIONS
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    act, side = ACTIVATIONS[activation], ((image_size + 1) // 2 - 2) // 2 + 1  # of the stem's map
    stem = nn.Conv2d(in_channels, stem_width, 7, stride=2, padding=4)
    linear = nn.Linear(stem_width * patch * patch, dim)
    embed: dict[str, nn.Module] = {
        "conv": nn.Sequential(stem, nn.BatchNorm2d(stem_width), nn.MaxPool2d(3, 2)),
        "to_patch_embedding": nn.Sequential(Patches(patch), linear),
    }
    blocks = [Block(dim, heads, act) for _ in range(depth)]
    head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))
    transformer = named(layers=nn.Sequential(*blocks))
    body = {"transformer": transformer, "mlp_head": head}
    positions = torch.randn(1, (side // patch) ** 2 + 1, dim)
    return WithClassToken(embed, body, pos_embedding=positions, cls_token=torch.randn(1, 1, dim))


class Block(nn.ModuleList):
    """Attention over all tokens, then the feed-forward over all but the class token."""

    def __init__(self, dim: int, heads: int, act: type[nn.Module]) -> None:
        inner = 64 * heads
        qkv, out = nn.Linear(dim, 3 * inner, bias=False), nn.Linear(inner, dim)
        attention = SelfAttention(heads, to_qkv=qkv, to_out=nn.Sequential(out))
        parts = (attention, feed_forward(dim, act))
        layers = (named(norm=nn.LayerNorm(dim), fn=part) for part in parts)
        super().__init__(Residual(fn=layer) for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self[0](x)
        return torch.cat([x[:, :1], self[1](x[:, 1:])], 1)


def feed_forward(dim: int, act: type[nn.Module]) -> nn.Module:
    """Build linear, depthwise 3x3, linear; after each, batch norm and activation."""
    wide = 4 * dim
    # The places in between are those where the public code moves axes.
    up = nn.Sequential(nn.Linear(dim, wide), nn.Identity(), TokenNorm(wide), act())
    conv = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
    depthwise = nn.Sequential(conv, nn.BatchNorm2d(wide), act())
    down = nn.Sequential(nn.Linear(wide, dim), nn.Identity(), TokenNorm(dim), act())
    return named(up_proj=up, square=Square(), depth_conv=depthwise, tokens=Tokens(), down_proj=down)
