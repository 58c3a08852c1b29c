"""DeepMind's PreActResNets with SiLU in PyTorch.

Sources: Rebuffi et al. 2021 (arXiv 2103.01946); names as in RobustBench 1.1.1.
"""

from torch import nn

from tests.support.torch_files.layers import ACTIVATIONS, Mean, Residual, SameConv, named


def model(
    depths: tuple[int, ...],  # blocks of each stage
    width: int = 64,  # channels of the stem and the first stage; they double with each stage
    activation: str = "silu",
    in_channels: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    act, ins = ACTIVATIONS[activation], width
    parts: dict[str, nn.Module] = {"conv_2d": SameConv(in_channels, width)}
    for i, depth in enumerate(depths):
        rows = [(ins, 2 if i else 1)] + [(width << i, 1)] * (depth - 1)
        blocks = [block(a, width << i, stride, act) for a, stride in rows]
        parts[f"layer_{i}"], ins = nn.Sequential(*blocks), width << i
    last = {"batchnorm": nn.BatchNorm2d(ins), "act": act(), "mean": Mean()}
    return named(**parts, **last, logits=nn.Linear(ins, num_classes))


def block(ins: int, outs: int, stride: int, act: type[nn.Module]) -> nn.Module:
    """Build two convolutions after norm and activation each; a projection reads the input."""
    layers = {"batchnorm_0": nn.BatchNorm2d(ins), "act_0": act()}
    layers |= {"conv_2d_1": SameConv(ins, outs, stride)}
    layers |= {"batchnorm_1": nn.BatchNorm2d(outs), "act_1": act()}
    layers |= {"conv_2d_2": SameConv(outs, outs)}
    if stride != 1 or ins != outs:
        layers["shortcut"] = SameConv(ins, outs, stride)
    return Residual(**layers)
