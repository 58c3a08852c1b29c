"""CoAtNet-0 of a study at 32 px: five stages, of which the last four convolve or attend by choice.

A stage's first block halves the map, to 1 x 1 at 32 px. The hidden units of a feed-forward part are
four times the channels that its block is given, also where it gives out twice as many.

Sources: Dai et al. 2021 (arXiv 2106.04803), as chinhsuanwu/coatnet-pytorch d3ef1c3 (MIT) has it; in
the study: Tang et al. 2022 (arXiv 2209.14105), Tables 1 and 2. Parity:
tests/models/cifar/test_stages.py against golden logits of that repository. The row of 224 px is
ours: the same network, whose tables of position biases are larger.
"""

import math
from collections.abc import Mapping
from re import Match
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrobust.models.cifar.shared import common
from jaxrobust.models.cifar.shared.common import conv
from jaxrobust.models.cifar.shared.transformer import EPS, Mlp, check
from jaxrobust.models.families.swin import relative_index
from jaxrobust.models.interface.classifier import classifier, of_stages, run_blocks
from jaxrobust.models.interface.family import Family, Member, Names, Paper, Reference
from jaxrobust.models.interface.renaming import (
    BATCH_NORM_COUNT,
    Row,
    affine,
    batch_norm,
    conv_oihw,
    drop,
    linear_oi,
    row,
)
from jaxrobust.models.kernels import attention, pooling
from jaxrobust.models.kernels.primitives import widened
from jaxrobust.models.modules.activations import ACTIVATIONS
from jaxrobust.models.modules.basic import BatchNorm, LayerNorm, Linear, Normalize
from jaxrobust.models.modules.initializers import Draws
from jaxrobust.models.modules.stochastic_depth import Drop, branches
from jaxrobust.types import Array, Classifier


class Variant(NamedTuple):
    """One row of the table: every field can be overridden in `models.create`."""

    order: str = "CCTT"  # of the stages behind the stem: C convolutions, T attention; C is first
    dims: tuple[int, ...] = (64, 96, 192, 384, 768)  # of the stem and those stages
    depths: tuple[int, ...] = (2, 2, 3, 5, 2)
    heads: int = 8
    head_dim: int = 32
    activation: str = "gelu"  # everywhere; or relu, silu, softplus
    bn_group: int = 0  # batch statistics in training: of the whole batch, or of so many images
    drop_path: float = 0.0  # of the last block; grows linearly from 0 at the first
    in_channels: int = 3
    remat: bool = False  # recompute each block in the backward pass instead of storing it
    dtype: str = "float32"  # compute type; parameters stay float32


VARIANTS = {"cifar_coatnet": Variant(), "cifar_coatnet_224": Variant()}


class Stem(nnx.Module):
    """act(BN(3x3(x)))."""

    def __init__(
        self, ins: int, outs: int, stride: int, side: int, v: Variant, rngs: Draws
    ) -> None:
        self.conv = conv(ins, outs, 3, rngs, stride)
        self.norm, self.act = BatchNorm(outs, group=v.bn_group), ACTIVATIONS[v.activation]

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        return self.act(self.norm(self.conv(x), train))


class Squeeze(nnx.Module):
    """Scale each channel by a sigmoid of two linear maps of all channels' means."""

    def __init__(self, channels: int, hidden: int, v: Variant, rngs: Draws) -> None:
        self.fc1 = Linear(channels, hidden, bias=False, torch_init=True, rngs=rngs)
        self.fc2 = Linear(hidden, channels, bias=False, torch_init=True, rngs=rngs)
        self.act = ACTIVATIONS[v.activation]

    def __call__(self, x: Array) -> Array:
        gate = jax.nn.sigmoid(self.fc2(self.act(self.fc1(x.mean(axis=(1, 2))))))
        # In float32: the gate's gradient is a sum over pixels.
        wide, gate = widened(x, gate)
        return (wide * gate[:, None, None]).astype(x.dtype)


