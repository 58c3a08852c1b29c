"""PreActResNet-50: without a norm before the final pooling at 32 pixels, with one at 224.

Also RobustBench's PreActResNet-18s, by options: depths=(2, 2, 2, 2), bottleneck=False.
Source: He et al. 2016 (arXiv 1603.05027).
"""

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families import residual
from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.family import BatchNormRow, Names
from jaxrobust.models.interface.renaming import keys
from jaxrobust.models.kernels import pooling
from jaxrobust.models.modules.basic import ACTIVATIONS, BatchNorm, Linear, Normalize
from jaxrobust.models.modules.draws import Draws, Drop, branches, torch_default
from jaxrobust.types import Array, ModuleMaker
from jaxrobust.zoo.shared import common

EXPANSION = 4  # a bottleneck's output channels by its inner ones


class Variant(BatchNormRow):
    """A row of the table: `models.create` can override every field."""

    depths: tuple[int, ...] = (3, 4, 6, 3)  # blocks of each stage
    width: int = 64  # inner channels of the first stage's blocks; they double with each stage
    small_stem: bool = True  # for 32 px: 3x3, stride 1, no pooling; else 7x7, stride 2, pooling
    last_norm: bool = False  # norm and activation before the last pooling
    bottleneck: bool = True  # blocks of 1x1, 3x3, 1x1 convolutions, else of two 3x3
    raw_shortcut: bool = False  # projections read a block's input before its first norm
    activation: str = "relu"


class Block(nnx.Module):
    """x + a branch of convolutions, 1x1, 3x3, 1x1 or two 3x3, each after its norm and activation.

    A projection reads the first activation, or x, and has no norm.
    """

    def __init__(self, ins: int, outs: int, stride: int, v: Variant, rngs: Draws) -> None:
        group, width = v.bn_group, outs // _expansion(v)
        kernel, step = (1, 1) if v.bottleneck else (3, stride)
        self.bn1 = BatchNorm(ins, group=group)
        self.conv1 = residual.conv(ins, width, kernel, rngs, step)
        self.bn2 = BatchNorm(width, group=group)
        self.conv2 = residual.conv(width, width, 3, rngs, stride // step)
        if v.bottleneck:
            self.bn3 = BatchNorm(width, group=group)
            self.conv3 = residual.conv(width, outs, 1, rngs)
        changes = stride > 1 or ins != outs
        self.shortcut = nnx.List([residual.conv(ins, outs, 1, rngs, stride)] if changes else [])
        self.act, self.variant = ACTIVATIONS[v.activation], v

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        (path,) = branches(drop, 1)
        normed = self.act(self.bn1(x, train))
        y = self.conv2(self.act(self.bn2(self.conv1(normed), train)))
        if self.variant.bottleneck:
            y = self.conv3(self.act(self.bn3(y, train)))
        source = x if self.variant.raw_shortcut else normed
        return path(y) + (self.shortcut[0](source) if self.shortcut else x)


def _expansion(v: Variant) -> int:
    return EXPANSION if v.bottleneck else 1


class PreActResNet(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        kernel, stride = (3, 1) if v.small_stem else (7, 2)
        self.conv1 = residual.conv(v.in_channels, residual.STEM, kernel, rngs, stride)
        ins = residual.add_stages(self, v, rngs, Block, _expansion(v) * v.width)
        if v.last_norm:
            self.bn = BatchNorm(ins, group=v.bn_group)
        self.linear = Linear(ins, num_classes, init=torch_default, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.conv1(self.normalize(images).astype(jnp.dtype(v.dtype)))
        x = x if v.small_stem else pooling.max_pool(x)
        x = residual.run_stages(self, x, train, key)
        if v.last_norm:
            x = ACTIVATIONS[v.activation](self.bn(x, train))
        return self.linear(x.mean(axis=(1, 2)))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Make the maker of a row's network; `ValueError` where the row or the size cannot work."""
    architecture_checks.check_stages(v, "depths")
    architecture_checks.check_row(v, width=1, in_channels=1, bn_group=0)
    return lambda rngs: PreActResNet(v, num_classes, rngs)


_BLOCK = r"layer\d+\.\d+\."
TORCH_NAMES = common.rows(rf"((?:{_BLOCK})?conv\d|{_BLOCK}shortcut\.0)", rf"({_BLOCK}bn\d|bn)")


def torch_keys(v: Variant) -> list[str]:
    """List the names of kuangliu/pytorch-cifar in its order; a last norm is `bn`."""
    names = keys("", "conv1:w")
    parts = "bn1:bn conv1:w bn2:bn conv2:w" + " bn3:bn conv3:w" * v.bottleneck
    for block, projects in residual.block_names(v.depths, residual.STEM, _expansion(v) * v.width):
        names += keys(block, parts + " shortcut.0:w" * projects)
    return names + keys("", "bn:bn linear" if v.last_norm else "linear")


_224 = {"small_stem": False, "last_norm": True}
_NETWORKS = {
    "cifar_preactresnet50": common.Study("PreActResNet-50 at 32 px", counted="23.50"),
    "cifar_preactresnet50_224": common.Study("PreActResNet-50", _224),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"conv1\..*", head=r"linear\..*")
FAMILY = common.family("cifar_preact_resnet", "PreActResNet", Variant, maker, NAMES, _NETWORKS)
