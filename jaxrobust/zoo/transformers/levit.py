"""LeViT-128S: attention with batch norms, on a map that shrinks from stage to stage.

Source: Graham et al. 2021 (arXiv 2104.01136), as in facebookresearch/LeViT (3772b8e), with one
classifier. The study names a LeViT of 6.67M parameters without a definition. No public LeViT has
this many, and thousands of settings would fit. At 32 px this is the official network, 7.01M, with
strides 2, 2, 1, 1 in the stem instead of 2, 2, 2, 2, which leaves 8x8 tokens.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.classifier import run_blocks
from jaxrobust.models.interface.family import BatchNormRow, Names
from jaxrobust.models.interface.renaming import BATCH_NORM_COUNT, drop, keys, row, table
from jaxrobust.models.kernels import attention
from jaxrobust.models.kernels.primitives import widened
from jaxrobust.models.modules.basic import ACTIVATIONS, BatchNorm, Linear, Normalize
from jaxrobust.models.modules.draws import Draws, Drop, branches, normal_02, torch_default
from jaxrobust.types import Array, ModuleMaker
from jaxrobust.zoo.shared import common, convolutions


class Variant(BatchNormRow):
    """A row of the table: `models.create` can override every field."""

    dims: tuple[int, ...] = (128, 256, 384)  # of the stages
    depths: tuple[int, ...] = (2, 3, 4)
    heads: tuple[int, ...] = (4, 6, 8)
    key_width: int = 16  # of each head's queries and keys; values have twice as many
    stem_strides: tuple[int, ...] = (2, 2, 1, 1)  # of four convolutions
    activation: str = "hard_swish"  # everywhere
    scale_init: float = 0.0  # of the last norms of the residual branches


class LinearNorm(nnx.Module):
    """Linear map without a bias, batch norm, whose scale starts at `init`."""

    def __init__(self, ins: int, outs: int, group: int, rngs: Draws, init: float = 1.0) -> None:
        self.linear = Linear(ins, outs, bias=False, init=torch_default, rngs=rngs)
        self.bn = BatchNorm(outs, group=group)
        self.bn.scale = nnx.Param(jnp.full(outs, init, jnp.float32))

    def __call__(self, x: Array, train: bool) -> Array:
        return self.bn(self.linear(x), train)


def offset_index(side: int, stride: int) -> np.ndarray:
    """Return i[Q,N]: the index of a bias, by the rows and columns between query and key.

    Keys are the pixels of a map of `side`, queries every `stride`-th of them.
    """
    key, query = np.arange(side), np.arange(0, side, stride)
    apart = np.abs(query[:, None] - key[None])
    index = apart[:, None, :, None] * side + apart[None, :, None, :]
    return index.reshape(query.size**2, side**2)


class Attention(nnx.Module):
    """x + attention of f[B,N,D] with a bias for each distance, activation, linear map.

    With `stride` 2, queries are every second pixel of every second row, without a residual.
    """

    def __init__(
        self, ins: int, outs: int, heads: int, side: int, stride: int, v: Variant, rngs: Draws
    ) -> None:
        keys, values = heads * v.key_width, heads * v.key_width * 2 * stride
        self.attention_biases = nnx.Param(jnp.zeros((heads, side * side)))
        if stride == 1:
            self.qkv = LinearNorm(ins, 2 * keys + values, v.bn_group, rngs)
        else:
            self.kv = LinearNorm(ins, keys + values, v.bn_group, rngs)
            self.q = LinearNorm(ins, keys, v.bn_group, rngs)
        start = v.scale_init if stride == 1 else 1.0
        self.proj = LinearNorm(values, outs, v.bn_group, rngs, start)
        self.heads, self.side, self.stride, self.width = heads, side, stride, v.key_width
        self.act = ACTIVATIONS[v.activation]

    def split(self, x: Array, train: bool) -> list[Array]:
        batch, tokens, dim = x.shape
        if self.stride == 1:
            heads = self.qkv(x, train).reshape(batch, tokens, self.heads, -1)
            return jnp.split(heads, (self.width, 2 * self.width), axis=3)
        heads = self.kv(x, train).reshape(batch, tokens, self.heads, -1)
        grid = x.reshape(batch, self.side, self.side, dim)[:, :: self.stride, :: self.stride]
        q = self.q(grid.reshape(batch, -1, dim), train).reshape(batch, -1, self.heads, self.width)
        return [q, *jnp.split(heads, (self.width,), axis=3)]

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        (path,) = branches(drop, 1)
        q, k, v = self.split(x, train)
        # Wide, because gradients of a distance's pairs are summed in the type of its bias.
        (biases,) = widened(self.attention_biases[...])
        bias = biases[:, offset_index(self.side, self.stride)]
        y = self.proj(self.act(attention.attention(q, k, v, bias=bias)), train)
        return x + path(y) if self.stride == 1 else y


class Mlp(nnx.Module):
    """x + linear map to twice the width, activation, linear map back."""

    def __init__(self, dim: int, v: Variant, rngs: Draws) -> None:
        self.fc1 = LinearNorm(dim, 2 * dim, v.bn_group, rngs)
        self.fc2 = LinearNorm(2 * dim, dim, v.bn_group, rngs, v.scale_init)
        self.act = ACTIVATIONS[v.activation]

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        (path,) = branches(drop, 1)
        return x + path(self.fc2(self.act(self.fc1(x, train)), train))


def blocks(v: Variant, side: int, rngs: Draws) -> list[nnx.Module]:
    """List attentions and MLPs in turn, with shrinking ones between the stages."""
    modules: list[nnx.Module] = []
    for i, (dim, depth, heads) in enumerate(zip(v.dims, v.depths, v.heads, strict=True)):
        if i:
            previous = v.dims[i - 1]
            modules.append(Attention(previous, dim, previous // v.key_width, side, 2, v, rngs))
            modules.append(Mlp(dim, v, rngs))
            side = -(-side // 2)
        for _ in range(depth):
            modules.append(Attention(dim, dim, heads, side, 1, v, rngs))
            modules.append(Mlp(dim, v, rngs))
    return modules


class LeViT(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, side: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        widths = [v.in_channels, *(v.dims[0] >> i for i in (3, 2, 1, 0))]
        convs = zip(widths, widths[1:], v.stem_strides, strict=False)
        options: dict[str, Any] = {"v": v, "rngs": rngs, "act": False}
        stem = [convolutions.ConvNorm(a, b, 3, stride=stride, **options) for a, b, stride in convs]
        self.patch_embed = nnx.List(stem)
        self.blocks = nnx.List(blocks(v, side, rngs))
        self.norm = BatchNorm(v.dims[-1], group=v.bn_group)
        self.head = Linear(v.dims[-1], num_classes, init=normal_02, rngs=rngs)
        self.variant, self.side = v, side

    def tokens(self, images: Array, train: bool) -> Array:
        x, act = images, ACTIVATIONS[self.variant.activation]
        for i, layer in enumerate(self.patch_embed):
            x = layer(act(x) if i else x, train)
        _, height, width, dim = x.shape
        fits, biases = (height, width) == (self.side,) * 2, f"biases for {self.side}x{self.side}"
        architecture_checks.check_fits(fits, images, f"{height}x{width} tokens", biases)
        return x.reshape(-1, height * width, dim)

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.tokens(self.normalize(images).astype(jnp.dtype(v.dtype)), train)
        rates = np.linspace(0, v.drop_path, len(self.blocks)).tolist()
        x = run_blocks(self.blocks, x, train=train, key=key, rates=rates, remat=v.remat)
        return self.head(self.norm(x.mean(axis=1), train))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Make the maker of a row's network; `ValueError` where the row or the size cannot work."""
    architecture_checks.check_tuples(v, "dims", "depths", "heads", "stem_strides")
    if len({len(v.dims), len(v.depths), len(v.heads)}) > 1:
        raise ValueError(
            f"dims={v.dims}, depths={v.depths} and heads={v.heads} must have the same length"
        )
    if len(v.stem_strides) != 4:
        raise ValueError(f"stem_strides={v.stem_strides} needs four entries, one per convolution")
    architecture_checks.check_row(v, key_width=1, in_channels=1, bn_group=0)
    if v.dims[0] % 8 or any(dim % v.key_width for dim in v.dims[:-1]):
        raise ValueError(
            f"dims={v.dims}: the first must be a multiple of 8, for the stem's widths, and all but "
            f"the last multiples of key_width={v.key_width}, for the heads between stages"
        )
    side = architecture_checks.whole_patches(v, image_size)
    return lambda rngs: LeViT(v, num_classes, side, rngs)


