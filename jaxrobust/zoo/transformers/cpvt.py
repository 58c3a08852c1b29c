"""The study's CPVT: no positions, but a depthwise convolution over the patches after block 1.

Source: Chu et al. 2021 (arXiv 2102.10882), with sizes that fit the study's parameter count: those
of its ViT, with a class token and a linear head. No code is public, so our PyTorch file is the
reference.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families.vit import PatchEmbed, with_token
from jaxrobust.models.interface.classifier import of_one_stage, run_blocks
from jaxrobust.models.interface.family import Names
from jaxrobust.models.interface.renaming import keys, table
from jaxrobust.models.kernels import layers
from jaxrobust.models.modules.basic import DepthwiseConv, LayerNorm, Linear, Normalize
from jaxrobust.models.modules.draws import Draws, split, torch_default
from jaxrobust.types import Array, ModuleMaker
from jaxrobust.zoo.shared import common, transformer
from jaxrobust.zoo.transformers.cifar_vit import Variant


class ConditionalPositions(nnx.Module):
    """The patches of f[B,1+N,D] plus a 3x3 depthwise convolution of them; the class token stays."""

    def __init__(self, dim: int, grid: int, rngs: Draws) -> None:
        self.proj = DepthwiseConv(dim, 3, init=torch_default, rngs=rngs)
        self.grid = grid

    def __call__(self, x: Array) -> Array:
        patches = x[:, 1:].reshape(x.shape[0], self.grid, self.grid, x.shape[2])
        patches = (patches + self.proj(patches)).reshape(x.shape[0], -1, x.shape[2])
        return jnp.concatenate([x[:, :1], patches], axis=1)


class CPVT(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, grid: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        self.patch_embed = PatchEmbed([transformer.Patches(v.in_channels, v.dim, v.patch, rngs)])
        self.cls_token = nnx.Param(jax.random.normal(rngs.params(), (1, 1, v.dim)))
        self.blocks = nnx.List([transformer.Block(v, rngs, full=False) for _ in range(v.depth)])
        self.pos_block = ConditionalPositions(v.dim, grid, rngs)
        self.norm = LayerNorm(v.dim, eps=transformer.EPS)
        self.head = Linear(v.dim, num_classes, init=torch_default, rngs=rngs)
        self.variant, self.grid = v, grid

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v, draws = self.variant, train and self.variant.dropout > 0
        drawn = (None,) * 3 if key is None else split(key, 3)
        x = self.patch_embed(self.normalize(images).astype(jnp.dtype(v.dtype)), self.grid)
        x = with_token(self.cls_token, x)
        x = layers.dropout(x, drawn[0], v.dropout) if draws else x
        settings = of_one_stage(v, train, None) | {"draws": draws}
        first_rate, later_rates = settings["rates"][:1], settings["rates"][1:]
        x = run_blocks(
            self.blocks[:1], x, **settings | {"key": drawn[1], "rates": first_rate, "scan": False}
        )
        x = self.pos_block(x)
        if v.depth > 1:
            x = run_blocks(self.blocks[1:], x, **settings | {"key": drawn[2], "rates": later_rates})
        return self.head(self.norm(x[:, 0]))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Make the maker of a row's network; `ValueError` where the row or the size cannot work."""
    transformer.check(v, "dim", "depth", "heads", "hidden")
    grid = transformer.grid_of(image_size, v.patch)
    return lambda rngs: CPVT(v, num_classes, grid, rngs)


TORCH_NAMES = table(
    *transformer.BLOCK_ROWS,
    convs={r"pos_block\.0\.proj\.0": "pos_block.proj"},
    linears={r"mlp_head\.1": "head"},
)


def torch_keys(v: Variant) -> list[str]:
    """List the names in our PyTorch file: the ViT's, and the convolution's from Twins."""
    names = keys("", "cls_token: patch_to_embedding") + transformer.block_keys(v.depth)
    return names + keys("", "pos_block.0.proj.0 mlp_head.0 mlp_head.1")


_224 = {"patch": 16, "dim": 384, "depth": 12, "heads": 6, "hidden": 1536}
_NETWORKS = {
    "cifar_cpvt": common.Study("CPVT (32 px)", counted="9.49"),
    "cifar_cpvt_224": common.Study("CPVT (224 px)", _224),  # ours: with CPVT-S's sizes
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"patch_embed\.proj\..*", head=r"head\..*")
FAMILY = common.family("cifar_cpvt", "CPVT (32 px)", Variant, maker, NAMES, _NETWORKS)
