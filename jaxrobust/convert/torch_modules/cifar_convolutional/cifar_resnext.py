"""ResNeXt in PyTorch, at 32 and at 224 pixels.

Sources: Xie et al. 2017 (arXiv 1611.05431); names and the small stem as in kuangliu/pytorch-cifar
(49b7aa9). Parity:
tests/models/cifar/test_convolutional.py.
"""

from torch import nn

from jaxrobust.convert.torch_modules.layers import ACTIVATIONS, Mean, bottleneck, conv, named


def model(
    depths: tuple[int, ...] = (3, 3, 3),
    groups: int = 2,
    width: int = 64,
    small_stem: bool = True,
    activation: str = "relu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Build the network of one row.

    Args:
      depths: blocks of each stage.
      groups: of the 3x3 convolutions.
      width: channels of a group in the first stage; they double with each stage.
      small_stem: for 32 px, a 1x1 convolution; else 7x7, stride 2, and pooling.
      activation: relu, gelu, silu or softplus.
    """
    act, ins, inner = ACTIVATIONS[activation], 64, groups * width
    stem = conv(in_channels, ins, *((1,) if small_stem else (7, 2)))
    parts: dict[str, nn.Module] = {"conv1": stem, "bn1": nn.BatchNorm2d(ins), "act": act()}
    if not small_stem:
        parts["pool"] = nn.MaxPool2d(3, 2, 1)
    for number, depth in enumerate(depths, 1):
        blocks = []
        for place in range(depth):
            outs, stride = 2 * inner, 2 if number > 1 and place == 0 else 1
            shortcut = nn.Sequential()
            if stride != 1 or ins != outs:
                shortcut = nn.Sequential(conv(ins, outs, 1, stride), nn.BatchNorm2d(outs))
            middle = conv(inner, inner, 3, stride, groups)
            blocks.append(bottleneck(ins, inner, outs, middle, shortcut, act))
            ins = outs
        parts[f"layer{number}"] = nn.Sequential(*blocks)
        inner = 2 * inner
    return named(**parts, mean=Mean(), linear=nn.Linear(ins, num_classes))
