"""CoAtNet-0: five stages; each of the last four has convolutions or attention.

A stage's first block halves the map, to 1 x 1 at 32 px. A feed-forward part has four times as many
hidden units as its block has input channels, even if the block doubles the channels.

Source: Dai et al. 2021 (arXiv 2106.04803), as in chinhsuanwu/coatnet-pytorch d3ef1c3 (MIT). The row
for 224 px is the same network with larger tables of position biases.
"""

import math
from collections.abc import Mapping
from re import Match
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrobust.models.families import residual
from jaxrobust.models.families.robust_resnets.robust_blocks import Squeeze
from jaxrobust.models.families.swin import cut_to, relative_index, sides_of
from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.classifier import of_stages, run_blocks
from jaxrobust.models.interface.family import BatchNormRow, Names
from jaxrobust.models.interface.renaming import BATCH_NORM_COUNT, drop, keys, row, table
from jaxrobust.models.kernels import attention, pooling
from jaxrobust.models.kernels.primitives import widened
from jaxrobust.models.modules.basic import ACTIVATIONS, BatchNorm, LayerNorm, Linear, Normalize
from jaxrobust.models.modules.draws import Draws, Drop, branches, torch_default
from jaxrobust.types import Array, ModuleMaker
from jaxrobust.zoo.shared import common
from jaxrobust.zoo.shared.transformer import EPS, Mlp, check


class Variant(BatchNormRow):
    """A row of the table: `models.create` can override every field."""

    order: str = "CCTT"  # of the stages after the stem: C convolutions, T attention; C is first
    dims: tuple[int, ...] = (64, 96, 192, 384, 768)  # of the stem and those stages
    depths: tuple[int, ...] = (2, 2, 3, 5, 2)
    heads: int = 8
    head_dim: int = 32
    activation: str = "gelu"  # everywhere; or relu, silu, softplus


class Stem(nnx.Module):
    """act(BN(3x3(x)))."""

    def __init__(
        self, ins: int, outs: int, stride: int, side: int, v: Variant, rngs: Draws
    ) -> None:
        self.conv = residual.conv(ins, outs, 3, rngs, stride)
        self.norm, self.act = BatchNorm(outs, group=v.bn_group), ACTIVATIONS[v.activation]

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        return self.act(self.norm(self.conv(x), train))