class Convolve(nnx.Module):
    """x + (BN, 1x1, BN, act, depthwise 3x3, BN, act, squeeze, 1x1, BN)(x).

    The first 1x1 convolution has the stride; the shortcut then is a 1x1 of the largest of 3x3.
    """

    def __init__(
        self, ins: int, outs: int, stride: int, side: int, v: Variant, rngs: Draws
    ) -> None:
        hidden, group = 4 * ins, v.bn_group
        self.proj = conv(ins, outs, 1, rngs) if stride > 1 else None
        self.norm = BatchNorm(ins, group=group)
        self.conv1 = conv(ins, hidden, 1, rngs, stride)
        self.conv2 = conv(hidden, hidden, 3, rngs, groups=hidden)
        self.conv3 = conv(hidden, outs, 1, rngs)
        self.bn1, self.bn2 = (BatchNorm(hidden, group=group) for _ in range(2))
        self.bn3, self.se = BatchNorm(outs, group=group), Squeeze(hidden, ins // 4, v, rngs)
        self.act = ACTIVATIONS[v.activation]

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        (path,) = branches(drop, 1)
        y = self.act(self.bn1(self.conv1(self.norm(x, train)), train))
        y = self.act(self.bn2(self.conv2(y), train))
        y = self.bn3(self.conv3(self.se(y)), train)
        shortcut = x if self.proj is None else self.proj(pooling.max_pool(x))
        return shortcut + path(y)


class Attention(nnx.Module):
    """Attention in f[B,S,S,ins], with a learned bias for each offset and head."""

    def __init__(self, ins: int, outs: int, side: int, v: Variant, rngs: Draws) -> None:
        inner = v.heads * v.head_dim
        self.relative_bias_table = nnx.Param(jnp.zeros(((2 * side - 1) ** 2, v.heads)))
        self.to_qkv = Linear(ins, 3 * inner, bias=False, torch_init=True, rngs=rngs)
        self.to_out = Linear(inner, outs, torch_init=True, rngs=rngs)
        self.heads, self.side = v.heads, side

    def __call__(self, x: Array) -> Array:
        batch, side, tokens = x.shape[0], self.side, self.side**2
        # Wide, as the gradients of an offset's pairs are added up in the type of its bias.
        (table,) = widened(self.relative_bias_table[...])
        bias = table[relative_index(side).ravel()].reshape(tokens, tokens, -1).transpose(2, 0, 1)
        qkv = self.to_qkv(x).reshape(batch, tokens, 3, self.heads, -1)
        y = attention.attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], bias=bias)
        return self.to_out(y).reshape(batch, side, side, -1)


class Attend(nnx.Module):
    """x + attention(LN(x)), then x + feed-forward(LN(x)).

    With a stride both start from the largest of 3x3, and the first shortcut is a 1x1 of it.
    """

    def __init__(
        self, ins: int, outs: int, stride: int, side: int, v: Variant, rngs: Draws
    ) -> None:
        self.proj = conv(ins, outs, 1, rngs) if stride > 1 else None
        self.norm1, self.attn = LayerNorm(ins, eps=EPS), Attention(ins, outs, side, v, rngs)
        self.norm2, self.mlp = LayerNorm(outs, eps=EPS), Mlp(outs, 4 * ins, v.activation, rngs)

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        attn_path, mlp_path = branches(drop, 2)
        x = x if self.proj is None else pooling.max_pool(x)
        shortcut = x if self.proj is None else self.proj(x)
        x = shortcut + attn_path(self.attn(self.norm1(x)))
        return x + mlp_path(self.mlp(self.norm2(x)))


BLOCKS: dict[str, type[nnx.Module]] = {"C": Convolve, "T": Attend}


