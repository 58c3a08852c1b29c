"""DenseNet-BC in PyTorch, at 32 and at 224 pixels.

Sources: Huang et al. 2017 (arXiv 1608.06993); names, and the order of channels, as in
kuangliu/pytorch-cifar (49b7aa9).
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from tests.support.torch_files.layers import ACTIVATIONS, Mean, conv, named


def model(
    depths: tuple[int, ...] = (16, 16, 16, 16),  # layers of each stage
    growth: int = 12,  # channels that each layer adds
    stem: int = 24,  # channels of the first convolution
    small_stem: bool = True,  # for 32 px, a 3x3 convolution; else 7x7, stride 2, norm and pooling
    activation: str = "relu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    act, channels, wide = ACTIVATIONS[activation], stem, 4 * growth
    parts: dict[str, nn.Module] = {"conv1": conv(in_channels, stem)}
    if not small_stem:
        parts = {"conv1": conv(in_channels, stem, 7, 2), "bn1": nn.BatchNorm2d(stem)}
        parts |= {"act1": act(), "pool": nn.MaxPool2d(3, 2, 1)}
    for number, depth in enumerate(depths, 1):
        if number > 1:
            half = {"bn": nn.BatchNorm2d(channels), "act": act()}
            half |= {"conv": conv(channels, channels // 2, 1), "pool": nn.AvgPool2d(2)}
            parts[f"trans{number - 1}"] = named(**half)
            channels = channels // 2
        layers = []
        for _ in range(depth):
            layer = {"bn1": nn.BatchNorm2d(channels), "act1": act()}
            layer |= {"conv1": conv(channels, wide, 1), "bn2": nn.BatchNorm2d(wide), "act2": act()}
            layer["conv2"] = conv(wide, growth)
            layers.append(InFront(OrderedDict(layer)))
            channels += growth
        parts[f"dense{number}"] = nn.Sequential(*layers)
    linear = nn.Linear(channels, num_classes)
    return named(**parts, bn=nn.BatchNorm2d(channels), act=act(), mean=Mean(), linear=linear)


class InFront(nn.Sequential):
    """New channels in front of those that are there."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x), x], 1)
