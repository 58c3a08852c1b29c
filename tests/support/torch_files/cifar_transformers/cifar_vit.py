"""Vision transformer for 32 px in PyTorch: logits scaled by all heads' width, an MLP as head.

Source: Dosovitskiy et al. 2021 (arXiv 2010.11929); names: kentaroy47/vision-transformers-cifar10.
"""

import torch
from torch import nn

from tests.support.torch_files.layers import (
    ACTIVATIONS,
    Patches,
    WithClassToken,
    named,
    vit_block,
)


def model(
    patch: int = 4,  # side of the patches in pixels
    dim: int = 512,  # width
    depth: int = 6,
    heads: int = 8,
    hidden: int = 512,  # width inside the MLPs and inside the head
    activation: str = "gelu",
    image_size: int = 32,  # side in pixels; the number of positions follows from it
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    act, count = ACTIVATIONS[activation], (image_size // patch) ** 2 + 1
    blocks = [vit_block(dim, heads, hidden, act, dim**-0.5) for _ in range(depth)]
    linear = nn.Linear(patch**2 * in_channels, dim)
    embed = {"patches": Patches(patch), "patch_to_embedding": linear}
    head = [nn.LayerNorm(dim), nn.Linear(dim, hidden), act(), nn.Dropout(0.1)]
    body: dict[str, nn.Module] = {
        "dropout": nn.Dropout(0.1),
        "transformer": named(layers=nn.Sequential(*blocks)),
        "mlp_head": nn.Sequential(*head, nn.Linear(hidden, num_classes)),
    }
    positions, token = torch.randn(1, count, dim), torch.randn(1, 1, dim)
    return WithClassToken(embed, body, pos_embedding=positions, cls_token=token)
