"""Compact convolutional transformer (CCT) in PyTorch.

Source: Hassani et al. 2021 (arXiv 2104.05704), with the names of SHI-Labs/Compact-Transformers.
Parity: tests/models/cifar/test_cct.py.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import ACTIVATIONS


def model(
    dim: int = 256,
    depth: int = 7,
    heads: int = 4,
    hidden: int = 512,
    convolutions: int = 1,
    kernel: int = 3,
    stride: int = 1,
    activation: str = "gelu",
    image_size: int = 32,
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Return the network of one row.

    Args:
      dim, depth, heads, hidden: width, number of blocks, attention heads, width inside the MLPs.
      convolutions: of the tokeniser; all but the last one have 64 channels.
      kernel, stride: their windows, and the stride of each, which a maximum doubles.
      activation: relu, silu, softplus or gelu.
      image_size: side in pixels; the number of positions follows from it.
    """
    widths = (in_channels, *(64,) * (convolutions - 1), dim)
    tokenizer = Tokenizer(widths, kernel, stride)
    side = image_size
    for _ in range(convolutions):
        side = (side + 2 * (kernel // 2) - kernel) // stride + 1
        side = (side + 2 - 3) // 2 + 1
    blocks = [Block(dim, heads, hidden, ACTIVATIONS[activation]()) for _ in range(depth)]
    return CCT(tokenizer, Classifier(blocks, dim, side**2, num_classes))


class CCT(nn.Module):
    """Tokeniser and transformer."""

    def __init__(self, tokenizer: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.tokenizer, self.classifier = tokenizer, classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.tokenizer(images))


class Tokenizer(nn.Module):
    """Convolution, ReLU, maximum over 3x3 with stride 2, as often as there are widths."""

    def __init__(self, widths: tuple[int, ...], kernel: int, stride: int) -> None:
        super().__init__()
        layers = []
        for ins, outs in pairwise(widths):
            conv = nn.Conv2d(ins, outs, kernel, stride, kernel // 2, bias=False)
            layers.append(nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(3, 2, 1)))
        self.conv_layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv_layers(images).flatten(2).transpose(1, 2)


class Classifier(nn.Module):
    """Positions, blocks, layer norm, a weighted mean of the tokens, linear."""

    def __init__(self, blocks: list, dim: int, positions: int, num_classes: int) -> None:
        super().__init__()
        self.positional_emb = nn.Parameter(0.2 * torch.randn(1, positions, dim))
        self.attention_pool = nn.Linear(dim, 1)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.blocks(x + self.positional_emb))
        weights = self.attention_pool(x).softmax(1)
        return self.fc((weights * x).sum(1))


class Block(nn.Module):
    """x + attention(LN(x)); then, of its norm y, y + MLP(y)."""

    def __init__(self, dim: int, heads: int, hidden: int, act: nn.Module) -> None:
        super().__init__()
        self.pre_norm, self.self_attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.linear1, self.norm1 = nn.Linear(dim, hidden), nn.LayerNorm(dim)
        self.linear2, self.act = nn.Linear(hidden, dim), act

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x + self.self_attn(self.pre_norm(x)))
        return y + self.linear2(self.act(self.linear1(y)))


class Attention(nn.Module):
    """Softmax attention of all tokens to all, scaled by the root of the head's width."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.dropout = nn.Dropout(0.1)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        # [B, N, 3 D] -> three of [B, heads, N, D / heads]
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((self.dropout(weights) @ v).transpose(1, 2).flatten(2))
