"""ViTAE-S: convolutions parallel to attention, with several dilations where the map shrinks.

Source: Xu et al. 2021 (arXiv 2106.03348), as ViTAE_basic_14 in Annbless/ViTAE (a4c31bb): no
positions, no class token and no norm before the classifier; the last cell that shrinks the map has
neither attention nor convolutions parallel to it. At 32 px, four tokens are left. The study counts
the network with 1000 classes.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families import residual
from jaxrobust.models.families.vit import Attention
from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.classifier import of_one_stage, run_blocks
from jaxrobust.models.interface.family import BatchNormRow, Names
from jaxrobust.models.interface.renaming import BATCH_NORM_COUNT, keys, row, table
from jaxrobust.models.kernels import layers
from jaxrobust.models.kernels.primitives import widened
from jaxrobust.models.modules.basic import (
    ACTIVATIONS,
    BatchNorm,
    Conv,
    LayerNorm,
    Linear,
    Normalize,
    silu,
)
from jaxrobust.models.modules.draws import Draws, Drop, branches, dropouts, split, torch_default
from jaxrobust.types import Array, ModuleMaker
from jaxrobust.zoo.shared import common


class Variant(BatchNormRow):
    """A row of the table; `drop_path` and `remat` are of cells."""

    # For the cells that shrink the map:
    widths: tuple[int, ...] = (64, 64, 192)  # of their convolutions
    dims: tuple[int, ...] = (64, 64, 384)  # of their tokens
    ratios: tuple[int, ...] = (4, 2, 2)  # factors by which they shrink it
    kernels: tuple[int, ...] = (7, 3, 3)
    dilations: tuple[int, ...] = (4, 3, 2)  # number of dilations 1, 2, ...
    depth: int = 14  # of the cells after them
    heads: int = 6
    mlp_ratio: int = 3
    groups: int = 96  # of the convolutions parallel to attention
    activation: str = "gelu"  # in addition to the SiLU of the convolutions parallel to attention
    dropout: float = 0.1  # in the cells that shrink the map
    scan: bool = False  # compile one cell for all of the later ones


class Pyramid(nnx.Module):
    """Convolutions of several dilations side by side, activated: f[B,S,S,C] -> f[B,S',S',D]."""

    def __init__(self, ins: int, cell: int, v: Variant, rngs: Draws) -> None:
        kernel, stride, convs = v.kernels[cell], v.ratios[cell], []
        for dilation in range(1, v.dilations[cell] + 1):
            padding = math.ceil(((kernel - 1) * dilation + 1 - stride) / 2)
            options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
            convs.append(
                Conv(ins, v.widths[cell], kernel, init=torch_default, rngs=rngs, **options)
            )
        self.convs, self.act = nnx.List(convs), ACTIVATIONS[v.activation]

    def __call__(self, x: Array) -> Array:
        return jnp.concatenate([self.act(conv(x)) for conv in self.convs], axis=3)


class Performer(nnx.Module):
    """Attention through fixed positive random features: v + map(attended)."""

    def __init__(self, ins: int, dim: int, rngs: Draws) -> None:
        self.kqv, self.proj = Linear(ins, 3 * dim, rngs=rngs), Linear(dim, dim, rngs=rngs)
        count = dim // 2
        orthogonal = jax.nn.initializers.orthogonal(math.sqrt(count))
        self.w = nnx.BatchStat(orthogonal(rngs.params(), (count, dim)))

    def features(self, x: Array) -> Array:
        """Compute exp(w.x - |x|^2 / 2) / sqrt(m) of f[B,N,D], f[B,N,m]."""
        w = self.w[...].astype(x.dtype)
        half = (x * x).sum(axis=2, keepdims=True) / 2
        return jnp.exp(layers.linear(x, w.T) - half) / math.sqrt(w.shape[0])

    def __call__(self, x: Array, dropped: Callable[[Array], Array]) -> Array:
        k, q, v = jnp.split(self.kqv(x), 3, axis=2)
        wide_k, wide_q, wide_v = widened(k, q, v)  # sums over all tokens
        keys, queries = self.features(wide_k), self.features(wide_q)
        total = (queries * keys.sum(axis=1, keepdims=True)).sum(axis=2, keepdims=True)
        attended = queries @ (keys.transpose(0, 2, 1) @ wide_v) / (total + 1e-8)
        return v + dropped(self.proj(attended.astype(v.dtype)))


class Reduction(nnx.Module):
    """Performer over the pyramid, plus convolutions, then x + MLP(LN(x)); or only the pyramid."""

    def __init__(self, cell: int, v: Variant, rngs: Draws) -> None:
        ins = v.dims[cell - 1] if cell else v.in_channels
        self.prm, self.rate = Pyramid(ins, cell, v, rngs), v.dropout
        self.pcm = None if cell == len(v.dims) - 1 else Beside(ins, cell, v, rngs)
        if self.pcm is not None:
            channels, dim = v.dilations[cell] * v.widths[cell], v.dims[cell]
            self.attn = Performer(channels, dim, rngs)
            self.norm1, self.norm2 = LayerNorm(channels, eps=1e-5), LayerNorm(dim, eps=1e-5)
            self.fc1, self.fc2 = Linear(dim, dim, rngs=rngs), Linear(dim, dim, rngs=rngs)

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        y = self.prm(x)
        if self.pcm is None:
            return y
        attended, fed = dropouts(drop, 2, self.rate, paths=0)
        convolved = self.pcm(x, train)
        tokens = y.reshape(y.shape[0], -1, y.shape[3])
        y = self.attn(self.norm1(tokens), attended).reshape(convolved.shape) + convolved
        return y + fed(self.fc2(self.prm.act(self.fc1(self.norm2(y)))))


class Beside(nnx.Module):
    """Three 3x3 convolutions with SiLU and a batch norm after the second, that also shrink."""

    def __init__(self, ins: int, cell: int, v: Variant, rngs: Draws) -> None:
        ratio, width, dim = v.ratios[cell], v.widths[cell], v.dims[cell]
        sizes = ((ins, width), (width, width), (width, dim))
        strides = [2 if ratio >> (i + 1) else 1 for i in range(3)]
        pairs = zip(sizes, strides, strict=True)
        convs = [residual.conv(*size, 3, rngs, stride, bias=True) for size, stride in pairs]
        self.convs = nnx.List(convs)
        self.bn = BatchNorm(width, group=v.bn_group)

    def __call__(self, x: Array, train: bool) -> Array:
        first, second, third = self.convs
        x = silu(self.bn(second(silu(first(x))), train))
        return silu(third(x))


class Normal(nnx.Module):
    """x + attention(LN(x)) + three grouped 3x3 convolutions of x, then x + MLP(LN(x))."""

    def __init__(self, v: Variant, rngs: Draws) -> None:
        dim = v.dims[-1]
        wide, self.act = v.mlp_ratio * dim, ACTIVATIONS[v.activation]
        self.norm1, self.norm2 = LayerNorm(dim), LayerNorm(dim)
        self.attn = Attention(dim, v.heads, rngs)
        sizes = ((dim, wide), (wide, dim), (dim, dim))
        convs = [residual.conv(*size, 3, rngs, groups=v.groups, bias=True) for size in sizes]
        self.convs = nnx.List(convs)
        self.bn1, self.bn2 = BatchNorm(wide, group=v.bn_group), BatchNorm(dim, group=v.bn_group)
        self.fc1, self.fc2 = Linear(dim, wide, rngs=rngs), Linear(wide, dim, rngs=rngs)

    def beside(self, x: Array, train: bool) -> Array:
        first, second, third = self.convs
        side = round(x.shape[1] ** 0.5)
        y = silu(self.bn1(first(x.reshape(x.shape[0], side, side, -1)), train))
        return silu(third(silu(self.bn2(second(y), train)))).reshape(x.shape)

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        path1, path2, path3 = branches(drop, 3)
        convolved = path1(self.beside(x, train))
        x = x + path2(self.attn(self.norm1(x))) + convolved
        return x + path3(self.fc2(self.act(self.fc1(self.norm2(x)))))


class ViTAE(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        self.reductions = nnx.List([Reduction(i, v, rngs) for i in range(len(v.dims))])
        self.blocks = nnx.List([Normal(v, rngs) for _ in range(v.depth)])
        self.head = Linear(v.dims[-1], num_classes, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        if (side := images.shape[1]) != images.shape[2] or side % math.prod(v.ratios):
            raise ValueError(f"images have shape {images.shape}; {_whole(v)}")
        x = self.normalize(images).astype(jnp.dtype(v.dtype))
        first, last = (None, None) if key is None else split(key, 2)
        draws = v.dropout > 0
        x = run_blocks(self.reductions, x, train=train, key=first, draws=draws, remat=v.remat)
        x = x.reshape(x.shape[0], -1, x.shape[3])
        x = run_blocks(self.blocks, x, **of_one_stage(v, train, last))
        return self.head(x.mean(axis=1))


def _whole(v: Variant) -> str:
    return f"three cells shrink the map, so use a square, a multiple of {math.prod(v.ratios)} px"


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Make the maker of a row's network; `ValueError` where the row or the size cannot work."""
    cells = ("widths", "dims", "ratios", "kernels", "dilations")
    architecture_checks.check_tuples(v, *cells)
    if len({len(getattr(v, name)) for name in cells}) > 1:
        raise ValueError(f"{', '.join(cells)} must have the same length: one entry for each cell")
    if set(v.ratios) - {2, 4, 8}:
        raise ValueError(f"ratios={v.ratios}: a cell shrinks the map by 2, 4 or 8")
    if v.dilations[-1] * v.widths[-1] != (dim := v.dims[-1]):
        raise ValueError(
            f"the tokens have the channels of the last cell, {v.dilations[-1]} times "
            f"{v.widths[-1]}, so dims={v.dims} must end with {v.dilations[-1] * v.widths[-1]}"
        )
    architecture_checks.check_row(
        v, depth=1, heads=1, mlp_ratio=1, groups=1, in_channels=1, bn_group=0
    )
    for name in ("heads", "groups"):
        if dim % (value := getattr(v, name)):
            raise ValueError(f"{name}={value} must divide the last of dims={v.dims}")
    if image_size < (step := math.prod(v.ratios)) or image_size % step:
        raise ValueError(f"image_size={image_size}: {_whole(v)}")
    return lambda rngs: ViTAE(v, num_classes, rngs)


