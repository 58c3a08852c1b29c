"""RaWideResNet-101-2 in PyTorch.

Sources: Peng et al. 2023 (arXiv 2308.16258); names as in RobustBench 1.1.1.
"""

from torch import nn

from tests.support.torch_files.layers import (
    ACTIVATIONS,
    ConvSqueeze,
    Mean,
    Residual,
    conv,
    named,
    project,
)


def model(
    depths: tuple[int, ...],  # blocks of each stage
    channels: tuple[int, ...],  # of each stage; a quarter of them are inside of a block
    groups: int = 2,  # of the 3x3 convolutions
    stem: int = 96,  # channels
    activation: str = "silu",  # of the blocks
    in_channels: int = 3,
    num_classes: int = 1000,
) -> nn.Module:
    act, ins = ACTIVATIONS[activation], stem
    first = nn.Sequential(conv(in_channels, stem, 7, 2), nn.BatchNorm2d(stem), nn.ReLU())
    stages: dict[str, nn.Module] = {}
    for i, (depth, outs) in enumerate(zip(depths, channels, strict=True), 1):
        rows = [(ins, 2)] + [(outs, 1)] * (depth - 1)
        blocks = {
            f"stage{i}-block{j}": block(a, outs, stride, groups, act)
            for j, (a, stride) in enumerate(rows)
        }
        stages[f"stage{i}"], ins = named(**blocks), outs
    parts = {"stem": named(stem=named(stem=first)), "stages": named(**stages)}
    return named(**parts, mean=Mean(), fc=nn.Linear(ins, num_classes))


def block(ins: int, outs: int, stride: int, groups: int, act: type[nn.Module]) -> nn.Module:
    """Build 1x1, 3x3, squeeze and 1x1, the first without a norm; act(that + projection)."""
    inner = outs // 4
    branch = {
        "a": nn.Sequential(conv(ins, inner, 1), nn.Identity(), act()),
        "b": nn.Sequential(conv(inner, inner, 3, stride, groups), nn.BatchNorm2d(inner), act()),
        "se": ConvSqueeze(inner, ins // 4),
        "c": nn.Sequential(conv(inner, outs, 1), nn.BatchNorm2d(outs)),
    }
    return Residual(proj=project(ins, outs, stride), F=named(**branch), last=act())
