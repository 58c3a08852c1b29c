"""The study's CPVT: no positions, but a depthwise convolution over the patches behind block 1.

Source: Chu et al. 2021 (arXiv 2102.10882), at the sizes that the count of Tang et al. 2022
(arXiv 2209.14105) fits: those of its ViT, with a class token and a head of one linear map. No code
of it is public. Parity: tests/models/cifar/test_cpvt.py against our file in PyTorch.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrobust.models.cifar.shared.transformer import (
    BLOCK_ROWS,
    EPS,
    Block,
    Patches,
    block_keys,
    check,
    grid_of,
)
from jaxrobust.models.families.vit import PatchEmbed
from jaxrobust.models.interface.classifier import classifier, run_blocks
from jaxrobust.models.interface.family import Family, Member, Names, Paper, Reference
from jaxrobust.models.interface.renaming import Row, affine, conv_rows, linear_rows
from jaxrobust.models.kernels import layers
from jaxrobust.models.kernels.primitives import spread
from jaxrobust.models.modules.basic import DepthwiseConv, LayerNorm, Linear, Normalize
from jaxrobust.models.modules.initializers import Draws
from jaxrobust.models.modules.stochastic_depth import split
from jaxrobust.types import Array, Classifier


class Variant(NamedTuple):
    """One row of the table: every field can be overridden in `models.create`."""

    patch: int = 4  # side in pixels
    dim: int = 512
    depth: int = 6
    heads: int = 8
    hidden: int = 512  # of the MLPs
    activation: str = "gelu"
    dropout: float = 0.1  # of tokens, and behind every map of the blocks but q, k and v
    drop_path: float = 0.0  # of the last block; grows linearly from 0 at the first
    in_channels: int = 3
    remat: bool = False  # recompute each block in the backward pass instead of storing it
    scan: bool = False  # compile one block for all but the first
    dtype: str = "float32"  # compute type; parameters stay float32


VARIANTS = {"cifar_cpvt": Variant(), "cifar_cpvt_224": Variant(16, 384, 12, 6, 1536)}


class ConditionalPositions(nnx.Module):
    """The patches of f[B,1+N,D] plus a 3x3 depthwise convolution of them; the class token stays."""

    def __init__(self, dim: int, grid: int, rngs: Draws) -> None:
        self.proj = DepthwiseConv(dim, 3, torch_init=True, rngs=rngs)
        self.grid = grid

    def __call__(self, x: Array) -> Array:
        patches = x[:, 1:].reshape(x.shape[0], self.grid, self.grid, x.shape[2])
        patches = (patches + self.proj(patches)).reshape(x.shape[0], -1, x.shape[2])
        return jnp.concatenate([x[:, :1], patches], axis=1)


class CPVT(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, variant: Variant, num_classes: int, grid: int, rngs: Draws) -> None:
        v = variant
        self.normalize = Normalize(v.in_channels)
        self.patch_embed = PatchEmbed([Patches(v.in_channels, v.dim, v.patch, rngs)])
        self.cls_token = nnx.Param(jax.random.normal(rngs.params(), (1, 1, v.dim)))
        self.blocks = nnx.List([Block(v, rngs, full=False) for _ in range(v.depth)])
        self.pos_block = ConditionalPositions(v.dim, grid, rngs)
        self.norm = LayerNorm(v.dim, eps=EPS)
        self.head = Linear(v.dim, num_classes, torch_init=True, rngs=rngs)
        self.variant, self.grid = v, grid

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v, draws = self.variant, train and self.variant.dropout > 0
        keys = (None,) * 3 if key is None else split(key, 3)
        x = self.patch_embed(self.normalize(images).astype(jnp.dtype(v.dtype)), self.grid)
        token = spread(self.cls_token[...], (x.shape[0], 1, v.dim))
        x = jnp.concatenate([token, x], axis=1)
        x = layers.dropout(x, keys[0], v.dropout) if draws else x
        how: dict[str, Any] = {"train": train, "draws": draws, "remat": v.remat}
        rates = np.linspace(0, v.drop_path, v.depth).tolist()
        x = run_blocks(self.blocks[:1], x, key=keys[1], rates=rates[:1], **how)
        x = self.pos_block(x)
        if v.depth > 1:
            x = run_blocks(self.blocks[1:], x, key=keys[2], rates=rates[1:], scan=v.scan, **how)
        return self.head(self.norm(x[:, 0]))


def create(variant: Variant, *, num_classes: int, image_size: int) -> Classifier:
    """Return the network of one row; `ValueError` where the row or the size cannot work."""
    v = variant
    check(v, "dim", "depth", "heads", "hidden")
    grid = grid_of(image_size, v.patch)
    return classifier(lambda rngs: CPVT(v, num_classes, grid, rngs), dtype=jnp.dtype(v.dtype))


TORCH_NAMES: list[Row] = [
    *BLOCK_ROWS,
    *conv_rows(r"pos_block\.0\.proj\.0", "pos_block.proj"),
    *linear_rows(r"mlp_head\.1", "head"),
]


def torch_keys(variant: Variant) -> list[str]:
    """Return the names of our file in PyTorch: those of the ViT, and the convolution's of Twins."""
    keys = ["cls_token", *affine("patch_to_embedding"), *block_keys(variant.depth)]
    return keys + affine("pos_block.0.proj.0", "mlp_head.0", "mlp_head.1")


_224 = {"patch": 16, "dim": 384, "depth": 12, "heads": 6, "hidden": 1536}
MEMBERS = {
    "cifar_cpvt": Member(
        Reference("cifar_cpvt.py"),
        Paper("9.49", ""),
        counted_at=32,
        num_classes=10,
        title="CPVT (32 px)",
    ),
    # Ours: these blocks at the sizes of CPVT-S.
    "cifar_cpvt_224": Member(
        Reference("cifar_cpvt.py", _224), num_classes=10, title="CPVT (224 px)"
    ),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"patch_embed\.proj\..*", head=r"head\..*")
FAMILY = Family(
    "cifar_cpvt", "CPVT (32 px)", VARIANTS, create, NAMES, MEMBERS, "all", any_size=True
)
