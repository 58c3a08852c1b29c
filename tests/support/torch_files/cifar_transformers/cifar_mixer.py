"""MLP-Mixer in PyTorch, with a class token or without.

Source: Tolstikhin et al. 2021 (arXiv 2105.01601), with the names of omihub777/MLP-Mixer-CIFAR.
"""

import torch
from torch import nn

from tests.support.torch_files.layers import (
    ACTIVATIONS,
    Mean,
    Residual,
    Tokens,
    WithClassToken,
    named,
)


def model(
    patch: int = 4,  # side of the patches in pixels
    dim: int = 128,  # width
    depth: int = 8,
    token_hidden: int = 512,  # width inside the MLPs over tokens and over channels
    hidden: int = 64,
    class_token: bool = True,  # what the head reads; else it reads the mean of the patches
    activation: str = "gelu",
    image_size: int = 32,  # side in pixels; the number of tokens follows from it
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    tokens, act = (image_size // patch) ** 2 + class_token, ACTIVATIONS[activation]
    blocks = []
    for _ in range(depth):  # a convolution with one tap mixes the tokens of [B, N, D]
        first, last = nn.Conv1d(tokens, token_hidden, 1), nn.Conv1d(token_hidden, tokens, 1)
        mlp1 = Residual(ln=nn.LayerNorm(dim), fc1=first, act=act(), fc2=last)
        maps = {"fc1": nn.Linear(dim, hidden), "act": act(), "fc2": nn.Linear(hidden, dim)}
        blocks.append(named(mlp1=mlp1, mlp2=Residual(ln=nn.LayerNorm(dim), **maps)))
    stem = nn.Conv2d(in_channels, dim, patch, stride=patch)
    embed: dict[str, nn.Module] = {"patch_emb": nn.Sequential(stem), "tokens": Tokens()}
    body = {"mixer_layers": nn.Sequential(*blocks), "ln": nn.LayerNorm(dim)}
    head = nn.Linear(dim, num_classes)
    if class_token:
        return WithClassToken(embed, body | {"clf": head}, cls_token=torch.randn(1, 1, dim))
    return named(**embed, **body, mean=Mean(1), clf=head)
