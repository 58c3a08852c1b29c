"""Wide residual networks with biased convolutions in PyTorch, such as WRN-40-10.

Sources: Zagoruyko & Komodakis 2016 (arXiv 1605.07146); names, and where stride and shortcut are, as
in meliketoy/wide-resnet.pytorch (292b3ed). Parity:
tests/models/cifar/test_convolutional.py.
"""

import math

from torch import nn

from jaxrobust.convert.torch_modules.layers import ACTIVATIONS, Mean, Residual, conv, named


def model(
    depths: tuple[int, ...],
    width: int,
    activation: str = "relu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Build the network of one row.

    Args:
      depths: blocks of each stage.
      width: 16, 32, 64 times it are the channels of the stages.
      activation: relu, gelu, silu or softplus.
    """
    act, ins = ACTIVATIONS[activation], 16
    parts: dict[str, nn.Module] = {"conv1": conv(in_channels, ins, bias=True)}
    for i, depth in enumerate(depths):
        outs = 16 * 2**i * width
        first = block(ins, outs, 2 if i else 1, act)
        rest = [block(outs, outs, 1, act) for _ in range(depth - 1)]
        parts[f"layer{i + 1}"] = nn.Sequential(first, *rest)
        ins = outs
    parts |= {"bn1": nn.BatchNorm2d(ins, momentum=0.9), "act": act(), "mean": Mean()}
    net = named(**parts, linear=nn.Linear(ins, num_classes))
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(2))
            nn.init.zeros_(layer.bias)
    return net


def block(ins: int, outs: int, stride: int, act: type[nn.Module]) -> nn.Module:
    """Build two convolutions behind norm and activation each; the second one has the stride."""
    layers = {"bn1": nn.BatchNorm2d(ins), "act1": act(), "conv1": conv(ins, outs, bias=True)}
    layers |= {"dropout": nn.Dropout(0.3), "bn2": nn.BatchNorm2d(outs), "act2": act()}
    layers["conv2"] = conv(outs, outs, 3, stride, bias=True)
    if stride != 1 or ins != outs:
        layers["shortcut"] = nn.Sequential(conv(ins, outs, 1, stride, bias=True))
    return Residual(**layers)