def _index(target: Mapping[str, Any], match: re.Match[str]) -> np.ndarray:
    """Return the buffer of bias indices from LeViT's own code."""
    side = math.isqrt(target[f"{match[1]}.attention_biases"].shape[1])
    return offset_index(side, 1 if ".m." in match[0] else 2)


_REFUSED = common.refusing("position biases")
_BLOCK = r"(blocks\.\d+)(?:\.m)?"
# Their name -> ours, for linear maps and convolutions followed by a norm: in the blocks, and in the
# stem, which has activations between its convolutions.
_LINEARS = {"qkv": "qkv", "kv": "kv", r"q\.1": "q", r"proj\.1": "proj", "0": "fc1", "2": "fc2"}
_PAIRS = {rf"{_BLOCK}\.{source}": rf"\1.{target}" for source, target in _LINEARS.items()}
_STEM = {rf"patch_embed\.{2 * i}": f"patch_embed.{i}" for i in range(4)}
TORCH_NAMES = table(
    row(rf"{_BLOCK}\.attention_biases", r"\1.attention_biases", resize=_REFUSED),
    drop(rf"{_BLOCK}\.attention_bias_idxs", "follows from the side of the map", _index),
    BATCH_NORM_COUNT,
    convs={rf"{a}\.c": f"{b}.conv" for a, b in _STEM.items()},
    norms={rf"{a}\.bn": f"{b}.bn" for a, b in (_STEM | _PAIRS).items()} | {r"head\.bn": "norm"},
    linears={rf"{a}\.c": f"{b}.linear" for a, b in _PAIRS.items()} | {r"head\.l": "head"},
)


def torch_keys(v: Variant) -> list[str]:
    """List the names of LeViT's own code, in its order."""
    names = keys("patch_embed", " ".join(f"{i}.c:w {i}.bn:bn" for i in (0, 2, 4, 6)))
    number = 0
    for stage, depth in enumerate(v.depths):
        kinds = [("", ("kv", "q.1", "proj.1"))] * (stage > 0) + [(".m", ("qkv", "proj.1"))] * depth
        for inside, parts in kinds:
            block, mlp = f"blocks.{number}{inside}", f"blocks.{number + 1}.m"
            names += keys(block, "attention_biases: attention_bias_idxs:")
            for pair in (*(f"{block}.{part}" for part in parts), f"{mlp}.0", f"{mlp}.2"):
                names += keys(pair, "c:w bn:bn")
            number += 2
    return names + keys("head", "bn:bn l")


_NETWORKS = {
    "cifar_levit": common.Study("LeViT-128S at 32 px", counted="6.67", other=True),
    "cifar_levit_224": common.Study("LeViT-128S", {"stem_strides": (2, 2, 2, 2)}),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"patch_embed\..*", head=r"head\..*")
FAMILY = common.family("cifar_levit", "LeViT", Variant, maker, NAMES, _NETWORKS, any_size=False)
