"""MLP-Mixer in PyTorch, with a class token or without.

Source: Tolstikhin et al. 2021 (arXiv 2105.01601), with the names of omihub777/MLP-Mixer-CIFAR.
Parity: tests/models/cifar/test_mixer.py.
"""

import torch
from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import ACTIVATIONS


def model(
    patch: int = 4,
    dim: int = 128,
    depth: int = 8,
    token_hidden: int = 512,
    hidden: int = 64,
    class_token: bool = True,
    activation: str = "gelu",
    image_size: int = 32,
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Return the network of one row.

    Args:
      patch: side of the patches in pixels.
      dim, depth: width, number of blocks.
      token_hidden, hidden: width inside the MLPs over tokens and over channels.
      class_token: what the head reads; else it reads the mean of the patches.
      activation: relu, silu, softplus or gelu.
      image_size: side in pixels; the number of tokens follows from it.
    """
    tokens = (image_size // patch) ** 2 + class_token
    act = ACTIVATIONS[activation]
    stem = nn.Conv2d(in_channels, dim, patch, stride=patch)
    blocks = [Block(tokens, dim, token_hidden, hidden, act) for _ in range(depth)]
    return Mixer(stem, blocks, dim, class_token, num_classes)


class Mixer(nn.Module):
    """Patches, blocks, layer norm, linear on the class token or on the mean."""

    def __init__(
        self, stem: nn.Module, blocks: list, dim: int, class_token: bool, num_classes: int
    ) -> None:
        super().__init__()
        self.patch_emb = nn.Sequential(stem)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim)) if class_token else None
        self.mixer_layers = nn.Sequential(*blocks)
        self.ln = nn.LayerNorm(dim)
        self.clf = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_emb(images).flatten(2).transpose(1, 2)
        if self.cls_token is None:
            return self.clf(self.ln(self.mixer_layers(x)).mean(1))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return self.clf(self.ln(self.mixer_layers(x))[:, 0])


class Block(nn.Module):
    """The MLP over tokens, then the MLP over channels."""

    def __init__(self, tokens: int, dim: int, token_hidden: int, hidden: int, act: type) -> None:
        super().__init__()
        over_tokens = nn.Conv1d(tokens, token_hidden, 1), nn.Conv1d(token_hidden, tokens, 1)
        self.mlp1 = Mlp(dim, *over_tokens, act())
        self.mlp2 = Mlp(dim, nn.Linear(dim, hidden), nn.Linear(hidden, dim), act())

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp2(self.mlp1(x))


class Mlp(nn.Module):
    """x + fc2(activation(fc1(LN(x)))); a Conv1d with one tap mixes the tokens of [B, N, D]."""

    def __init__(self, dim: int, fc1: nn.Module, fc2: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.ln, self.fc1, self.fc2, self.act = nn.LayerNorm(dim), fc1, fc2, act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(self.ln(x))))