class CoAtNet(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, variant: Variant, num_classes: int, image_size: int, rngs: Draws) -> None:
        v = variant
        self.normalize = Normalize(v.in_channels)
        kinds: list[Any] = [Stem, *(BLOCKS[letter] for letter in v.order)]
        ins, stages = v.in_channels, []
        for i, (kind, outs, depth) in enumerate(zip(kinds, v.dims, v.depths, strict=True)):
            side = image_size >> (i + 1)
            rows = [(ins, 2)] + [(outs, 1)] * (depth - 1)
            stages.append(nnx.List([kind(a, outs, stride, side, v, rngs) for a, stride in rows]))
            ins = outs
        self.stages = nnx.List(stages)
        self.head = Linear(ins, num_classes, bias=False, torch_init=True, rngs=rngs)
        self.variant, self.image_size = v, image_size

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v, size = self.variant, self.image_size
        if "T" in v.order and images.shape[1:3] != (size, size):
            raise ValueError(
                f"images have shape {images.shape}, but the position biases of this network are "
                f"those of image_size={size}; create it with the images' size"
            )
        x = self.normalize(images).astype(jnp.dtype(v.dtype))
        how = of_stages(v.depths, train=train, key=key, drop_path=v.drop_path, remat=v.remat)
        for stage, told in zip(self.stages, how, strict=True):
            x = run_blocks(stage, x, **told)
        return self.head(x.mean(axis=(1, 2)))


def create(variant: Variant, *, num_classes: int, image_size: int) -> Classifier:
    """Return the network of one row; `ValueError` where the row or the size cannot work."""
    v = variant
    check(v, "head_dim")
    common.check_stages(v, "dims", "depths")
    if min(v.dims) < 4:
        raise ValueError(f"dims={v.dims} must be at least 4: a squeeze has a quarter of them")
    stages = len(v.dims) - 1
    if len(v.order) != stages or set(v.order) - BLOCKS.keys() or not v.order.startswith("C"):
        example = "CCTT" if stages == 4 else "C" * stages
        raise ValueError(
            f"order={v.order!r} names the {stages} stages behind the stem, C (convolutions) or T "
            f"(attention) for each and C for the first; write {example!r}, for example"
        )
    common.check(v, heads=1, bn_group=0)
    whole = 1 << len(v.dims)
    if image_size < whole or image_size % whole:
        raise ValueError(
            f"image_size={image_size}: each of the {len(v.dims)} stages halves the map, so take a "
            f"multiple of {whole}"
        )
    make = lambda rngs: CoAtNet(v, num_classes, image_size, rngs)  # noqa: E731
    return classifier(make, dtype=jnp.dtype(v.dtype))


