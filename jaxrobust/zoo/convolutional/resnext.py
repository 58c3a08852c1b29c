"""ResNeXt-29 (2 x 64d) at 32 pixels, ResNeXt-50 (32 x 4d) at 224.

The stem for 32 px is a 1x1 convolution. Source: Xie et al. 2017 (arXiv 1611.05431).
"""

import functools

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families import residual
from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.family import BatchNormRow, Names
from jaxrobust.models.interface.renaming import keys
from jaxrobust.models.kernels import pooling
from jaxrobust.models.modules.basic import ACTIVATIONS, BatchNorm, Linear, Normalize
from jaxrobust.models.modules.draws import Draws, torch_default
from jaxrobust.types import Array, ModuleMaker
from jaxrobust.zoo.shared import common
from jaxrobust.zoo.shared.convolutions import Bottleneck


class Variant(BatchNormRow):
    """A row of the table: `models.create` can override every field."""

    depths: tuple[int, ...] = (3, 3, 3)  # blocks of each stage
    groups: int = 2  # of the 3x3 convolutions
    width: int = 64  # channels of a group in the first stage; they double with each stage
    small_stem: bool = True  # for 32 px: 1x1, stride 1, no pooling; else 7x7, stride 2, pooling
    activation: str = "relu"


class Block(Bottleneck):
    """A bottleneck with wide groups."""

    expansion, bias = 2, False


class ResNeXt(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        kernel, stride = (1, 1) if v.small_stem else (7, 2)
        self.conv1 = residual.conv(v.in_channels, residual.STEM, kernel, rngs, stride)
        self.bn1 = BatchNorm(residual.STEM, group=v.bn_group)

        def middle(inner: int, stride: int) -> nnx.Module:
            return residual.conv(inner, inner, 3, rngs, stride, groups=v.groups)

        block = functools.partial(Block, middle=middle)
        ins = residual.add_stages(self, v, rngs, block, Block.expansion * v.groups * v.width)
        self.linear = Linear(ins, num_classes, init=torch_default, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.conv1(self.normalize(images).astype(jnp.dtype(v.dtype)))
        x = ACTIVATIONS[v.activation](self.bn1(x, train))
        x = x if v.small_stem else pooling.max_pool(x)
        x = residual.run_stages(self, x, train, key)
        return self.linear(x.mean(axis=(1, 2)))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Make the maker of a row's network; `ValueError` where the row or the size cannot work."""
    architecture_checks.check_stages(v, "depths")
    architecture_checks.check_row(v, groups=1, width=1, in_channels=1, bn_group=0)
    return lambda rngs: ResNeXt(v, num_classes, rngs)


_BLOCK = r"layer\d+\.\d+\."
TORCH_NAMES = common.rows(
    rf"((?:{_BLOCK})?conv\d|{_BLOCK}shortcut\.0)", rf"((?:{_BLOCK})?bn\d|{_BLOCK}shortcut\.1)"
)


def torch_keys(v: Variant) -> list[str]:
    """List the names of kuangliu/pytorch-cifar in its order."""
    names, first = keys("", "conv1:w bn1:bn"), Block.expansion * v.groups * v.width
    convs, shortcut = "conv1:w bn1:bn conv2:w bn2:bn conv3:w bn3:bn", " shortcut.0:w shortcut.1:bn"
    for block, projects in residual.block_names(v.depths, residual.STEM, first):
        names += keys(block, convs + shortcut * projects)
    return names + keys("", "linear")


_50 = {"depths": (3, 4, 6, 3), "groups": 32, "width": 4, "small_stem": False}
_NETWORKS = {
    "cifar_resnext29": common.Study("ResNeXt-29 (2x64d)", counted="9.12"),
    "cifar_resnext50_224": common.Study("ResNeXt-50 (32x4d)", _50),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"(conv1|bn1)\..*", head=r"linear\..*")
FAMILY = common.family("cifar_resnext", "ResNeXt", Variant, maker, NAMES, _NETWORKS)