class Convolve(nnx.Module):
    """x + (BN, 1x1, BN, act, depthwise 3x3, BN, act, squeeze, 1x1, BN)(x).

    The first 1x1 convolution has the stride; the shortcut is then 3x3 max pooling and a 1x1.
    """

    def __init__(
        self, ins: int, outs: int, stride: int, side: int, v: Variant, rngs: Draws
    ) -> None:
        hidden, group = 4 * ins, v.bn_group
        self.proj = residual.conv(ins, outs, 1, rngs) if stride > 1 else None
        self.norm = BatchNorm(ins, group=group)
        self.conv1 = residual.conv(ins, hidden, 1, rngs, stride)
        self.conv2 = residual.conv(hidden, hidden, 3, rngs, groups=hidden)
        self.conv3 = residual.conv(hidden, outs, 1, rngs)
        self.bn1, self.bn2 = (BatchNorm(hidden, group=group) for _ in range(2))
        self.bn3 = BatchNorm(outs, group=group)
        self.se = Squeeze(hidden, ins // 4, rngs, v.activation)
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
        self.to_qkv = Linear(ins, 3 * inner, bias=False, init=torch_default, rngs=rngs)
        self.to_out = Linear(inner, outs, init=torch_default, rngs=rngs)
        self.heads, self.side = v.heads, side

    def __call__(self, x: Array) -> Array:
        batch, side, tokens = x.shape[0], self.side, self.side**2
        # Wide, because gradients of an offset's pairs are summed in the type of its bias.
        (table,) = widened(self.relative_bias_table[...])
        bias = table[relative_index(side).ravel()].reshape(tokens, tokens, -1).transpose(2, 0, 1)
        qkv = self.to_qkv(x.reshape(batch, tokens, -1))
        y = attention.self_attention(qkv, self.heads, bias=bias)
        return self.to_out(y).reshape(batch, side, side, -1)


class Attend(nnx.Module):
    """x + attention(LN(x)), then x + feed-forward(LN(x)).

    With a stride, both start from 3x3 max pooling, and the first shortcut is a 1x1 of it.
    """

    def __init__(
        self, ins: int, outs: int, stride: int, side: int, v: Variant, rngs: Draws
    ) -> None:
        self.proj = residual.conv(ins, outs, 1, rngs) if stride > 1 else None
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

    def __init__(self, v: Variant, num_classes: int, image_size: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        kinds: list[Any] = [Stem, *(BLOCKS[letter] for letter in v.order)]
        ins, stages = v.in_channels, []
        for i, (kind, outs, depth) in enumerate(zip(kinds, v.dims, v.depths, strict=True)):
            side = image_size >> (i + 1)
            rows = [(ins, 2)] + [(outs, 1)] * (depth - 1)
            stages.append(nnx.List([kind(a, outs, stride, side, v, rngs) for a, stride in rows]))
            ins = outs
        self.stages = nnx.List(stages)
        self.head = Linear(ins, num_classes, bias=False, init=torch_default, rngs=rngs)
        self.variant, self.image_size = v, image_size

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v, size = self.variant, self.image_size
        if "T" in v.order and images.shape[1:3] != (size, size):
            raise ValueError(
                f"images have shape {images.shape}, but this network has the position biases of "
                f"image_size={size}; create it with the images' size"
            )
        x = self.normalize(images).astype(jnp.dtype(v.dtype))
        for stage, settings in zip(self.stages, of_stages(v, train, key), strict=True):
            x = run_blocks(stage, x, **settings)
        return self.head(x.mean(axis=(1, 2)))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Make the maker of a row's network; `ValueError` where the row or the size cannot work."""
    check(v, "head_dim")
    architecture_checks.check_stages(v, "dims", "depths")
    if min(v.dims) < 4:
        raise ValueError(
            f"dims={v.dims} must be at least 4, because squeeze layers have a quarter of the "
            "channels"
        )
    stages = len(v.dims) - 1
    if len(v.order) != stages or set(v.order) - BLOCKS.keys() or not v.order.startswith("C"):
        example = "CCTT" if stages == 4 else "C" * stages
        raise ValueError(
            f"order={v.order!r} must name the {stages} stages after the stem: C (convolutions) for "
            f"the first, C or T (attention) for the others; write {example!r}, for example"
        )
    architecture_checks.check_row(v, heads=1, bn_group=0)
    multiple = 1 << len(v.dims)
    if image_size < multiple or image_size % multiple:
        raise ValueError(
            f"image_size={image_size}: each of the {len(v.dims)} stages halves the map, so use a "
            f"multiple of {multiple}"
        )
    return lambda rngs: CoAtNet(v, num_classes, image_size, rngs)


def cropped(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a table of position biases for a smaller map: every offset keeps its bias.

    Other arrays, and tables for other heads, are returned unchanged.

    Raises:
      ValueError: the new map is larger, so some offsets have no bias.
    """
    if (sides := sides_of(table, shape)) is None:
        return table
    if sides[1] > sides[0]:
        raise ValueError(
            f"relative position biases of a map of side {sides[0]} do not cover side {sides[1]}; "
            "keep the image size that the weights were trained with"
        )
    return cut_to(table, *sides)


def _index(target: Mapping[str, Any], match: Match[str]) -> np.ndarray:
    """Compute the index that the reference stores next to a table: the row for each pair."""
    entries = target[match.expand(r"stages.\1.\2.attn.relative_bias_table")].shape[0]
    return relative_index((math.isqrt(entries) + 1) // 2).reshape(-1, 1)


_BLOCK = r"s([0-9])\.(\d+)\."
_OURS = r"stages.\1.\2."
_ATTN = rf"{_BLOCK}attn\.1\.fn\."
TORCH_NAMES = table(
    row(f"{_ATTN}relative_bias_table", f"{_OURS}attn.relative_bias_table", resize=cropped),
    drop(f"{_ATTN}relative_index", "follows from the size of the map", _index),
    *table(linears={"fc": "head"}),
    BATCH_NORM_COUNT,
    prefix=_BLOCK,
    our_prefix=_OURS,
    convs={
        "0": "conv",
        "proj": "proj",
        r"conv\.fn\.0": "conv1",
        r"conv\.fn\.3": "conv2",
        r"conv\.fn\.7": "conv3",
    },
    norms={
        r"(?:1|conv\.norm)": "norm",
        r"conv\.fn\.1": "bn1",
        r"conv\.fn\.4": "bn2",
        r"conv\.fn\.8": "bn3",
        r"attn\.1\.norm": "norm1",
        r"ff\.1\.norm": "norm2",
    },
    linears={
        r"conv\.fn\.6\.fc\.0": "se.fc1",
        r"conv\.fn\.6\.fc\.2": "se.fc2",
        r"attn\.1\.fn\.to_qkv": "attn.to_qkv",
        r"attn\.1\.fn\.to_out\.0": "attn.to_out",
        r"ff\.1\.fn\.net\.0": "mlp.fc1",
        r"ff\.1\.fn\.net\.3": "mlp.fc2",
    },
)

# The modules of a block, after its projection.
_MODULES = {
    "C": (
        "conv.norm:bn conv.fn.0:w conv.fn.1:bn conv.fn.3:w conv.fn.4:bn conv.fn.6.fc.0:w "
        "conv.fn.6.fc.2:w conv.fn.7:w conv.fn.8:bn"
    ),
    "T": (
        "attn.1.norm attn.1.fn.relative_bias_table: attn.1.fn.relative_index: attn.1.fn.to_qkv:w "
        "attn.1.fn.to_out.0 ff.1.norm ff.1.fn.net.0 ff.1.fn.net.3"
    ),
}


def torch_keys(v: Variant) -> list[str]:
    """List the repository's names in its order."""
    names = keys("s0", "0:w 1:bn", v.depths[0])
    for i, (letter, depth) in enumerate(zip(v.order, v.depths[1:], strict=True), 1):
        for j in range(depth):
            names += keys(f"s{i}.{j}", "" if j else "proj:w") + keys(f"s{i}.{j}", _MODULES[letter])
    return [*names, "fc.weight"]


_NETWORKS = {
    "cifar_coatnet": common.Study("CoAtNet-0 (32 px)", counted="16.99"),
    "cifar_coatnet_224": common.Study("CoAtNet-0 (224 px)"),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"stages\.0\..*", head=r"head\..*")
FAMILY = common.family("cifar_coatnet", "CoAtNet", Variant, maker, NAMES, _NETWORKS, any_size=False)
