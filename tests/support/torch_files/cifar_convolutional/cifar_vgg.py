"""VGG-16 with batch norm in PyTorch, at 32 and at 224 pixels.

Sources: Simonyan & Zisserman 2015 (arXiv 1409.1556); names: kuangliu/pytorch-cifar (49b7aa9).
"""

from torch import nn

from tests.support.torch_files.layers import ACTIVATIONS, conv, named


def model(
    widths: tuple[int, ...] = (64, 128, 256, 512, 512),  # of 2, 2, 3, 3, 3 convolutions
    hidden: tuple[int, ...] = (),  # units of linear maps before the last one
    pool: int = 1,  # side of the map that the linear maps read
    activation: str = "relu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    act, ins = ACTIVATIONS[activation], in_channels
    layers: list[nn.Module] = []
    for width, depth in zip(widths, (2, 2, 3, 3, 3), strict=False):
        for _ in range(depth):
            layers += [conv(ins, width, bias=True), nn.BatchNorm2d(width), act()]
            ins = width
        layers.append(nn.MaxPool2d(2))
    maps: list[nn.Module] = []
    ins = ins * pool * pool
    for width in hidden:
        maps += [nn.Linear(ins, width), act(), nn.Dropout()]
        ins = width
    last = nn.Linear(ins, num_classes)
    classifier = nn.Sequential(*maps, last) if maps else last
    features, average = nn.Sequential(*layers), nn.AdaptiveAvgPool2d(pool)
    return named(features=features, pool=average, flat=nn.Flatten(), classifier=classifier)
