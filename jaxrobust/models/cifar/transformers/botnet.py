"""BoTNet-50: a ResNet-50 whose last stage attends where the others convolve.

Source: Srinivas et al. 2021 (arXiv 2101.11605), as leaderj1001/BottleneckTransformers (142e965) has
it: logits are not scaled, and a position meets the other pixel's query instead of its own. Parity:
tests/models/cifar/test_hybrids.py against golden logits of that code.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrobust.models.cifar.shared import common
from jaxrobust.models.cifar.shared.common import conv
from jaxrobust.models.interface.classifier import classifier, of_stages, run_blocks
from jaxrobust.models.interface.family import Family, Member, Names, Paper, Reference
from jaxrobust.models.interface.renaming import (
    BATCH_NORM_COUNT,
    Row,
    affine,
    batch_norm,
    conv_rows,
    linear_rows,
    norm_rows,
    row,
)
from jaxrobust.models.kernels import attention, pooling
from jaxrobust.models.kernels.layers import dropout
from jaxrobust.models.kernels.primitives import spread, widened
from jaxrobust.models.modules.activations import ACTIVATIONS
from jaxrobust.models.modules.basic import BatchNorm, Linear, Normalize
from jaxrobust.models.modules.initializers import Draws
from jaxrobust.models.modules.stochastic_depth import Drop, branches, split
from jaxrobust.types import Array, Classifier


class Variant(NamedTuple):
    """One row of the table: every field can be overridden in `models.create`."""

    depths: tuple[int, ...] = (3, 4, 6, 3)  # of the stages; the last one attends
    width: int = 64  # inner channels of the first stage's blocks; they double with each stage
    heads: int = 4
    small_stem: bool = True  # for 32 px: 3x3, stride 1, no pooling; else 7x7, stride 2, pooling
    activation: str = "relu"  # everywhere, also behind the residual
    dropout: float = 0.3  # of what the classifier reads
    bn_group: int = 0  # batch statistics in training: of the whole batch, or of so many images
    drop_path: float = 0.0  # of the last block; grows linearly from 0 at the first
    in_channels: int = 3
    remat: bool = False  # recompute each block in the backward pass instead of storing it
    dtype: str = "float32"  # compute type; parameters stay float32


VARIANTS = {"cifar_botnet50": Variant(), "cifar_botnet50_224": Variant(small_stem=False)}


class Attention(nnx.Module):
    """Attention of each pixel of f[B,S,S,D] to all: softmax over j of q_i.k_j + r_i.q_j.

    r is the sum of a row's and a column's embedding; nothing is divided by the root of the width.
    """

    def __init__(self, dim: int, heads: int, side: int, rngs: Draws) -> None:
        normal, place = jax.nn.initializers.normal(1.0), (1, heads, dim // heads)
        self.rel_h = nnx.Param(normal(rngs.params(), (*place, 1, side)))
        self.rel_w = nnx.Param(normal(rngs.params(), (*place, side, 1)))
        self.query, self.key, self.value = (conv(dim, dim, 1, rngs, bias=True) for _ in range(3))
        self.heads = heads

    def __call__(self, x: Array) -> Array:
        side = self.rel_h.shape[-1]
        if x.shape[1:3] != (side, side):
            raise ValueError(
                f"a map of {x.shape[1]}x{x.shape[2]}, and this network has positions for "
                f"{side}x{side}: create it, and convert its weights, with the images' image_size"
            )
        tokens = x.shape[0], side * side, self.heads, x.shape[3] // self.heads
        q, k, v = (part(x).reshape(tokens) for part in (self.query, self.key, self.value))
        columns, rows = widened(self.rel_h[...], self.rel_w[...])
        positions = (columns + rows).reshape(*tokens[2:], side * side).transpose(2, 0, 1)
        r = spread(positions.astype(x.dtype), tokens)
        q, k = jnp.concatenate([q, r], -1), jnp.concatenate([k, q], -1)
        return attention.attention(q, k, v, scale=1.0).reshape(x.shape)


class Bottleneck(nnx.Module):
    """act(x + 1x1(act(3x3(act(1x1(x)))))), or with attention for 3x3.

    The stride is the 3x3 one's; behind attention it is a mean over 2x2 pixels.
    """

    def __init__(
        self, ins: int, width: int, stride: int, side: int, v: Variant, rngs: Draws
    ) -> None:
        outs, group, self.act = 4 * width, v.bn_group, ACTIVATIONS[v.activation]
        self.conv1, self.bn1 = conv(ins, width, 1, rngs), BatchNorm(width, group=group)
        if side:
            self.conv2: Any = Attention(width, v.heads, side, rngs)
        else:
            self.conv2 = conv(width, width, 3, rngs, stride)
        self.bn2 = BatchNorm(width, group=group)
        self.conv3, self.bn3 = conv(width, outs, 1, rngs), BatchNorm(outs, group=group)
        changes = stride > 1 or ins != outs
        self.shortcut = nnx.List(
            [conv(ins, outs, 1, rngs, stride, bias=True), BatchNorm(outs, group=group)]
            if changes
            else []
        )
        self.halves = bool(side) and stride > 1

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        (path,) = branches(drop, 1)
        y = self.act(self.bn1(self.conv1(x), train))
        y = self.conv2(y)
        y = pooling.avg_pool_2x2(y) if self.halves else y
        y = self.act(self.bn2(y, train))
        y = self.bn3(self.conv3(y), train)
        if self.shortcut:
            conv, norm = self.shortcut
            x = norm(conv(x), train)
        return self.act(x + path(y))


class BoTNet(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, variant: Variant, num_classes: int, image_size: int, rngs: Draws) -> None:
        v = variant
        self.normalize = Normalize(v.in_channels)
        kernel, stride = (3, 1) if v.small_stem else (7, 2)
        self.conv1 = conv(v.in_channels, 64, kernel, rngs, stride)
        self.bn1 = BatchNorm(64, group=v.bn_group)
        side, ins, last = image_size // (1 if v.small_stem else 4), 64, len(v.depths) - 1
        for i, depth in enumerate(v.depths):
            blocks = []
            for stride in [1 if i == 0 else 2] + [1] * (depth - 1):
                blocks.append(Bottleneck(ins, v.width << i, stride, side * (i == last), v, rngs))
                ins, side = 4 * v.width << i, side // stride
            setattr(self, f"layer{i + 1}", nnx.List(blocks))
        self.fc = Linear(ins, num_classes, torch_init=True, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.normalize(images).astype(jnp.dtype(v.dtype))
        x = ACTIVATIONS[v.activation](self.bn1(self.conv1(x), train))
        x = x if v.small_stem else pooling.max_pool(x)
        key, last = (None, None) if key is None else split(key, 2)
        told = of_stages(v.depths, train=train, key=key, drop_path=v.drop_path, remat=v.remat)
        for i, how in enumerate(told, 1):
            x = run_blocks(getattr(self, f"layer{i}"), x, draws=v.dropout > 0, **how)
        return self.fc(dropout(x.mean(axis=(1, 2)), last if train else None, v.dropout))


def create(variant: Variant, *, num_classes: int, image_size: int) -> Classifier:
    """Return the network of one row; `ValueError` where the row or the size cannot work."""
    v = variant
    if len(v.depths) < 2 or min(v.depths) < 1:
        raise ValueError(f"depths={v.depths!r} must be two or more positive integers")
    common.check(v, width=1, heads=1, in_channels=1, bn_group=0)
    if (dim := v.width << (len(v.depths) - 1)) % v.heads:
        raise ValueError(f"heads={v.heads} must divide the {dim} channels of the last stage")
    step = (1 if v.small_stem else 4) << (len(v.depths) - 1)
    if image_size < step or image_size % step:
        raise ValueError(
            f"image_size={image_size} is not halved to whole maps; take a multiple of {step}"
        )
    make = lambda rngs: BoTNet(v, num_classes, image_size, rngs)  # noqa: E731
    return classifier(make, dtype=jnp.dtype(v.dtype))


def refused(positions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Raise `ValueError`: positions belong to one size of images."""
    raise ValueError(
        f"positions of shape {positions.shape}, and this network has {shape}; give the image_size "
        "and options that the weights were trained with"
    )


