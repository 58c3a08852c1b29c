"""Vision transformers: ViT and DeiT S and B, DeiT-III M, with PatchStem or ConvStem.

Sources: Dosovitskiy et al. 2021 (arXiv 2010.11929), Touvron et al. 2021 and 2022 (2012.12877,
2204.07118); stems: Singh, Croce, Hein 2023 (2303.01870).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families import stems
from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.classifier import of_one_stage, run_blocks
from jaxrobust.models.interface.family import (
    Family,
    Member,
    Names,
    PaperFigures,
    TorchVariant,
    VariantRow,
)
from jaxrobust.models.interface.renaming import Naming, Renaming, keys, row, table
from jaxrobust.models.kernels import attention, layers
from jaxrobust.models.kernels.cuda import fused_attention, hopper
from jaxrobust.models.kernels.primitives import add_bias, spread
from jaxrobust.models.modules.basic import LayerNorm, Linear, Mlp, Normalize, residual
from jaxrobust.models.modules.draws import Draws, Drop, branches, normal_02, torch_default
from jaxrobust.models.modules.positions import resized
from jaxrobust.types import Array, ModuleMaker


class Variant(VariantRow):
    """A row of the table: `models.create` can override every field."""

    dim: int
    depth: int
    heads: int
    stem_widths: tuple[int, ...] = ()  # of the ConvStem's convolutions; empty: PatchStem
    stem_strides: tuple[int, ...] = (16,)  # a PatchStem's kernel is as large as its stride
    class_position: bool = True  # whether the class token has a position
    gamma_init: float | None = None  # of LayerScale; None: no LayerScale
    stem_kernels: tuple[int, ...] = ()  # of the ConvStem's convolutions, odd; empty: all 3
    scan: bool = False  # compile one block for all of them


_S, _B = Variant(384, 12, 6), Variant(768, 12, 12)
_M = Variant(512, 12, 8, class_position=False, gamma_init=1e-6)
_WIDTHS, _STRIDES = (48, 96, 192, 384), (2, 2, 2, 2)
VARIANTS = {
    "vit_s": _S,
    "vit_s_cvst": _S._replace(stem_widths=_WIDTHS, stem_strides=_STRIDES),
    "vit_m": _M,
    "vit_m_cvst": _M._replace(stem_widths=_WIDTHS, stem_strides=_STRIDES),
    "vit_b": _B,
    "vit_b_cvst": _B._replace(stem_widths=_WIDTHS, stem_strides=_STRIDES),
    "deit_s": _S,  # same network as vit_s, but with other published weights
}


class Attention(nnx.Module):
    """Attention of all tokens to all tokens; one linear map computes query, key and value.

    `tokens` is how many there are, if a network may pad them.
    """

    def __init__(self, dim: int, heads: int, rngs: Draws, tokens: int = 0) -> None:
        self.qkv, self.proj = Linear(dim, 3 * dim, rngs=rngs), Linear(dim, dim, rngs=rngs)
        self.heads, self.tokens = heads, tokens

    def __call__(self, x: Array) -> Array:
        if self.tokens and hopper.takes_tokens(x, self.heads):
            qkv = self.qkv.kernel[...], self.qkv.bias[...]
            out = fused_attention.of_tokens(x, *qkv, self.heads, tokens=self.tokens)
            return self.proj(out)
        return self.proj(attention.self_attention(self.qkv(x), self.heads))


class LayerScale(nnx.Module):
    """A factor per channel."""

    def __init__(self, dim: int, init: float) -> None:
        self.gamma = nnx.Param(jnp.full(dim, init, jnp.float32))

    def __call__(self, x: Array) -> Array:
        return layers.scale(x, self.gamma[...])


class Block(nnx.Module):
    """Attention and MLP, each normalized before and, with LayerScale, scaled after."""

    def __init__(self, v: Variant, tokens: int, rngs: Draws) -> None:
        self.norm1, self.norm2 = LayerNorm(v.dim), LayerNorm(v.dim)
        self.attn = Attention(v.dim, v.heads, rngs, tokens)
        self.mlp = Mlp(v.dim, rngs)
        self.ls1 = None if v.gamma_init is None else LayerScale(v.dim, v.gamma_init)
        self.ls2 = None if v.gamma_init is None else LayerScale(v.dim, v.gamma_init)

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        path1, path2 = branches(drop, 2)
        ls1, ls2 = (ls or (lambda y: y) for ls in (self.ls1, self.ls2))
        x = residual(x, self.norm1, lambda y: path1(ls1(self.attn(y))))
        return residual(x, self.norm2, lambda y: path2(ls2(self.mlp(y))))


class PatchEmbed(nnx.Module):
    """Convert images to tokens f[B,N,D], row by row of the grid."""

    def __init__(self, stem: list[nnx.Module]) -> None:
        self.proj = nnx.List(stem)

    def __call__(self, images: Array, grid: int) -> Array:
        x = stems.through(self.proj, images)
        _, height, width, dim = x.shape
        fits, positions = (height, width) == (grid, grid), f"positions for {grid}x{grid}"
        architecture_checks.check_fits(fits, images, f"{height}x{width} patches", positions)
        return x.reshape(-1, grid * grid, dim)


def with_token(token: nnx.Param, x: Array) -> Array:
    """Prepend a class token f[1,1,D] to the tokens f[B,N,D] of each image."""
    return jnp.concatenate([spread(token[...], (x.shape[0], 1, x.shape[2])), x], axis=1)


class VisionTransformer(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, grid: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        stem = stems.stem(v, v.dim, rngs, init=torch_default, project=True)
        self.patch_embed = PatchEmbed(stem)
        tokens = grid * grid + v.class_position
        self.pos_embed = nnx.Param(normal_02(rngs.params(), (1, tokens, v.dim)))
        self.cls_token = nnx.Param(1e-6 * jax.random.normal(rngs.params(), (1, 1, v.dim)))
        self.blocks = nnx.List([Block(v, grid * grid + 1, rngs) for _ in range(v.depth)])
        self.norm = LayerNorm(v.dim)
        self.head = Linear(v.dim, num_classes, rngs=rngs)
        self.variant, self.grid = v, grid

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        images = self.normalize(images).astype(jnp.dtype(v.dtype))
        x = self.patch_embed(images, self.grid)
        if v.class_position:
            x = add_bias(with_token(self.cls_token, x), self.pos_embed[...])
        else:
            token = spread(self.cls_token[...], (x.shape[0], 1, v.dim))
            x = jnp.concatenate([token, add_bias(x, self.pos_embed[...])], axis=1)
        if hopper.takes_tokens(x, v.heads):  # once, as cuDNN has gradients of even numbers only
            x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0)))
        x = run_blocks(self.blocks, x, **of_one_stage(v, train, key))
        return self.head(self.norm(x[:, 0]))


def grid_of(v: Any, image_size: int) -> int:
    """Return the side of the patch grid; `ValueError` if row or size is invalid."""
    if min(v.dim, v.depth, v.heads, v.in_channels) < 1 or v.dim % v.heads:
        raise ValueError(
            f"dim={v.dim}, depth={v.depth}, heads={v.heads}, in_channels={v.in_channels} must be "
            "positive, and heads must divide dim"
        )
    return architecture_checks.whole_patches(v, image_size)


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Return the constructor of a row's network; `ValueError` if row or image size is invalid."""
    stems.check_stem(v.stem_widths, v.stem_strides, v.stem_kernels)
    grid = grid_of(v, image_size)
    return lambda rngs: VisionTransformer(v, num_classes, grid, rngs)


