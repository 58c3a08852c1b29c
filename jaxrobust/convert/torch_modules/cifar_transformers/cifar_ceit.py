"""CeiT-T in PyTorch: a convolutional stem, and feed-forwards that convolve the patches.

Source: Yuan et al. 2021 (arXiv 2103.11816), with the names of rishikksh20/CeiT-pytorch. Parity:
tests/models/cifar/test_hybrids.py.
"""

import math

import torch
from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import ACTIVATIONS


def model(
    dim: int = 192,
    depth: int = 12,
    heads: int = 3,
    patch: int = 4,
    stem_width: int = 32,
    image_size: int = 32,
    activation: str = "gelu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Return the network of one row.

    Args:
      dim, depth, heads: width, number of blocks, attention heads of 64 channels.
      patch: side of the patches of the stem's map, which has a quarter of the image's side.
      stem_width: channels of the stem.
      activation: of the feed-forwards, a name in ACTIVATIONS.
      image_size: side in pixels; the number of positions follows from it.
    """
    transformer = Transformer(dim, depth, heads, ACTIVATIONS[activation]())
    return CeiT(transformer, dim, patch, stem_width, image_size, in_channels, num_classes)


class CeiT(nn.Module):
    """Stem, patches with positions behind the class token, blocks, linear on the class token."""

    def __init__(
        self,
        transformer: nn.Module,
        dim: int,
        patch: int,
        width: int,
        image_size: int,
        ins: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        side = ((image_size + 1) // 2 - 2) // 2 + 1  # of the map, behind convolution and pooling
        tokens = (side // patch) ** 2
        self.pos_embedding = nn.Parameter(torch.randn(1, tokens + 1, dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        stem = nn.Conv2d(ins, width, 7, stride=2, padding=4)
        self.conv = nn.Sequential(stem, nn.BatchNorm2d(width), nn.MaxPool2d(3, 2))
        linear = nn.Linear(width * patch * patch, dim)
        self.to_patch_embedding = nn.Sequential(Patches(patch), linear)
        self.transformer = transformer
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        x = self.to_patch_embedding(self.conv(images))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embedding
        return self.mlp_head(self.transformer(x)[:, 0])


class Patches(nn.Module):
    """[B, C, H, W] -> [B, N, patch * patch * C], the channels of a pixel side by side."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(3, (-1, self.side)).unflatten(2, (-1, self.side))
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class Transformer(nn.Module):
    """Attention over all tokens, then the feed-forward over all but the class token."""

    def __init__(self, dim: int, depth: int, heads: int, act: nn.Module) -> None:
        super().__init__()
        both = (lambda: Attention(dim, heads), lambda: FeedForward(dim, act))
        layers = [[Residual(dim, make()) for make in both] for _ in range(depth)]
        self.layers = nn.ModuleList(map(nn.ModuleList, layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            attend, feed = layer.children()
            x = attend(x)
            x = torch.cat([x[:, :1], feed(x[:, 1:])], 1)
        return x


class Residual(nn.Module):
    """x + f(LN(x))."""

    def __init__(self, dim: int, function: nn.Module) -> None:
        super().__init__()
        self.fn = nn.ModuleDict({"norm": nn.LayerNorm(dim), "fn": function})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn["fn"](self.fn["norm"](x))


class Attention(nn.Module):
    """Softmax attention of all tokens to all; the map to queries, keys and values has no bias."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * 64 * heads, bias=False)
        self.to_out = nn.Sequential(nn.Linear(64 * heads, dim))

    def forward(self, x: Tensor) -> Tensor:
        # [B, N, 3 h 64] -> three of [B, h, N, 64]
        q, k, v = self.to_qkv(x).unflatten(2, (3, self.heads, 64)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Linear to four times the width, depthwise 3x3, linear back: each with BN and activation."""

    def __init__(self, dim: int, act: nn.Module) -> None:
        super().__init__()
        wide, self.act = 4 * dim, act
        # The places in between are those where the public code moves axes.
        self.up_proj = nn.ModuleDict({"0": nn.Linear(dim, wide), "2": nn.BatchNorm1d(wide)})
        conv = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.depth_conv = nn.Sequential(conv, nn.BatchNorm2d(wide), act)
        self.down_proj = nn.ModuleDict({"0": nn.Linear(wide, dim), "2": nn.BatchNorm1d(dim)})

    def forward(self, x: Tensor) -> Tensor:
        side = math.isqrt(x.shape[1])
        x = self.act(self.up_proj["2"](self.up_proj["0"](x).mT))
        x = self.depth_conv(x.unflatten(2, (side, side))).flatten(2).mT
        return self.act(self.down_proj["2"](self.down_proj["0"](x).mT)).mT
