"""The study's ViT: logits scaled by the root of all heads' total width, a two-layer head.

Source: Dosovitskiy et al. 2021 (arXiv 2010.11929), as in kentaroy47/vision-transformers-cifar10
of 2020 (670fb58).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families.vit import PatchEmbed, with_token
from jaxrobust.models.interface.classifier import of_one_stage, run_blocks
from jaxrobust.models.interface.family import Names, VariantRow
from jaxrobust.models.interface.renaming import keys, row, table
from jaxrobust.models.kernels import layers
from jaxrobust.models.kernels.primitives import add_bias
from jaxrobust.models.modules.basic import LayerNorm, Normalize
from jaxrobust.models.modules.draws import Draws, split
from jaxrobust.models.modules.positions import resized
from jaxrobust.types import Array, ModuleMaker
from jaxrobust.zoo.shared import common, transformer


class Variant(VariantRow):
    """A row of the table: `models.create` can override every field."""

    patch: int = 4  # side in pixels; the study has 8, 4 and 2
    dim: int = 512
    depth: int = 6
    heads: int = 8
    hidden: int = 512  # of the MLPs, including the head
    activation: str = "gelu"
    dropout: float = 0.1  # of tokens, and after every map of the blocks but q, k and v
    scan: bool = False  # compile one block for all of them


class VisionTransformer(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, grid: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        self.patch_embed = PatchEmbed([transformer.Patches(v.in_channels, v.dim, v.patch, rngs)])
        self.pos_embed = nnx.Param(jax.random.normal(rngs.params(), (1, 1 + grid * grid, v.dim)))
        self.cls_token = nnx.Param(jax.random.normal(rngs.params(), (1, 1, v.dim)))
        self.blocks = nnx.List([transformer.Block(v, rngs, full=True) for _ in range(v.depth)])
        self.norm = LayerNorm(v.dim, eps=transformer.EPS)
        self.head = transformer.Mlp(v.dim, v.hidden, v.activation, rngs, outs=num_classes)
        self.variant, self.grid = v, grid

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v, draws = self.variant, train and self.variant.dropout > 0
        first, key, last = split(key, 3) if draws and key is not None else (None, key, None)
        x = self.patch_embed(self.normalize(images).astype(jnp.dtype(v.dtype)), self.grid)
        x = add_bias(with_token(self.cls_token, x), self.pos_embed[...])
        x = layers.dropout(x, first, v.dropout)
        x = run_blocks(self.blocks, x, draws=draws, **of_one_stage(v, train, key))
        return self.head(self.norm(x[:, 0]), lambda y: layers.dropout(y, last, v.dropout))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Make the maker of a row's network; `ValueError` where the row or the size cannot work."""
    transformer.check(v, "dim", "depth", "heads", "hidden")
    grid = transformer.grid_of(image_size, v.patch)
    return lambda rngs: VisionTransformer(v, num_classes, grid, rngs)


TORCH_NAMES = table(
    *transformer.BLOCK_ROWS,
    row(r"pos_embedding", "pos_embed", resize=resized),
    linears={r"mlp_head\.1": "head.fc1", r"mlp_head\.4": "head.fc2"},
)


def torch_keys(v: Variant) -> list[str]:
    """List the names of the public code, in its order."""
    names = keys("", "pos_embedding: cls_token: patch_to_embedding")
    return names + transformer.block_keys(v.depth) + keys("mlp_head", "0 1 4")


_224 = {"patch": 16, "dim": 384, "depth": 12, "heads": 6, "hidden": 1536}
_NETWORKS = {
    "cifar_vit": common.Study("ViT (32 px)", counted="9.78"),
    "cifar_vit_224": common.Study("ViT (224 px)", _224),  # ours: with ViT-S/16's sizes
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"patch_embed\.proj\..*", head=r"head\.fc2\..*")
FAMILY = common.family("cifar_vit", "ViT (32 px)", Variant, maker, NAMES, _NETWORKS, any_size=False)
