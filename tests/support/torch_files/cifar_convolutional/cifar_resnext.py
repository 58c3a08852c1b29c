"""ResNeXt in PyTorch, at 32 and at 224 pixels.

Sources: Xie et al. 2017 (arXiv 1611.05431); names and small stem: kuangliu/pytorch-cifar (49b7aa9).
"""

from torch import nn

from tests.support.torch_files.layers import ACTIVATIONS, conv, narrow, residual_net


def model(
    depths: tuple[int, ...] = (3, 3, 3),  # blocks of each stage
    groups: int = 2,  # of the 3x3 convolutions
    width: int = 64,  # channels of a group in the first stage; they double with each stage
    small_stem: bool = True,  # for 32 px, a 1x1 convolution; else 7x7, stride 2, and pooling
    activation: str = "relu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    act, base = ACTIVATIONS[activation], groups * width
    outs = [2 * base << i for i in range(len(depths))]

    def block(ins: int, i: int, stride: int) -> nn.Module:
        inner = base << i
        middle = conv(inner, inner, 3, stride, groups)
        return narrow((ins, inner, 2 * inner), stride, act, middle)

    linear, kernel = nn.Linear(outs[-1], num_classes), 1 if small_stem else 7
    return residual_net(in_channels, 64, kernel, act, outs, depths, block, linear=linear)
