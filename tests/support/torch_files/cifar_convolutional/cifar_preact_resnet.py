"""Residual networks with preactivation in PyTorch, such as PreActResNet-50.

Sources: He et al. 2016 (arXiv 1603.05027); names, and what is missing before the last pooling, as
in kuangliu/pytorch-cifar (49b7aa9).
"""

from torch import Tensor, nn

from tests.support.torch_files.layers import ACTIVATIONS, Mean, conv, named, stages


def model(
    depths: tuple[int, ...] = (3, 4, 6, 3),  # blocks of each stage
    width: int = 64,  # inner channels of the first stage's blocks; they double with each stage
    small_stem: bool = True,  # for 32 px, a 3x3 convolution; else 7x7, stride 2, and pooling
    last_norm: bool = False,  # norm and activation before the last pooling
    activation: str = "relu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    act, outs = ACTIVATIONS[activation], [4 * width << i for i in range(len(depths))]
    parts: dict[str, nn.Module] = {"conv1": conv(in_channels, 64)}
    if not small_stem:
        parts = {"conv1": conv(in_channels, 64, 7, 2), "pool": nn.MaxPool2d(3, 2, 1)}
    parts |= stages(64, outs, depths, lambda ins, i, stride: Block(ins, width << i, stride, act()))
    if last_norm:
        parts |= {"bn": nn.BatchNorm2d(outs[-1]), "act": act()}
    return named(**parts, mean=Mean(), linear=nn.Linear(outs[-1], num_classes))


class Block(nn.Module):
    """Norm and activation before each of three convolutions; a projection reads the first ones."""

    def __init__(self, ins: int, width: int, stride: int, act: nn.Module) -> None:
        super().__init__()
        self.act, outs = act, 4 * width
        self.bn1, self.conv1 = nn.BatchNorm2d(ins), conv(ins, width, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width, 3, stride)
        self.bn3, self.conv3 = nn.BatchNorm2d(width), conv(width, outs, 1)
        self.projects = stride != 1 or ins != outs
        if self.projects:
            self.shortcut = nn.Sequential(conv(ins, outs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        before = self.act(self.bn1(x))
        y = self.conv1(before)
        y = self.conv2(self.act(self.bn2(y)))
        y = self.conv3(self.act(self.bn3(y)))
        return y + (self.shortcut(before) if self.projects else x)
