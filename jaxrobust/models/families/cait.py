"""CaiT: talking heads, then layers in which only the class token attends.

Source: Touvron et al. 2021 (arXiv 2103.17239); S12: Debenedetti 2022.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families import stems, vit
from jaxrobust.models.families.vit import PatchEmbed, grid_of, token_rows
from jaxrobust.models.interface.classifier import of_one_stage, run_blocks
from jaxrobust.models.interface.family import (
    Family,
    Member,
    Names,
    PaperFigures,
    TorchVariant,
    VariantRow,
)
from jaxrobust.models.interface.renaming import keys, row
from jaxrobust.models.kernels import attention, layers
from jaxrobust.models.kernels.primitives import add_bias, spread
from jaxrobust.models.kernels.talking_heads import talking_heads
from jaxrobust.models.modules.basic import LayerNorm, Linear, Mlp, Normalize, residual
from jaxrobust.models.modules.draws import Draws, Drop, branches, normal_02, torch_default
from jaxrobust.types import Array, ModuleMaker


class Variant(VariantRow):
    """A row of the table; `drop_path` is the rate of each block, not of class-token layers."""

    dim: int
    depth: int
    heads: int
    gamma_init: float = 1e-5  # of LayerScale
    class_depth: int = 2  # layers in which only the class token attends
    stem_strides: tuple[int, ...] = (16,)  # of the PatchStem, whose kernel has the same size
    scan: bool = False  # compile one block for all


VARIANTS = {
    "cait_xxs24": Variant(192, 24, 4),
    "cait_s24": Variant(384, 24, 8),
    "cait_s12": Variant(384, 12, 8, gamma_init=1.0),  # from the thesis
}


class TalkingHeads(nnx.Module):
    """Attention whose heads are mixed before and after the softmax."""

    def __init__(self, dim: int, heads: int, rngs: Draws) -> None:
        self.qkv, self.proj = Linear(dim, 3 * dim, rngs=rngs), Linear(dim, dim, rngs=rngs)
        self.proj_l, self.proj_w = (Linear(heads, heads, rngs=rngs) for _ in range(2))

    def __call__(self, x: Array) -> Array:
        pre, post = ((mix.kernel[...], mix.bias[...]) for mix in (self.proj_l, self.proj_w))
        return self.proj(talking_heads(self.qkv(x), pre, post))


class ClassAttention(nnx.Module):
    """Attention of the first token to all: f[B,N,D] -> f[B,1,D]."""

    def __init__(self, dim: int, heads: int, rngs: Draws) -> None:
        self.q, self.k, self.v, self.proj = (Linear(dim, dim, rngs=rngs) for _ in range(4))
        self.heads = heads

    def __call__(self, x: Array) -> Array:
        parts = (self.q(x[:, :1]), self.k(x), self.v(x))
        heads = (part.reshape(*part.shape[:2], self.heads, -1) for part in parts)
        return self.proj(attention.attention(*heads))


class Block(nnx.Module):
    """Talking-heads attention and MLP over the patches."""

    def __init__(self, v: Variant, rngs: Draws, attn: Any = TalkingHeads) -> None:
        self.gamma_1 = nnx.Param(jnp.full(v.dim, v.gamma_init, jnp.float32))
        self.gamma_2 = nnx.Param(jnp.full(v.dim, v.gamma_init, jnp.float32))
        self.norm1, self.norm2 = LayerNorm(v.dim), LayerNorm(v.dim)
        self.attn = attn(v.dim, v.heads, rngs)
        self.mlp = Mlp(v.dim, rngs)

    def scaled_attn(self, normal: Array) -> Array:
        return layers.scale(self.attn(normal), self.gamma_1[...])

    def scaled_mlp(self, normal: Array) -> Array:
        return layers.scale(self.mlp(normal), self.gamma_2[...])

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        path1, path2 = branches(drop, 2)
        x = residual(x, self.norm1, lambda y: path1(self.scaled_attn(y)))
        return residual(x, self.norm2, lambda y: path2(self.scaled_mlp(y)))


class ClassBlock(Block):
    """Class attention and MLP; they change the class token but not the patches."""

    def __init__(self, v: Variant, rngs: Draws) -> None:
        super().__init__(v, rngs, ClassAttention)

    def __call__(self, token: Array, patches: Array) -> Array:  # type: ignore[override]
        normal = self.norm1(jnp.concatenate([token, patches], axis=1))
        token = token + self.scaled_attn(normal)
        return token + self.scaled_mlp(self.norm2(token))


class CaiT(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, grid: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        self.patch_embed = PatchEmbed(stems.patch_stem(v, v.dim, rngs, torch_default))
        self.pos_embed = nnx.Param(normal_02(rngs.params(), (1, grid * grid, v.dim)))
        self.cls_token = nnx.Param(normal_02(rngs.params(), (1, 1, v.dim)))
        self.blocks = nnx.List([Block(v, rngs) for _ in range(v.depth)])
        self.blocks_token_only = nnx.List([ClassBlock(v, rngs) for _ in range(v.class_depth)])
        self.norm = LayerNorm(v.dim)
        self.head = Linear(v.dim, num_classes, rngs=rngs)
        self.variant, self.grid = v, grid

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        images = self.normalize(images).astype(jnp.dtype(v.dtype))
        x = add_bias(self.patch_embed(images, self.grid), self.pos_embed[...])
        settings = of_one_stage(v, train, key) | {"rates": (v.drop_path,) * v.depth}
        x = run_blocks(self.blocks, x, **settings)
        token = spread(self.cls_token[...], (x.shape[0], 1, v.dim))
        for block in self.blocks_token_only:
            token = block(token, x)
        return self.head(self.norm(token[:, 0]))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Return the constructor of a row's network; `ValueError` if row or image size is invalid."""
    stems.check_stem((), v.stem_strides)
    grid = grid_of(v, image_size)
    if v.class_depth < 1:
        raise ValueError(f"class_depth={v.class_depth}: the class token needs at least one layer")
    return lambda rngs: CaiT(v, num_classes, grid, rngs)


_BLOCKS = r"blocks(?:_token_only)?\.\d+"
TORCH_NAMES = [*token_rows(_BLOCKS), row(rf"({_BLOCKS}\.gamma_[12])", r"\1")]


def torch_keys(v: Variant) -> list[str]:
    """List timm 1.0.9's names, in order."""
    names = keys("", "cls_token: pos_embed: patch_embed.proj")
    talking, to_class = "qkv attn.proj attn.proj_l attn.proj_w", "q attn.k attn.v attn.proj"
    kinds = (("blocks", v.depth, talking), ("blocks_token_only", v.class_depth, to_class))
    for blocks, depth, attn in kinds:
        names += keys(blocks, f"gamma_1: gamma_2: norm1 attn.{attn} norm2 mlp.fc1 mlp.fc2", depth)
    return names + keys("", "norm head")


MEMBERS = {
    # From the thesis; timm has it with 24 blocks.
    "cait_s12": Member(
        TorchVariant("cait_s24_224", {"depth": 12, "init_values": 1.0}), PaperFigures(None, "4.76")
    ),
    "cait_s24": Member(TorchVariant("cait_s24_224")),
    "cait_xxs24": Member(TorchVariant("cait_xxs24_224")),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=vit.NAMES.stem, head=vit.NAMES.head)
FAMILY = Family("cait", "CaiT", VARIANTS, maker, NAMES, MEMBERS, "matrices-not-tokens")
