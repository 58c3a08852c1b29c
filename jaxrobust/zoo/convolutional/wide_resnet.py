"""WRN-40-10 with biased convolutions, whose stride is the second convolution's.

Sources: Zagoruyko & Komodakis 2016 (arXiv 1605.07146); by its parameter count, the network of
meliketoy/wide-resnet.pytorch (292b3ed). The standard one at 224 pixels is `wide_resnet50_2`.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families import residual
from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.family import BatchNormRow, Names
from jaxrobust.models.interface.renaming import keys
from jaxrobust.models.modules.basic import ACTIVATIONS, BatchNorm, Linear, Normalize
from jaxrobust.models.modules.draws import Draws, Drop, branches, dropouts, torch_default
from jaxrobust.types import Array, ModuleMaker
from jaxrobust.zoo.shared import common

STEM = 16  # channels


class Variant(BatchNormRow):
    """A row of the table: `models.create` can override every field."""

    depths: tuple[int, ...]  # blocks of each stage
    width: int  # 16, 32, 64 times it are the channels of the stages
    activation: str = "relu"
    dropout: float = 0.3  # between the two convolutions of a block


# Glorot's uniform draw with gain sqrt(2).
_glorot = jax.nn.initializers.variance_scaling(2.0, "fan_avg", "uniform")
_conv = functools.partial(residual.conv, bias=True, init=_glorot)


class Block(nnx.Module):
    """x + 3x3(act(norm(3x3(act(norm(x)))))); the stride is the second one's."""

    def __init__(self, ins: int, outs: int, stride: int, v: Variant, rngs: Draws) -> None:
        self.bn1, self.conv1 = BatchNorm(ins, group=v.bn_group), _conv(ins, outs, 3, rngs)
        self.bn2 = BatchNorm(outs, group=v.bn_group)
        self.conv2 = _conv(outs, outs, 3, rngs, stride)
        changes = stride > 1 or ins != outs
        self.shortcut = nnx.List([_conv(ins, outs, 1, rngs, stride)] if changes else [])
        self.act, self.dropout = ACTIVATIONS[v.activation], v.dropout

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        (path,), (within,) = branches(drop, 1), dropouts(drop, 1, self.dropout, paths=1)
        y = within(self.conv1(self.act(self.bn1(x, train))))
        y = self.conv2(self.act(self.bn2(y, train)))
        # The shortcut reads the block's input itself, before norm and activation.
        return path(y) + (self.shortcut[0](x) if self.shortcut else x)


class WideResNet(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        self.conv1 = _conv(v.in_channels, STEM, 3, rngs)
        ins = residual.add_stages(self, v, rngs, Block, STEM * v.width, STEM)
        self.bn1 = BatchNorm(ins, group=v.bn_group, momentum=0.9)  # a fast average, as released
        self.linear = Linear(ins, num_classes, init=torch_default, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.conv1(self.normalize(images).astype(jnp.dtype(v.dtype)))
        x = residual.run_stages(self, x, train, key, draws=v.dropout > 0)
        x = ACTIVATIONS[v.activation](self.bn1(x, train))
        return self.linear(x.mean(axis=(1, 2)))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Make the maker of a row's network; `ValueError` where the row or the size cannot work."""
    architecture_checks.check_stages(v, "depths")
    architecture_checks.check_row(v, width=1, in_channels=1, bn_group=0)
    return lambda rngs: WideResNet(v, num_classes, rngs)


_BLOCK = r"layer\d+\.\d+\."
TORCH_NAMES = common.rows(rf"((?:{_BLOCK})?conv\d|{_BLOCK}shortcut\.0)", rf"((?:{_BLOCK})?bn\d)")


def torch_keys(v: Variant) -> list[str]:
    """List the names of meliketoy/wide-resnet.pytorch in its order."""
    names = keys("", "conv1")
    for block, projects in residual.block_names(v.depths, STEM, STEM * v.width):
        names += keys(block, "bn1:bn conv1 bn2:bn conv2" + " shortcut.0" * projects)
    return names + keys("", "bn1:bn linear")


_NETWORKS = {
    "cifar_wrn_40_10": common.Study(
        "WideResNet-40-10 with biases", {"depths": (6, 6, 6), "width": 10}, counted="55.85"
    )
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"conv1\..*", head=r"linear\..*")
FAMILY = common.family("cifar_wide_resnet", "WideResNet", Variant, maker, NAMES, _NETWORKS)