_CELL, _NORMAL = r"layers\.(\d+)\.RC\.", r"layers\.\d+\.NC\.(\d+)\."
TORCH_NAMES = table(
    row(rf"{_CELL}attn\.w", r"reductions.\1.attn.w"),
    BATCH_NORM_COUNT,
    convs={
        rf"{_CELL}PRM\.convs\.(\d+)\.0": r"reductions.\1.prm.convs.\2",
        **{rf"{_CELL}PCM\.{at}": rf"reductions.\1.pcm.convs.{i}" for i, at in enumerate((0, 2, 5))},
        **{rf"{_NORMAL}PCM\.{3 * i}": rf"blocks.\1.convs.{i}" for i in range(3)},
    },
    norms={
        rf"{_CELL}PCM\.3": r"reductions.\1.pcm.bn",
        rf"{_CELL}attn\.(norm[12])": r"reductions.\1.\2",
        rf"{_NORMAL}(norm[12])": r"blocks.\1.\2",
        rf"{_NORMAL}PCM\.1": r"blocks.\1.bn1",
        rf"{_NORMAL}PCM\.4": r"blocks.\1.bn2",
    },
    linears={
        rf"{_CELL}attn\.(kqv|proj)": r"reductions.\1.attn.\2",
        rf"{_CELL}attn\.mlp\.0": r"reductions.\1.fc1",
        rf"{_CELL}attn\.mlp\.2": r"reductions.\1.fc2",
        rf"{_NORMAL}attn\.(qkv|proj)": r"blocks.\1.attn.\2",
        rf"{_NORMAL}mlp\.(fc[12])": r"blocks.\1.\2",
        "head": "head",
    },
)


