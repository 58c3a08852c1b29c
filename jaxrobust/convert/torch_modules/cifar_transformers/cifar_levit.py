"""LeViT-128S in PyTorch: attention with batch norms, whose map shrinks from stage to stage.

Source: Graham et al. 2021 (arXiv 2104.01136), with the names of facebookresearch/LeViT and one
classifier. Parity: tests/models/cifar/test_hybrids.py.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import ACTIVATIONS


def model(
    dims: tuple[int, ...] = (128, 256, 384),
    depths: tuple[int, ...] = (2, 3, 4),
    heads: tuple[int, ...] = (4, 6, 8),
    key_width: int = 16,
    stem_strides: tuple[int, ...] = (2, 2, 1, 1),
    image_size: int = 32,
    activation: str = "hard_swish",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Return the network of one row.

    Args:
      dims, depths, heads: of the stages.
      key_width: of each head's queries and keys; values have twice as many channels.
      stem_strides: of the stem's four convolutions.
      activation: everywhere, a name in ACTIVATIONS.
      image_size: side in pixels; the position biases depend on it.
    """
    widths = [in_channels, *(dims[0] // 2**i for i in (3, 2, 1, 0))]
    stem, side, act = [], image_size, ACTIVATIONS[activation]
    for ins, outs, stride in zip(widths, widths[1:], stem_strides, strict=False):
        convolution = nn.Conv2d(ins, outs, 3, stride, 1, bias=False)
        stem += [normed(convolution, nn.BatchNorm2d(outs)), act()]
        side = -(-side // stride)
    blocks: list[nn.Module] = []
    for i, (dim, depth, number) in enumerate(zip(dims, depths, heads, strict=True)):
        if i:
            shrunk = dims[i - 1], dim, dims[i - 1] // key_width, key_width
            blocks += [Attention(*shrunk, side, 2, act()), Residual(mlp(dim, act()))]
            side = -(-side // 2)
        for _ in range(depth):
            attention = Attention(dim, dim, number, key_width, side, 1, act())
            blocks += [Residual(attention), Residual(mlp(dim, act()))]
    return LeViT(stem[:-1], blocks, dims[-1], num_classes)


class LeViT(nn.Module):
    """Stem, blocks over the tokens, mean, batch norm, linear."""

    def __init__(
        self, stem: list[nn.Module], blocks: list[nn.Module], dim: int, num_classes: int
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(*stem)
        self.blocks = nn.Sequential(*blocks)
        head = {"bn": nn.BatchNorm1d(dim), "l": nn.Linear(dim, num_classes)}
        self.head = nn.Sequential(OrderedDict(head))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).mT
        return self.head(self.blocks(x).mean(1))


def normed(layer: nn.Module, norm: nn.Module) -> nn.Sequential:
    """Return a layer and its norm under the names of the public code."""
    return nn.Sequential(OrderedDict(c=layer, bn=norm))


class LinearNorm(nn.Module):
    """Linear map of [B, N, D] without a bias, batch norm over images and tokens."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.c, self.bn = nn.Linear(ins, outs, bias=False), nn.BatchNorm1d(outs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x).mT).mT


def mlp(dim: int, act: nn.Module) -> nn.Module:
    """Return linear maps to twice the width and back, each with its norm."""
    return nn.Sequential(LinearNorm(dim, 2 * dim), act, LinearNorm(2 * dim, dim))


class Residual(nn.Module):
    """x + m(x)."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)


class EverySecond(nn.Module):
    """Every second pixel of every second row of [B, N, D]."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.side, self.side))[:, ::2, ::2].flatten(1, 2)


class Attention(nn.Module):
    """Attention with a bias for each distance, activation, linear map; stride 2 shrinks the map."""

    attention_bias_idxs: Tensor

    def __init__(
        self,
        ins: int,
        outs: int,
        heads: int,
        width: int,
        side: int,
        stride: int,
        act: nn.Module,
    ) -> None:
        super().__init__()
        keys, values = heads * width, heads * width * 2 * stride
        self.heads, self.width = heads, width
        self.attention_biases = nn.Parameter(torch.zeros(heads, side * side))
        at = torch.arange(side)
        apart = (at[::stride, None] - at[None]).abs()  # of queries and keys along an axis
        index = apart[:, None, :, None] * side + apart[None, :, None, :]
        self.register_buffer("attention_bias_idxs", index.flatten(2).flatten(0, 1))
        if stride == 1:
            self.qkv = LinearNorm(ins, 2 * keys + values)
        else:
            self.kv = LinearNorm(ins, keys + values)
            self.q = nn.Sequential(EverySecond(side), LinearNorm(ins, keys))
        self.proj = nn.Sequential(act, LinearNorm(values, outs))
        self.shrinks = stride > 1

    def forward(self, x: Tensor) -> Tensor:
        together = self.kv(x) if self.shrinks else self.qkv(x)
        together = together.unflatten(2, (self.heads, -1)).transpose(1, 2)
        if self.shrinks:
            q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        else:
            q, together = together[..., : self.width], together[..., self.width :]
        k, v = together[..., : self.width], together[..., self.width :]
        logits = q @ k.mT * self.width**-0.5 + self.attention_biases[:, self.attention_bias_idxs]
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
