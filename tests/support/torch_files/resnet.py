"""ResNet, wide ResNet and ResNet with GELU in PyTorch.

Sources: He et al. 2016 (arXiv 1512.03385); Zagoruyko & Komodakis 2016 (arXiv 1605.07146); GELU:
Bai et al. 2021 (arXiv 2111.05464).
"""

from torch import nn

from tests.support.torch_files.layers import (
    ACTIVATIONS,
    Residual,
    conv,
    narrow,
    project,
    residual_net,
)


def model(
    depths: tuple[int, ...],  # blocks of each of the four stages
    bottleneck: bool = True,  # blocks of 1x1, 3x3, 1x1 convolutions, else of two 3x3
    width: int = 64,  # inner channels of the first stage's blocks; they double with each stage
    base: int = 64,  # channels of the stem; the first stage returns as many, of bottlenecks 4 times
    activation: str = "relu",
    small_stem: bool = False,  # 3x3, stride 1, for 32 px; else 7x7, stride 2, and pooling
    in_channels: int = 3,
    num_classes: int = 1000,
) -> nn.Module:
    act, kernel = ACTIVATIONS[activation], 3 if small_stem else 7
    outs = [(4 if bottleneck else 1) * base << i for i in range(len(depths))]

    def block(ins: int, i: int, stride: int) -> nn.Module:
        inner = width << i
        if bottleneck:
            middle = conv(inner, inner, 3, stride)
            return narrow((ins, inner, outs[i]), stride, act, middle, "downsample")
        layers = {"conv1": conv(ins, inner, 3, stride), "bn1": nn.BatchNorm2d(inner), "act": act()}
        layers |= {"conv2": conv(inner, outs[i]), "bn2": nn.BatchNorm2d(outs[i])}
        return Residual(**layers, downsample=project(ins, outs[i], stride), last=act())

    fc = nn.Linear(outs[-1], num_classes)
    return residual_net(in_channels, base, kernel, act, outs, depths, block, fc=fc)