def torch_keys(v: Variant) -> list[str]:
    """List the names of ViTAE's own code, in its order."""
    names: list[str] = []
    last = len(v.dims) - 1
    for i, dilations in enumerate(v.dilations):
        cell = f"layers.{i}.RC"
        names += keys(f"{cell}.PCM", "0 2 3:bn 5" if i < last else "")
        names += keys(f"{cell}.PRM", " ".join(f"convs.{j}.0" for j in range(dilations)))
        names += keys(f"{cell}.attn", "w: kqv proj norm1 norm2 mlp.0 mlp.2" if i < last else "")
    parts = "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2 PCM.0 PCM.1:bn PCM.3 PCM.4:bn PCM.6"
    names += keys(f"layers.{last}.NC", parts, v.depth)
    return names + keys("", "head")


_NETWORKS = {
    "cifar_vitae": common.Study("ViTAE-S at 32 px", counted="23.18", other=True),
    "cifar_vitae_224": common.Study("ViTAE-S"),
}
_STEM = r"reductions\.0\.(prm\.convs\.\d+|pcm\.convs\.0)\..*"  # all layers that read pixels
NAMES = Names(TORCH_NAMES, torch_keys, stem=_STEM, head=r"head\..*")
FAMILY = common.family("cifar_vitae", "ViTAE", Variant, maker, NAMES, _NETWORKS)
