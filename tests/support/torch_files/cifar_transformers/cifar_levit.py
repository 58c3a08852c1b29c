"""LeViT-128S in PyTorch: attention with batch norms, whose map shrinks from stage to stage.

Source: Graham et al. 2021 (arXiv 2104.01136); names: facebookresearch/LeViT and one classifier.
"""

import torch
from torch import Tensor, nn

from tests.support.torch_files.layers import (
    ACTIVATIONS,
    Mean,
    Residual,
    TokenNorm,
    Tokens,
    attend,
    conv,
    named,
    split,
)


def model(
    dims: tuple[int, ...] = (128, 256, 384),  # of the stages
    depths: tuple[int, ...] = (2, 3, 4),
    heads: tuple[int, ...] = (4, 6, 8),
    key_width: int = 16,  # of each head's queries and keys; values have twice as many channels
    stem_strides: tuple[int, ...] = (2, 2, 1, 1),  # of the stem's four convolutions
    image_size: int = 32,  # side in pixels; the position biases depend on it
    activation: str = "hard_swish",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    widths = [in_channels, *(dims[0] // 2**i for i in (3, 2, 1, 0))]
    stem, side, act = [], image_size, ACTIVATIONS[activation]
    for ins, outs, stride in zip(widths, widths[1:], stem_strides, strict=False):
        stem += [named(c=conv(ins, outs, 3, stride), bn=nn.BatchNorm2d(outs)), act()]
        side = -(-side // stride)
    blocks: list[nn.Module] = []
    for i, (dim, depth, number) in enumerate(zip(dims, depths, heads, strict=True)):
        if i:
            shrunk = dims[i - 1], dim, dims[i - 1] // key_width, key_width
            blocks += [Attention(*shrunk, side, 2, act()), feed_forward(dim, act())]
            side = -(-side // 2)
        for _ in range(depth):
            attention = Attention(dim, dim, number, key_width, side, 1, act())
            blocks += [Residual(m=attention), feed_forward(dim, act())]
    parts = {"patch_embed": nn.Sequential(*stem[:-1]), "tokens": Tokens()}
    parts |= {"blocks": nn.Sequential(*blocks), "mean": Mean(1)}
    head = named(bn=nn.BatchNorm1d(dims[-1]), l=nn.Linear(dims[-1], num_classes))
    return named(**parts, head=head)


def normed(ins: int, outs: int) -> nn.Module:
    """Build a linear map of [B, N, D] without a bias, with batch norm over images and tokens."""
    return named(c=nn.Linear(ins, outs, bias=False), bn=TokenNorm(outs))


def feed_forward(dim: int, act: nn.Module) -> nn.Module:
    """Build x + linear maps to twice the width and back, each with its norm."""
    return Residual(m=nn.Sequential(normed(dim, 2 * dim), act, normed(2 * dim, dim)))


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
        self, ins: int, outs: int, heads: int, width: int, side: int, stride: int, act: nn.Module
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
            self.qkv = normed(ins, 2 * keys + values)
        else:
            self.kv = normed(ins, keys + values)
            self.q = nn.Sequential(EverySecond(side), normed(ins, keys))
        self.proj = nn.Sequential(act, normed(values, outs))
        self.shrinks = stride > 1

    def forward(self, x: Tensor) -> Tensor:
        if self.shrinks:
            (q,), (kv,) = split(self.q(x), 1, self.heads), split(self.kv(x), 1, self.heads)
        else:
            q, kv = split(self.qkv(x), 1, self.heads)[0].tensor_split([self.width], -1)
        k, v = kv.tensor_split([self.width], -1)
        bias = self.attention_biases[:, self.attention_bias_idxs]
        return self.proj(attend(q, k, v, bias))