def token_rows(blocks: str) -> list[Renaming]:
    """List the rows of patches, positions, head, and of the maps and norms in `blocks`."""
    place = rf"({blocks})\."
    return table(
        row(r"cls_token", "cls_token"),
        row(r"pos_embed", "pos_embed", resize=resized),
        convs={r"patch_embed\.proj": "patch_embed.proj.0"},
        norms={place + r"norm([12])": r"\1.norm\2", "norm": "norm"},
        linears={place + r"(attn\.\w+|mlp\.fc[12])": r"\1.\2", "head": "head"},
    )


_SHARED = [
    *token_rows(r"blocks\.\d+"),
    *stems.conv_stem_rows(r"patch_embed\.proj\.stem", "patch_embed.proj"),
]
TORCH_NAMES = [*_SHARED, row(r"(blocks\.\d+\.ls[12])\.gamma", r"\1.gamma")]
OTHER_NAMES = [
    Naming(
        "Facebook's DeiT-III",
        r"blocks\.\d+\.gamma_[12]",
        [*_SHARED, row(r"(blocks\.\d+)\.gamma_([12])", r"\1.ls\2.gamma")],
    )
]


def torch_keys(v: Variant) -> list[str]:
    """List the reference's names in order (timm 1.0.9; with ConvStem, the paper's files)."""
    names = keys("", "cls_token: pos_embed:")
    if v.stem_widths:
        names += stems.conv_stem_keys("patch_embed.proj.stem", len(v.stem_widths), project=True)
    else:
        names += keys("", "patch_embed.proj")
    ls1, ls2 = ("", "") if v.gamma_init is None else ("ls1.gamma:", "ls2.gamma:")
    names += keys("blocks", f"norm1 attn.qkv attn.proj {ls1} norm2 mlp.fc1 mlp.fc2 {ls2}", v.depth)
    return names + keys("", "norm head")


MEMBERS = {
    "vit_s": Member(TorchVariant("vit_small_patch16_224"), PaperFigures("22.05", "4.61")),
    "vit_s_cvst": Member(TorchVariant("vit_small_patch16_224"), PaperFigures("22.78", "4.99")),
    "vit_m": Member(TorchVariant("deit3_medium_patch16_224"), PaperFigures("38.85", "8.01")),
    "vit_m_cvst": Member(TorchVariant("deit3_medium_patch16_224"), PaperFigures("39.5", "8.38")),
    "vit_b": Member(TorchVariant("vit_base_patch16_224"), PaperFigures("86.57", "17.58")),
    "vit_b_cvst": Member(TorchVariant("vit_base_patch16_224"), PaperFigures("87.14", "17.93")),
    "deit_s": Member(
        TorchVariant("deit_small_patch16_224"),
        PaperFigures(None, "4.61"),
        title="DeiT-S",
        decay_mask="matrices-not-tokens",
    ),
}
_STEM, _HEAD = r"patch_embed\.proj\..*", r"head\..*"
NAMES = Names(TORCH_NAMES, torch_keys, _STEM, _HEAD, OTHER_NAMES)
FAMILY = Family("vit", "ViT", VARIANTS, maker, NAMES, MEMBERS, "matrices")
