"""ResNeXt-29 (2 x 64d) at 32 pixels, ResNeXt-50 (32 x 4d) at 224.

Sources: Xie et al. 2017 (arXiv 1611.05431). `cifar_resnext29` is that of Tang et al. 2022 (arXiv
2209.14105), by its parameters kuangliu/pytorch-cifar's (49b7aa9), whose stem is a 1x1 convolution
and whose blocks double their inner channels; `cifar_resnext50_224` is the standard network with
these names, our choice: that paper does not say what it takes at 224 pixels. Parity:
tests/models/cifar/test_convolutional.py.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.cifar.shared import common
from jaxrobust.models.cifar.shared.common import conv
from jaxrobust.models.interface.classifier import classifier, of_stages, run_blocks
from jaxrobust.models.interface.family import Family, Member, Names, Paper, Reference
from jaxrobust.models.interface.renaming import affine, batch_norm
from jaxrobust.models.kernels import pooling
from jaxrobust.models.modules.activations import ACTIVATIONS
from jaxrobust.models.modules.basic import BatchNorm, Linear, Normalize
from jaxrobust.models.modules.initializers import Draws
from jaxrobust.models.modules.stochastic_depth import Drop, branches
from jaxrobust.types import Array, Classifier

STEM = 64  # channels
EXPANSION = 2  # a block's output channels by its inner ones


class Variant(NamedTuple):
    """One row of the table: every field can be overridden in `models.create`."""

    depths: tuple[int, ...] = (3, 3, 3)  # blocks of each stage
    groups: int = 2  # of the 3x3 convolutions
    width: int = 64  # channels of a group in the first stage; they double with each stage
    small_stem: bool = True  # for 32 px: 1x1, stride 1, no pooling; else 7x7, stride 2, pooling
    activation: str = "relu"
    bn_group: int = 0  # batch statistics in training: of the whole batch, or of so many images
    drop_path: float = 0.0  # of the last block; grows linearly from 0 at the first
    in_channels: int = 3
    remat: bool = False  # recompute each block in the backward pass instead of storing it
    dtype: str = "float32"  # compute type; parameters stay float32


_50: dict[str, Any] = {"depths": (3, 4, 6, 3), "groups": 32, "width": 4, "small_stem": False}
VARIANTS = {"cifar_resnext29": Variant(), "cifar_resnext50_224": Variant(**_50)}


class Block(nnx.Module):
    """act(x + 1x1(act(3x3(act(1x1(x)))))), each with a norm; the 3x3 has groups and the stride."""

    def __init__(self, ins: int, inner: int, stride: int, variant: Variant, rngs: Draws) -> None:
        group, outs, groups = variant.bn_group, EXPANSION * inner, variant.groups
        self.conv1, self.bn1 = conv(ins, inner, 1, rngs), BatchNorm(inner, group=group)
        self.conv2 = conv(inner, inner, 3, rngs, stride, groups=groups)
        self.bn2 = BatchNorm(inner, group=group)
        self.conv3, self.bn3 = conv(inner, outs, 1, rngs), BatchNorm(outs, group=group)
        changes = stride > 1 or ins != outs
        self.shortcut = nnx.List(
            [conv(ins, outs, 1, rngs, stride), BatchNorm(outs, group=group)] if changes else []
        )
        self.act = ACTIVATIONS[variant.activation]

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        (path,) = branches(drop, 1)
        y = self.act(self.bn1(self.conv1(x), train))
        y = self.act(self.bn2(self.conv2(y), train))
        y = self.bn3(self.conv3(y), train)
        if self.shortcut:
            conv, norm = self.shortcut
            x = norm(conv(x), train)
        return self.act(x + path(y))


class ResNeXt(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, variant: Variant, num_classes: int, rngs: Draws) -> None:
        v, ins = variant, STEM
        self.normalize = Normalize(v.in_channels)
        kernel, stride = (1, 1) if v.small_stem else (7, 2)
        self.conv1 = conv(v.in_channels, STEM, kernel, rngs, stride)
        self.bn1 = BatchNorm(STEM, group=v.bn_group)
        for i, depth in enumerate(v.depths):
            inner = v.groups * v.width << i
            rows = [(ins, 2 if i else 1)] + [(EXPANSION * inner, 1)] * (depth - 1)
            blocks = [Block(a, inner, stride, v, rngs) for a, stride in rows]
            setattr(self, f"layer{i + 1}", nnx.List(blocks))
            ins = EXPANSION * inner
        self.linear = Linear(ins, num_classes, torch_init=True, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.conv1(self.normalize(images).astype(jnp.dtype(v.dtype)))
        x = ACTIVATIONS[v.activation](self.bn1(x, train))
        x = x if v.small_stem else pooling.max_pool(x)
        told = of_stages(v.depths, train=train, key=key, drop_path=v.drop_path, remat=v.remat)
        for i, how in enumerate(told, 1):
            x = run_blocks(getattr(self, f"layer{i}"), x, **how)
        return self.linear(x.mean(axis=(1, 2)))


def create(variant: Variant, *, num_classes: int, image_size: int) -> Classifier:
    """Return the network of one row; `ValueError` where the row or the size cannot work."""
    v = variant
    common.check_stages(v, "depths")
    common.check(v, groups=1, width=1, in_channels=1, bn_group=0)
    common.check_image_size(image_size)
    return classifier(lambda rngs: ResNeXt(v, num_classes, rngs), dtype=jnp.dtype(v.dtype))


_BLOCK = r"layer\d+\.\d+\."
TORCH_NAMES = common.rows(
    rf"((?:{_BLOCK})?conv\d|{_BLOCK}shortcut\.0)", rf"((?:{_BLOCK})?bn\d|{_BLOCK}shortcut\.1)"
)


def torch_keys(variant: Variant) -> list[str]:
    """Return the names of kuangliu/pytorch-cifar in its order."""
    v, keys = variant, ["conv1.weight", *batch_norm("bn1")]
    for block, projects in common.blocks(v.depths, STEM, EXPANSION * v.groups * v.width):
        for part in (1, 2, 3):
            keys += [f"{block}.conv{part}.weight", *batch_norm(f"{block}.bn{part}")]
        if projects:
            keys += [f"{block}.shortcut.0.weight", *batch_norm(f"{block}.shortcut.1")]
    return keys + affine("linear")


MEMBERS = {
    "cifar_resnext29": Member(
        Reference("cifar_resnext.py"),
        paper=Paper("9.12", ""),
        counted_at=32,
        num_classes=10,
        title="ResNeXt-29 (2x64d)",
    ),
    "cifar_resnext50_224": Member(
        Reference("cifar_resnext.py", _50), num_classes=10, title="ResNeXt-50 (32x4d)"
    ),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"(conv1|bn1)\..*", head=r"linear\..*")
FAMILY = Family("cifar_resnext", "ResNeXt", VARIANTS, create, NAMES, MEMBERS, "all", any_size=True)