def cropped(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a table of position biases for a smaller map: every offset keeps its bias.

    What is no such table, or has other heads, comes back as it is.

    Raises:
      ValueError: the new map is larger, so that there are offsets without a bias.
    """
    if table.ndim != 2 or len(shape) != 2 or table.shape[1] != shape[1]:
        return table
    old, new = math.isqrt(len(table)), math.isqrt(shape[0])
    if old**2 != len(table) or old % 2 == 0:
        return table
    if new > old:
        raise ValueError(
            f"relative position biases of a map of {(old + 1) // 2} do not reach all of one of "
            f"{(new + 1) // 2}; keep the image size that the weights were trained with"
        )
    cut = slice((old - new) // 2, (old + new) // 2)
    return table.reshape(old, old, -1)[cut, cut].reshape(new * new, -1)


def _index(ours: Mapping[str, Any], match: Match[str]) -> np.ndarray:
    """Compute the index that the reference stores beside a table: the row that each pair reads."""
    entries = ours[match.expand(r"stages.\1.\2.attn.relative_bias_table")].shape[0]
    return relative_index((math.isqrt(entries) + 1) // 2).reshape(-1, 1)


_BLOCK = r"s([0-9])\.(\d+)\."
_OURS = r"stages.\1.\2."
_CONVS = {r"0": "conv", "proj": "proj", r"conv\.fn\.0": "conv1", r"conv\.fn\.3": "conv2"}
_CONVS |= {r"conv\.fn\.7": "conv3"}
_BATCH_NORMS = {"1": "norm", r"conv\.norm": "norm"}
_BATCH_NORMS |= {rf"conv\.fn\.{place}": f"bn{i}" for i, place in enumerate((1, 4, 8), 1)}
_LAYER_NORMS = {r"attn\.1\.norm": "norm1", r"ff\.1\.norm": "norm2"}
_LINEARS = {r"conv\.fn\.6\.fc\.0": "se.fc1", r"conv\.fn\.6\.fc\.2": "se.fc2"}
_LINEARS |= {r"attn\.1\.fn\.to_qkv": "attn.to_qkv", r"attn\.1\.fn\.to_out\.0": "attn.to_out"}
_LINEARS |= {r"ff\.1\.fn\.net\.0": "mlp.fc1", r"ff\.1\.fn\.net\.3": "mlp.fc2"}
TORCH_NAMES: list[Row] = [
    *(row(rf"{_BLOCK}{a}\.weight", f"{_OURS}{b}.kernel", conv_oihw) for a, b in _CONVS.items()),
    *(row(rf"{_BLOCK}{a}\.weight", f"{_OURS}{b}.kernel", linear_oi) for a, b in _LINEARS.items()),
    *(
        row(rf"{_BLOCK}{a}\.weight", f"{_OURS}{b}.scale")
        for a, b in (_BATCH_NORMS | _LAYER_NORMS).items()
    ),
    *(
        row(rf"{_BLOCK}{a}\.bias", f"{_OURS}{b}.bias")
        for a, b in (_BATCH_NORMS | _LAYER_NORMS | _LINEARS).items()
    ),
    *(row(rf"{_BLOCK}{a}\.running_(mean|var)", rf"{_OURS}{b}.\3") for a, b in _BATCH_NORMS.items()),
    row(
        rf"{_BLOCK}attn\.1\.fn\.relative_bias_table",
        f"{_OURS}attn.relative_bias_table",
        resize=cropped,
    ),
    drop(rf"{_BLOCK}attn\.1\.fn\.relative_index", "follows from the size of the map", _index),
    row(r"fc\.weight", "head.kernel", linear_oi),
    BATCH_NORM_COUNT,
]


def torch_keys(variant: Variant) -> list[str]:
    """Return the repository's names in its order."""
    keys = [
        key
        for i in range(variant.depths[0])
        for key in (f"s0.{i}.0.weight", *batch_norm(f"s0.{i}.1"))
    ]
    for i, (letter, depth) in enumerate(zip(variant.order, variant.depths[1:], strict=True), 1):
        for block in (f"s{i}.{j}" for j in range(depth)):
            keys += [f"{block}.proj.weight"] if block.endswith(".0") else []
            keys += _convolve_keys(f"{block}.conv") if letter == "C" else _attend_keys(block)
    return [*keys, "fc.weight"]


def _convolve_keys(conv: str) -> list[str]:
    fn = f"{conv}.fn"
    keys = [*batch_norm(f"{conv}.norm"), f"{fn}.0.weight", *batch_norm(f"{fn}.1")]
    keys += [f"{fn}.3.weight", *batch_norm(f"{fn}.4")]
    keys += [f"{fn}.6.fc.0.weight", f"{fn}.6.fc.2.weight"]
    return [*keys, f"{fn}.7.weight", *batch_norm(f"{fn}.8")]


def _attend_keys(block: str) -> list[str]:
    attn, ff = f"{block}.attn.1", f"{block}.ff.1"
    tables = [f"{attn}.fn.relative_bias_table", f"{attn}.fn.relative_index"]
    keys = [*affine(f"{attn}.norm"), *tables, f"{attn}.fn.to_qkv.weight"]
    return keys + affine(f"{attn}.fn.to_out.0", f"{ff}.norm", f"{ff}.fn.net.0", f"{ff}.fn.net.3")


MEMBERS = {
    "cifar_coatnet": Member(
        Reference("cifar_coatnet.py"),
        Paper("16.99", ""),
        counted_at=32,
        num_classes=10,
        title="CoAtNet-0 (32 px)",
    ),
    "cifar_coatnet_224": Member(
        Reference("cifar_coatnet.py"), num_classes=10, title="CoAtNet-0 (224 px)"
    ),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"stages\.0\..*", head=r"head\..*")
FAMILY = Family("cifar_coatnet", "CoAtNet", VARIANTS, create, NAMES, MEMBERS, "all")
