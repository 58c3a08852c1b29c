"""PoolFormer: average pooling instead of attention.

Source: Yu et al. 2022 (arXiv 2111.11418), S12 as in sail-sg/poolformer (a075575), with a first
convolution that fits the study's parameter count. Windows of 1, 2 and 3 fit, and the count does not
depend on strides; 3 with stride 2 is our choice.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families import residual
from jaxrobust.models.interface.classifier import of_stages, run_blocks
from jaxrobust.models.interface.family import Names, VariantRow
from jaxrobust.models.interface.renaming import keys, pointwise_oi, row, table
from jaxrobust.models.kernels import layers, pooling
from jaxrobust.models.modules.basic import Linear, Normalize
from jaxrobust.models.modules.draws import Draws, Drop, branches, normal_02
from jaxrobust.models.modules.norms import GroupNorm
from jaxrobust.types import Array, ModuleMaker
from jaxrobust.zoo.shared import common
from jaxrobust.zoo.shared.transformer import Mlp, check


class Variant(VariantRow):
    """A row of the table: `models.create` can override every field."""

    depths: tuple[int, ...] = (2, 2, 6, 2)
    dims: tuple[int, ...] = (64, 128, 320, 512)
    patch: int = 3  # window of the first convolution
    stride: int = 2  # of the first convolution; padding is half the windows' overlap
    gamma_init: float = 1e-5  # of the channel scales of each branch
    activation: str = "gelu"


class Block(nnx.Module):
    """3x3 average pooling minus its input, then an MLP; each after a norm, scaled and added."""

    def __init__(self, dim: int, v: Variant, rngs: Draws) -> None:
        self.norm1, self.norm2 = (GroupNorm(dim, groups=1) for _ in range(2))
        self.mlp = Mlp(dim, 4 * dim, v.activation, rngs, init=normal_02)
        self.layer_scale_1, self.layer_scale_2 = (
            nnx.Param(jnp.full(dim, v.gamma_init, jnp.float32)) for _ in range(2)
        )

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        path1, path2 = branches(drop, 2)
        y = self.norm1(x)
        mixed = pooling.avg_pool(y, stride=1, count_padding=False) - y
        x = x + path1(layers.scale(mixed, self.layer_scale_1[...]))
        return x + path2(layers.scale(self.mlp(self.norm2(x)), self.layer_scale_2[...]))


class PoolFormer(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        padding = -(-(v.patch - v.stride) // 2)  # rounded up
        self.patch_embed = residual.conv(
            *(v.in_channels, v.dims[0], v.patch, rngs, v.stride), padding=padding, bias=True
        )
        network: list[Any] = []  # stages, and layers between them that change the width
        for i, (dim, depth) in enumerate(zip(v.dims, v.depths, strict=True)):
            network += [residual.conv(v.dims[i - 1], dim, 3, rngs, 2, bias=True)] if i else []
            network.append(nnx.List([Block(dim, v, rngs) for _ in range(depth)]))
        self.network = nnx.List(network)
        self.norm = GroupNorm(v.dims[-1], groups=1)
        self.head = Linear(v.dims[-1], num_classes, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.normalize(images).astype(jnp.dtype(v.dtype))
        into, stages = (self.patch_embed, *self.network[1::2]), self.network[::2]
        for conv, blocks, settings in zip(into, stages, of_stages(v, train, key), strict=True):
            x = run_blocks(blocks, conv(x), **settings)
        return self.head(self.norm(x).mean(axis=(1, 2)))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Make the maker of a row's network; `ValueError` where the row or the size cannot work."""
    check(v, "patch", "stride")
    if not v.depths or len(v.depths) != len(v.dims) or min(*v.depths, *v.dims) < 1:
        raise ValueError(
            f"depths={v.depths} and dims={v.dims} need one positive integer for each stage"
        )
    if v.patch < v.stride:
        raise ValueError(
            f"patch={v.patch} skips pixels at stride={v.stride}; use a window at least as "
            "large as the stride"
        )
    if image_size < v.patch:
        raise ValueError(
            f"patch={v.patch} does not fit into images of {image_size} px; use a smaller patch, or "
            "larger images"
        )
    return lambda rngs: PoolFormer(v, num_classes, rngs)


_BLOCK = r"(network\.\d+\.\d+\."
TORCH_NAMES = table(
    row(_BLOCK + r"layer_scale_[12])", r"\1"),
    row(_BLOCK + r"mlp\.fc[12])\.weight", r"\1.kernel", pointwise_oi),
    row(_BLOCK + r"mlp\.fc[12]\.bias)", r"\1"),
    convs={r"patch_embed\.proj": "patch_embed", r"(network\.\d+)\.proj": r"\1"},
    norms={_BLOCK + "norm[12])": r"\1", "norm": "norm"},
    linears={"head": "head"},
)


def torch_keys(v: Variant) -> list[str]:
    """List the names of the public code, in its order."""
    names = keys("", "patch_embed.proj")
    for i, depth in enumerate(v.depths):
        names += keys("", f"network.{2 * i - 1}.proj") if i else []
        block = "layer_scale_1: layer_scale_2: norm1 norm2 mlp.fc1 mlp.fc2"
        names += keys(f"network.{2 * i}", block, depth)
    return names + keys("", "norm head")


_NETWORKS = {
    "cifar_poolformer": common.Study("PoolFormer-S12 (32 px)", counted="11.39"),
    "cifar_poolformer_224": common.Study("PoolFormer-S12", {"patch": 7, "stride": 4}),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"patch_embed\..*", head=r"head\..*")
FAMILY = common.family("cifar_poolformer", "PoolFormer (32 px)", Variant, maker, NAMES, _NETWORKS)
