"""PoolFormer: the mean of the neighbours in the place of attention.

Sources: Yu et al. 2022 (arXiv 2111.11418) as sail-sg/poolformer has S12 (a075575), with a first
convolution that the count of Tang et al. 2022 (arXiv 2209.14105) allows: windows of 1, 2 and 3
fit it, strides do not show in it; 3 with stride 2 is our choice. Parity:
tests/models/cifar/test_poolformer.py against golden logits of that code.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.cifar.shared.transformer import Mlp, check
from jaxrobust.models.interface.classifier import classifier, of_stages, run_blocks
from jaxrobust.models.interface.family import Family, Member, Names, Paper, Reference
from jaxrobust.models.interface.renaming import Row, affine, conv_rows, linear_oi, pointwise_oi, row
from jaxrobust.models.kernels import layers, pooling
from jaxrobust.models.modules.basic import Conv, Linear, Normalize
from jaxrobust.models.modules.initializers import Draws, normal_02
from jaxrobust.models.modules.norms import GroupNorm
from jaxrobust.models.modules.stochastic_depth import Drop, branches
from jaxrobust.types import Array, Classifier


class Variant(NamedTuple):
    """One row of the table: every field can be overridden in `models.create`."""

    depths: tuple[int, ...] = (2, 2, 6, 2)
    dims: tuple[int, ...] = (64, 128, 320, 512)
    patch: int = 3  # window of the first convolution
    stride: int = 2  # of the first convolution; it is padded by half of what windows overlap
    gamma_init: float = 1e-5  # of the factors of each branch's channels
    activation: str = "gelu"
    drop_path: float = 0.0  # of the last block; grows linearly from 0 at the first
    in_channels: int = 3
    remat: bool = False  # recompute each block in the backward pass instead of storing it
    dtype: str = "float32"  # compute type; parameters stay float32


VARIANTS = {"cifar_poolformer": Variant(), "cifar_poolformer_224": Variant(patch=7, stride=4)}


def padding(v: Variant) -> int:
    """Return the padding of the first convolution: half of what its windows overlap, rounded up."""
    return -(-(v.patch - v.stride) // 2)


class Block(nnx.Module):
    """What the mean of 3x3 pixels differs by, and an MLP; each behind a norm, scaled and added."""

    def __init__(self, dim: int, v: Variant, rngs: Draws) -> None:
        self.norm1, self.norm2 = (GroupNorm(dim, groups=1) for _ in range(2))
        self.mlp = Mlp(dim, 4 * dim, v.activation, rngs, init=normal_02)
        self.layer_scale_1, self.layer_scale_2 = (
            nnx.Param(jnp.full(dim, v.gamma_init, jnp.float32)) for _ in range(2)
        )

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        del train
        path1, path2 = branches(drop, 2)
        y = self.norm1(x)
        mixed = pooling.avg_pool(y, stride=1, count_padding=False) - y
        x = x + path1(layers.scale(mixed, self.layer_scale_1[...]))
        return x + path2(layers.scale(self.mlp(self.norm2(x)), self.layer_scale_2[...]))


class PoolFormer(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, variant: Variant, num_classes: int, rngs: Draws) -> None:
        v = variant
        self.normalize = Normalize(v.in_channels)
        how: dict[str, Any] = {
            "stride": v.stride,
            "padding": padding(v),
            "torch_init": True,
            "rngs": rngs,
        }
        self.patch_embed = Conv(v.in_channels, v.dims[0], v.patch, **how)
        network: list[Any] = []  # stages, and what brings the map to the next one's width
        for i, (dim, depth) in enumerate(zip(v.dims, v.depths, strict=True)):
            how |= {"stride": 2, "padding": 1}
            network += [Conv(v.dims[i - 1], dim, 3, **how)] if i else []
            network.append(nnx.List([Block(dim, v, rngs) for _ in range(depth)]))
        self.network = nnx.List(network)
        self.norm = GroupNorm(v.dims[-1], groups=1)
        self.head = Linear(v.dims[-1], num_classes, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.normalize(images).astype(jnp.dtype(v.dtype))
        told = of_stages(v.depths, train=train, key=key, drop_path=v.drop_path, remat=v.remat)
        into = (self.patch_embed, *self.network[1::2])
        for conv, blocks, how in zip(into, self.network[::2], told, strict=True):
            x = run_blocks(blocks, conv(x), **how)
        return self.head(self.norm(x).mean(axis=(1, 2)))


def create(variant: Variant, *, num_classes: int, image_size: int) -> Classifier:
    """Return the network of one row; `ValueError` where the row or the size cannot work."""
    v = variant
    check(v, "patch", "stride")
    if not v.depths or len(v.depths) != len(v.dims) or min(*v.depths, *v.dims) < 1:
        raise ValueError(
            f"depths={v.depths} and dims={v.dims} need one positive integer for each stage"
        )
    if v.patch < v.stride:
        raise ValueError(
            f"patch={v.patch} leaves out pixels at stride={v.stride}; take a window at least as "
            "large as the stride"
        )
    if image_size < v.patch:
        raise ValueError(
            f"patch={v.patch} leaves no window in images of {image_size} px; take a smaller patch, "
            "or larger images"
        )
    return classifier(lambda rngs: PoolFormer(v, num_classes, rngs), dtype=jnp.dtype(v.dtype))


_BLOCK = r"(network\.\d+\.\d+\."
TORCH_NAMES: list[Row] = [
    *conv_rows(r"patch_embed\.proj", "patch_embed"),
    *conv_rows(r"(network\.\d+)\.proj", r"\1"),
    row(_BLOCK + r"layer_scale_[12])", r"\1"),
    row(_BLOCK + r"norm[12])\.weight", r"\1.scale"),
    row(_BLOCK + r"mlp\.fc[12])\.weight", r"\1.kernel", pointwise_oi),
    row(_BLOCK + r"(?:norm[12]|mlp\.fc[12])\.bias)", r"\1"),
    row(r"norm\.weight", "norm.scale"),
    row(r"head\.weight", "head.kernel", linear_oi),
    row(r"((?:norm|head)\.bias)", r"\1"),
]


def torch_keys(variant: Variant) -> list[str]:
    """List the public code's names in its order."""
    keys = affine("patch_embed.proj")
    for i, depth in enumerate(variant.depths):
        keys += affine(f"network.{2 * i - 1}.proj") if i else []
        for block in (f"network.{2 * i}.{j}." for j in range(depth)):
            keys += [block + "layer_scale_1", block + "layer_scale_2"]
            keys += affine(*(block + part for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")))
    return keys + affine("norm", "head")


MEMBERS = {
    "cifar_poolformer": Member(
        Reference("cifar_poolformer.py"),
        Paper("11.39", ""),
        counted_at=32,
        num_classes=10,
        title="PoolFormer-S12 (32 px)",
    ),
    # Ours: PoolFormer-S12.
    "cifar_poolformer_224": Member(
        Reference("cifar_poolformer.py", {"patch": 7, "stride": 4}),
        num_classes=10,
        title="PoolFormer-S12",
    ),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"patch_embed\..*", head=r"head\..*")
FAMILY = Family(
    *("cifar_poolformer", "PoolFormer (32 px)", VARIANTS, create, NAMES, MEMBERS, "all"),
    any_size=True,
)
