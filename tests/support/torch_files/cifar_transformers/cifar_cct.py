"""Compact convolutional transformer (CCT) in PyTorch.

Source: Hassani et al. 2021 (arXiv 2104.05704), with the names of SHI-Labs/Compact-Transformers.
"""

import torch
from torch import Tensor, nn

from tests.support.torch_files.layers import ACTIVATIONS, SelfAttention, Tokens, named


def model(
    dim: int = 256,  # width; `hidden` is that inside the MLPs
    depth: int = 7,
    heads: int = 4,
    hidden: int = 512,
    convolutions: int = 1,  # of the tokenizer; all but the last one have 64 channels
    kernel: int = 3,  # their windows, and the stride of each, which a maximum doubles
    stride: int = 1,
    activation: str = "gelu",
    image_size: int = 32,  # side in pixels; the number of positions follows from it
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    layers, side, ins = [], image_size, in_channels
    for outs in (*(64,) * (convolutions - 1), dim):
        conv = nn.Conv2d(ins, outs, kernel, stride, kernel // 2, bias=False)
        layers.append(nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(3, 2, 1)))
        side = (side + 2 * (kernel // 2) - kernel) // stride + 1
        side, ins = (side + 2 - 3) // 2 + 1, outs
    tokenizer = named(conv_layers=nn.Sequential(*layers), tokens=Tokens())
    blocks = [Block(dim, heads, hidden, ACTIVATIONS[activation]()) for _ in range(depth)]
    return named(tokenizer=tokenizer, classifier=Classifier(blocks, dim, side**2, num_classes))


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
        qkv, proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.pre_norm = nn.LayerNorm(dim)
        self.self_attn = SelfAttention(heads, dropout=0.1, qkv=qkv, proj=proj)
        self.linear1, self.norm1 = nn.Linear(dim, hidden), nn.LayerNorm(dim)
        self.linear2, self.act = nn.Linear(hidden, dim), act

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x + self.self_attn(self.pre_norm(x)))
        return y + self.linear2(self.act(self.linear1(y)))
