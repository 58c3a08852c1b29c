"""WRN-40-10 with biased convolutions, whose stride is the second convolution's.

Sources: Zagoruyko & Komodakis 2016 (arXiv 1605.07146). `cifar_wrn_40_10` is that of Tang et al.
2022 (arXiv 2209.14105), by its parameters meliketoy/wide-resnet.pytorch's (292b3ed); the standard
one at 224 pixels is `wide_resnet50_2`. Parity:
tests/models/cifar/test_convolutional.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.cifar.shared import common
from jaxrobust.models.interface.classifier import classifier, of_stages, run_blocks
from jaxrobust.models.interface.family import Family, Member, Names, Paper, Reference
from jaxrobust.models.interface.renaming import affine, batch_norm
from jaxrobust.models.modules.activations import ACTIVATIONS
from jaxrobust.models.modules.basic import BatchNorm, Conv, Linear, Normalize
from jaxrobust.models.modules.initializers import Draws
from jaxrobust.models.modules.stochastic_depth import Drop, branches, dropouts
from jaxrobust.types import Array, Classifier

STEM = 16  # channels


class Variant(NamedTuple):
    """One row of the table: every field can be overridden in `models.create`."""

    depths: tuple[int, ...]  # blocks of each stage
    width: int  # 16, 32, 64 times it are the channels of the stages
    activation: str = "relu"
    dropout: float = 0.3  # between the two convolutions of a block
    bn_group: int = 0  # batch statistics in training: of the whole batch, or of so many images
    drop_path: float = 0.0  # of the last block; grows linearly from 0 at the first
    in_channels: int = 3
    remat: bool = False  # recompute each block in the backward pass instead of storing it
    dtype: str = "float32"  # compute type; parameters stay float32


VARIANTS = {"cifar_wrn_40_10": Variant((6, 6, 6), 10)}

# Glorot's uniform draw with gain sqrt(2).
_glorot = jax.nn.initializers.variance_scaling(2.0, "fan_avg", "uniform")


def _conv(ins: int, outs: int, kernel: int, rngs: Draws, stride: int = 1) -> Conv:
    """Return a convolution with bias that keeps the size, but for its stride."""
    padding = kernel // 2
    return Conv(ins, outs, kernel, stride=stride, padding=padding, init=_glorot, rngs=rngs)


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

    def __init__(self, variant: Variant, num_classes: int, rngs: Draws) -> None:
        v, ins = variant, STEM
        self.normalize = Normalize(v.in_channels)
        self.conv1 = _conv(v.in_channels, STEM, 3, rngs)
        for i, depth in enumerate(v.depths):
            outs = (STEM << i) * v.width
            rows = [(ins, 2 if i else 1)] + [(outs, 1)] * (depth - 1)
            blocks = [Block(a, outs, stride, v, rngs) for a, stride in rows]
            setattr(self, f"layer{i + 1}", nnx.List(blocks))
            ins = outs
        self.bn1 = BatchNorm(ins, group=v.bn_group, momentum=0.9)  # as released: it moves fast
        self.linear = Linear(ins, num_classes, torch_init=True, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.conv1(self.normalize(images).astype(jnp.dtype(v.dtype)))
        told = of_stages(v.depths, train=train, key=key, drop_path=v.drop_path, remat=v.remat)
        for i, how in enumerate(told, 1):
            x = run_blocks(getattr(self, f"layer{i}"), x, draws=v.dropout > 0, **how)
        x = ACTIVATIONS[v.activation](self.bn1(x, train))
        return self.linear(x.mean(axis=(1, 2)))


def create(variant: Variant, *, num_classes: int, image_size: int) -> Classifier:
    """Return the network of one row; `ValueError` where the row or the size cannot work."""
    v = variant
    common.check_stages(v, "depths")
    common.check(v, width=1, in_channels=1, bn_group=0)
    common.check_image_size(image_size)
    return classifier(lambda rngs: WideResNet(v, num_classes, rngs), dtype=jnp.dtype(v.dtype))


_BLOCK = r"layer\d+\.\d+\."
TORCH_NAMES = common.rows(rf"((?:{_BLOCK})?conv\d|{_BLOCK}shortcut\.0)", rf"((?:{_BLOCK})?bn\d)")


def torch_keys(variant: Variant) -> list[str]:
    """Return the names of meliketoy/wide-resnet.pytorch in its order."""
    v, keys = variant, affine("conv1")
    for block, projects in common.blocks(v.depths, STEM, STEM * v.width):
        for part in (1, 2):
            keys += batch_norm(f"{block}.bn{part}") + affine(f"{block}.conv{part}")
        if projects:
            keys += affine(f"{block}.shortcut.0")
    return [*keys, *batch_norm("bn1"), *affine("linear")]


MEMBERS = {
    "cifar_wrn_40_10": Member(
        Reference("cifar_wide_resnet.py", {"depths": (6, 6, 6), "width": 10}),
        paper=Paper("55.85", ""),
        counted_at=32,
        num_classes=10,
        title="WideResNet-40-10 with biases",
    )
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"conv1\..*", head=r"linear\..*")
FAMILY = Family(
    "cifar_wide_resnet", "WideResNet", VARIANTS, create, NAMES, MEMBERS, "all", any_size=True
)
