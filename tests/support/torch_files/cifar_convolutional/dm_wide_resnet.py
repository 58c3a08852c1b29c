"""DeepMind's wide residual networks with SiLU, and RaWideResNets, in PyTorch.

Sources: Gowal et al. 2020 (arXiv 2010.03593) and Peng et al. 2023 (arXiv 2308.16258); names as in
RobustBench 1.1.1.
"""

from torch import Tensor, nn

from tests.support.torch_files.layers import (
    ACTIVATIONS,
    ConvSqueeze,
    Mean,
    SameConv,
    conv,
    named,
)


def model(
    depths: tuple[int, ...],  # blocks of each stage
    channels: tuple[int, ...],  # of each stage
    stem: int = 16,  # channels
    activation: str = "silu",
    se_ratio: float = 0.0,  # hidden units of squeeze and excitation by the channels; 0: none
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    act, ins, stages = ACTIVATIONS[activation], stem, []
    for i, (depth, outs) in enumerate(zip(depths, channels, strict=True)):
        rows = [(ins, 2 if i else 1)] + [(outs, 1)] * (depth - 1)
        squeezed = round(se_ratio * outs)
        blocks = [Block(a, outs, stride, squeezed, act()) for a, stride in rows]
        stages.append(named(block=nn.Sequential(*blocks)))
        ins = outs
    last = {"batchnorm": nn.BatchNorm2d(ins), "act": act(), "mean": Mean()}
    parts = {"init_conv": SameConv(in_channels, stem), "layer": nn.Sequential(*stages)}
    return named(**parts, **last, logits=nn.Linear(ins, num_classes))


class Block(nn.Module):
    """Two convolutions after norm and activation each; a projection reads the first of these."""

    def __init__(self, ins: int, outs: int, stride: int, squeezed: int, act: nn.Module) -> None:
        super().__init__()
        self.act = act
        self.batchnorm_0, self.conv_0 = nn.BatchNorm2d(ins), SameConv(ins, outs, stride)
        self.batchnorm_1, self.conv_1 = nn.BatchNorm2d(outs), SameConv(outs, outs)
        self.shortcut = conv(ins, outs, 1, stride) if ins != outs else None
        self.se = ConvSqueeze(outs, squeezed) if squeezed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        before = self.act(self.batchnorm_0(x))
        y = self.conv_1(self.act(self.batchnorm_1(self.conv_0(before))))
        return self.se(y) + (x if self.shortcut is None else self.shortcut(before))
