"""VGG-16 with batch norm: with one linear layer at 32 pixels, with three at 224.

Source: Simonyan & Zisserman 2015 (arXiv 1409.1556).
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.classifier import run_blocks
from jaxrobust.models.interface.family import BatchNormRow, Names
from jaxrobust.models.interface.renaming import keys
from jaxrobust.models.kernels import pooling
from jaxrobust.models.modules.basic import ACTIVATIONS, BatchNorm, Conv, Linear, Normalize
from jaxrobust.models.modules.draws import Draws, Drop, dropouts, torch_default
from jaxrobust.types import Array, ModuleMaker
from jaxrobust.zoo.shared import common

DEPTHS = (2, 2, 3, 3, 3)  # convolutions of each stage of a VGG-16


class Variant(BatchNormRow):
    """A row of the table; `drop_path` must be 0: there is no residual branch to drop."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)  # of each stage; fewer: the first stages
    hidden: tuple[int, ...] = ()  # units of linear maps before the last one
    pool: int = 1  # side of the map before the linear layers; 1: the mean of all pixels
    activation: str = "relu"
    dropout: float = 0.0  # after each of the hidden linear maps


def places(stages: int) -> list[list[int]]:
    """List the indices of each stage's convolutions in PyTorch's sequence; norms follow them."""
    convs, at = [], 0
    for depth in DEPTHS[:stages]:
        convs.append([at + 3 * i for i in range(depth)])
        at += 3 * depth + 1  # an activation after each norm, and a pooling
    return convs


class Numbered(nnx.Module):
    """Modules under their numbers in PyTorch's sequence."""

    def __init__(self, modules: Mapping[int, nnx.Module]) -> None:
        for number, module in modules.items():
            setattr(self, str(number), module)

    def __getitem__(self, number: int) -> Any:
        return getattr(self, str(number))


class Unit(nnx.Module):
    """act(norm(conv(x)))."""

    def __init__(self, conv: Conv, norm: BatchNorm, activation: str) -> None:
        self.conv, self.norm, self.act = conv, norm, ACTIVATIONS[activation]

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        return self.act(self.norm(self.conv(x), train))


class Hidden(nnx.Module):
    """A linear map, activation and dropout."""

    def __init__(self, linear: Linear, v: Variant) -> None:
        self.linear, self.dropout = linear, v.dropout
        self.act = ACTIVATIONS[v.activation]

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        (within,) = dropouts(drop, 1, self.dropout, paths=0)
        return within(self.act(self.linear(x)))


class VGG(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, rngs: Draws) -> None:
        ins = v.in_channels
        self.normalize = Normalize(v.in_channels)
        features: dict[int, nnx.Module] = {}
        for width, stage in zip(v.widths, places(len(v.widths)), strict=True):
            for at in stage:
                features[at] = Conv(ins, width, 3, padding=1, init=torch_default, rngs=rngs)
                features[at + 1] = BatchNorm(width, group=v.bn_group)
                ins = width
        self.features = Numbered(features)
        maps, ins = {}, ins * v.pool**2
        for i, width in enumerate((*v.hidden, num_classes)):
            maps[3 * i] = Linear(ins, width, init=torch_default, rngs=rngs)  # then ReLU and dropout
            ins = width
        self.classifier: Any = Numbered(maps) if v.hidden else maps[0]
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v, features = self.variant, self.features
        x = self.normalize(images).astype(jnp.dtype(v.dtype))
        for stage in places(len(v.widths)):
            units = [Unit(features[at], features[at + 1], v.activation) for at in stage]
            x = pooling.max_pool_2x2(run_blocks(units, x, train=train, remat=v.remat))
        if not v.hidden:
            return self.classifier(x.mean(axis=(1, 2)))
        # Linear layers read PyTorch's order: channels first.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        maps = [Hidden(self.classifier[3 * i], v) for i in range(len(v.hidden))]
        x = run_blocks(maps, x, train=train, key=key, draws=v.dropout > 0)
        return self.classifier[3 * len(v.hidden)](x)


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Make the maker of a row's network; `ValueError` where the row or the size cannot work."""
    if not 1 <= len(v.widths) <= len(DEPTHS) or any(n < 1 for n in v.widths):
        raise ValueError(
            f"widths={v.widths!r} must be positive integers, one for each of at most "
            f"{len(DEPTHS)} stages"
        )
    architecture_checks.check_tuples(v, "hidden", empty=True)
    architecture_checks.check_row(v, pool=1, in_channels=1, bn_group=0)
    if v.drop_path:
        raise ValueError(
            f"drop_path={v.drop_path}: a VGG has no residual branches to leave out; set it to 0"
        )
    halvings = len(v.widths)
    architecture_checks.check_halvings(image_size, halvings)
    if (v.pool > 1 or v.hidden) and image_size >> halvings != v.pool:
        raise ValueError(
            f"image_size={image_size}: the linear maps read {v.pool}x{v.pool} pixels of a map that "
            f"is halved {halvings} times, so use {v.pool << halvings}"
        )
    return lambda rngs: VGG(v, num_classes, rngs)


_STAGES = [at for stage in places(len(DEPTHS)) for at in stage]
_CONV = rf"(features\.(?:{'|'.join(str(at) for at in _STAGES)}))"
_NORM = rf"(features\.(?:{'|'.join(str(at + 1) for at in _STAGES)}))"
TORCH_NAMES = common.rows(_CONV, _NORM, r"(classifier(?:\.\d+)?)")


def torch_keys(v: Variant) -> list[str]:
    """List the names of kuangliu/pytorch-cifar in its order."""
    convs = [at for stage in places(len(v.widths)) for at in stage]
    names = keys("features", " ".join(f"{at} {at + 1}:bn" for at in convs))
    maps = [f"classifier.{3 * i}" for i in range(len(v.hidden) + 1)]
    return names + keys("", " ".join(maps) if v.hidden else "classifier")


_224 = {"hidden": (4096, 4096), "pool": 7}
_NETWORKS = {
    "cifar_vgg16": common.Study("VGG-16 at 32 px", counted="14.72"),
    "cifar_vgg16_224": common.Study("VGG-16", _224, {"dropout": 0.5}),
}
_HEAD = r"classifier\.(?:6\.)?[a-z]+"
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"features\.[01]\..*", head=_HEAD)
FAMILY = common.family("cifar_vgg", "VGG", Variant, maker, NAMES, _NETWORKS)
