"""VGG-16 with batch norm in PyTorch, at 32 and at 224 pixels.

Sources: Simonyan & Zisserman 2015 (arXiv 1409.1556); its names are those of kuangliu/pytorch-cifar
(49b7aa9). Parity:
tests/models/cifar/test_convolutional.py.
"""

from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import ACTIVATIONS


def model(
    widths: tuple[int, ...] = (64, 128, 256, 512, 512),
    hidden: tuple[int, ...] = (),
    pool: int = 1,
    activation: str = "relu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Return the network of one row.

    Args:
      widths: channels of the stages, of 2, 2, 3, 3, 3 convolutions; fewer: the first stages.
      hidden: units of linear maps before the last one.
      pool: side of the map that the linear maps read.
      activation: relu, gelu, silu or softplus.
    """
    return VGG(tuple(widths), tuple(hidden), pool, activation, in_channels, num_classes)


class VGG(nn.Module):
    """Convolutions and poolings, then linear maps of the last map's values."""

    def __init__(
        self,
        widths: tuple[int, ...],
        hidden: tuple[int, ...],
        pool: int,
        activation: str,
        ins: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        act, layers = ACTIVATIONS[activation], []
        for width, depth in zip(widths, (2, 2, 3, 3, 3), strict=False):
            for _ in range(depth):
                layers += [nn.Conv2d(ins, width, 3, padding=1), nn.BatchNorm2d(width), act()]
                ins = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(pool)
        ins, maps = ins * pool * pool, []
        for width in hidden:
            maps += [nn.Linear(ins, width), act(), nn.Dropout()]
            ins = width
        last = nn.Linear(ins, num_classes)
        self.classifier = nn.Sequential(*maps, last) if maps else last

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(images)).flatten(1))
