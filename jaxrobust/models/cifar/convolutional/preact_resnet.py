"""PreActResNet-50: without a norm before its pooling at 32 pixels, with one at 224.

Sources: He et al. 2016 (arXiv 1603.05027). `cifar_preactresnet50` is that of Tang et al. 2022
(arXiv 2209.14105), by its parameters kuangliu/pytorch-cifar's (49b7aa9), whose last block's sum is
pooled as it is; `cifar_preactresnet50_224` is the standard network with these names, our choice:
that paper does not say what it takes at 224 pixels. Parity:
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
EXPANSION = 4  # a block's output channels by its inner ones


class Variant(NamedTuple):
    """One row of the table: every field can be overridden in `models.create`."""

    depths: tuple[int, ...] = (3, 4, 6, 3)  # blocks of each stage
    width: int = 64  # inner channels of the first stage's blocks; they double with each stage
    small_stem: bool = True  # for 32 px: 3x3, stride 1, no pooling; else 7x7, stride 2, pooling
    last_norm: bool = False  # norm and activation before the last pooling
    activation: str = "relu"
    bn_group: int = 0  # batch statistics in training: of the whole batch, or of so many images
    drop_path: float = 0.0  # of the last block; grows linearly from 0 at the first
    in_channels: int = 3
    remat: bool = False  # recompute each block in the backward pass instead of storing it
    dtype: str = "float32"  # compute type; parameters stay float32


_STANDARD: dict[str, Any] = {"small_stem": False, "last_norm": True}
VARIANTS = {
    "cifar_preactresnet50": Variant(),
    "cifar_preactresnet50_224": Variant(**_STANDARD),
}


class Block(nnx.Module):
    """x + a branch of 1x1, 3x3, 1x1 convolutions, each behind its norm and activation.

    A projection reads what the first of these gives, and has no norm.
    """

    def __init__(self, ins: int, width: int, stride: int, variant: Variant, rngs: Draws) -> None:
        group, outs = variant.bn_group, EXPANSION * width
        self.bn1, self.conv1 = BatchNorm(ins, group=group), conv(ins, width, 1, rngs)
        self.bn2, self.conv2 = BatchNorm(width, group=group), conv(width, width, 3, rngs, stride)
        self.bn3, self.conv3 = BatchNorm(width, group=group), conv(width, outs, 1, rngs)
        changes = stride > 1 or ins != outs
        self.shortcut = nnx.List([conv(ins, outs, 1, rngs, stride)] if changes else [])
        self.act = ACTIVATIONS[variant.activation]

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        (path,) = branches(drop, 1)
        before = self.act(self.bn1(x, train))
        y = self.conv2(self.act(self.bn2(self.conv1(before), train)))
        y = self.conv3(self.act(self.bn3(y, train)))
        return path(y) + (self.shortcut[0](before) if self.shortcut else x)


class PreActResNet(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, variant: Variant, num_classes: int, rngs: Draws) -> None:
        v, ins = variant, STEM
        self.normalize = Normalize(v.in_channels)
        kernel, stride = (3, 1) if v.small_stem else (7, 2)
        self.conv1 = conv(v.in_channels, STEM, kernel, rngs, stride)
        for i, depth in enumerate(v.depths):
            width = v.width << i
            rows = [(ins, 2 if i else 1)] + [(EXPANSION * width, 1)] * (depth - 1)
            blocks = [Block(a, width, stride, v, rngs) for a, stride in rows]
            setattr(self, f"layer{i + 1}", nnx.List(blocks))
            ins = EXPANSION * width
        if v.last_norm:
            self.bn = BatchNorm(ins, group=v.bn_group)
        self.linear = Linear(ins, num_classes, torch_init=True, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.conv1(self.normalize(images).astype(jnp.dtype(v.dtype)))
        x = x if v.small_stem else pooling.max_pool(x)
        told = of_stages(v.depths, train=train, key=key, drop_path=v.drop_path, remat=v.remat)
        for i, how in enumerate(told, 1):
            x = run_blocks(getattr(self, f"layer{i}"), x, **how)
        if v.last_norm:
            x = ACTIVATIONS[v.activation](self.bn(x, train))
        return self.linear(x.mean(axis=(1, 2)))


def create(variant: Variant, *, num_classes: int, image_size: int) -> Classifier:
    """Return the network of one row; `ValueError` where the row or the size cannot work."""
    v = variant
    common.check_stages(v, "depths")
    common.check(v, width=1, in_channels=1, bn_group=0)
    common.check_image_size(image_size)
    return classifier(lambda rngs: PreActResNet(v, num_classes, rngs), dtype=jnp.dtype(v.dtype))


_BLOCK = r"layer\d+\.\d+\."
TORCH_NAMES = common.rows(rf"((?:{_BLOCK})?conv\d|{_BLOCK}shortcut\.0)", rf"({_BLOCK}bn\d|bn)")


def torch_keys(variant: Variant) -> list[str]:
    """Return the names of kuangliu/pytorch-cifar in its order; a last norm is `bn`."""
    v, keys = variant, ["conv1.weight"]
    for block, projects in common.blocks(v.depths, STEM, EXPANSION * v.width):
        for part in (1, 2, 3):
            keys += [*batch_norm(f"{block}.bn{part}"), f"{block}.conv{part}.weight"]
        if projects:
            keys.append(f"{block}.shortcut.0.weight")
    return keys + (batch_norm("bn") if v.last_norm else []) + affine("linear")


MEMBERS = {
    "cifar_preactresnet50": Member(
        Reference("cifar_preact_resnet.py"),
        paper=Paper("23.50", ""),
        counted_at=32,
        num_classes=10,
        title="PreActResNet-50 at 32 px",
    ),
    "cifar_preactresnet50_224": Member(
        Reference("cifar_preact_resnet.py", _STANDARD), num_classes=10, title="PreActResNet-50"
    ),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"conv1\..*", head=r"linear\..*")
FAMILY = Family(
    "cifar_preact_resnet", "PreActResNet", VARIANTS, create, NAMES, MEMBERS, "all", any_size=True
)
