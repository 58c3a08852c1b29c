"""Wide residual networks with biased convolutions in PyTorch, such as WRN-40-10.

Sources: Zagoruyko & Komodakis 2016 (arXiv 1605.07146); names, and where stride and shortcut are, as
in meliketoy/wide-resnet.pytorch (292b3ed).
"""

import math

from torch import nn

from tests.support.torch_files.layers import ACTIVATIONS, Mean, Residual, conv, named, stages


def model(
    depths: tuple[int, ...],  # blocks of each stage
    width: int,  # 16, 32, 64 times it are the channels of the stages
    activation: str = "relu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    act, outs = ACTIVATIONS[activation], [16 * width << i for i in range(len(depths))]
    blocks = stages(16, outs, depths, lambda ins, i, stride: block(ins, outs[i], stride, act))
    last = {"bn1": nn.BatchNorm2d(outs[-1], momentum=0.9), "act": act(), "mean": Mean()}
    linear = nn.Linear(outs[-1], num_classes)
    net = named(conv1=conv(in_channels, 16, bias=True), **blocks, **last, linear=linear)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(2))
            nn.init.zeros_(layer.bias)
    return net


def block(ins: int, outs: int, stride: int, act: type[nn.Module]) -> nn.Module:
    """Build two convolutions after norm and activation each; the second one has the stride."""
    layers = {"bn1": nn.BatchNorm2d(ins), "act1": act(), "conv1": conv(ins, outs, bias=True)}
    layers |= {"dropout": nn.Dropout(0.3), "bn2": nn.BatchNorm2d(outs), "act2": act()}
    layers["conv2"] = conv(outs, outs, 3, stride, bias=True)
    if stride != 1 or ins != outs:
        layers["shortcut"] = nn.Sequential(conv(ins, outs, 1, stride, bias=True))
    return Residual(**layers)