_BLOCK = r"(layer\d\.\d+)"
TORCH_NAMES: list[Row] = [
    *conv_rows(r"((?:layer\d\.\d+\.)?conv\d)", r"\1"),
    *norm_rows(r"((?:layer\d\.\d+\.)?bn\d)", r"\1"),
    *conv_rows(rf"{_BLOCK}\.shortcut\.0", r"\1.shortcut.0"),
    *norm_rows(rf"{_BLOCK}\.shortcut\.1", r"\1.shortcut.1"),
    *conv_rows(rf"{_BLOCK}\.conv2\.0\.(query|key|value)", r"\1.conv2.\2"),
    row(rf"{_BLOCK}\.conv2(?:\.0)?\.(rel_[hw])", r"\1.conv2.\2", resize=refused),
    *linear_rows(r"fc\.1", "fc"),
    BATCH_NORM_COUNT,
]


def torch_keys(variant: Variant) -> list[str]:
    """Return the names of leaderj1001's code, in its order."""
    v, keys = variant, ["conv1.weight", *batch_norm("bn1")]
    for block, projects in common.blocks(v.depths, 64, 4 * v.width):
        heads = f"{block}.conv2.0."
        attends = [heads + "rel_h", heads + "rel_w"]
        attends += affine(*(heads + part for part in ("query", "key", "value")))
        last = block.startswith(f"layer{len(v.depths)}.")
        keys += [f"{block}.conv1.weight", *batch_norm(f"{block}.bn1")]
        keys += attends if last else [f"{block}.conv2.weight"]
        keys += [*batch_norm(f"{block}.bn2"), f"{block}.conv3.weight", *batch_norm(f"{block}.bn3")]
        if projects:
            keys += [*affine(f"{block}.shortcut.0"), *batch_norm(f"{block}.shortcut.1")]
    return keys + affine("fc.1")


_FILE = Reference("cifar_botnet.py")
MEMBERS = {
    "cifar_botnet50": Member(
        _FILE, Paper("18.82", ""), counted_at=32, num_classes=10, title="BoTNet-50 at 32 px"
    ),
    "cifar_botnet50_224": Member(
        _FILE._replace(options={"small_stem": False}), num_classes=10, title="BoTNet-50"
    ),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"(conv1|bn1)\..*", head=r"fc\..*")
FAMILY = Family("cifar_botnet", "BoTNet", VARIANTS, create, NAMES, MEMBERS, "all")
