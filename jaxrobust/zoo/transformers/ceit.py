"""CeiT-T: a convolutional stem, and feed-forward parts that convolve the grid of patches.

Source: Yuan et al. 2021 (arXiv 2103.11816), as in rishikksh20/CeiT-pytorch (d41cb23), without
attention over layers: batch norms and a GELU also follow the last linear map, and the class token
skips the feed-forward. At 32 px there are four patches. That code's feed-forward has a grid of
14x14; here it is the grid of the patches.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families.vit import with_token
from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.architecture_checks import check_fits
from jaxrobust.models.interface.classifier import of_one_stage, run_blocks
from jaxrobust.models.interface.family import BatchNormRow, Names
from jaxrobust.models.interface.renaming import BATCH_NORM_COUNT, conv_oihw, keys, row, table
from jaxrobust.models.kernels.pooling import max_pool
from jaxrobust.models.kernels.primitives import add_bias
from jaxrobust.models.modules.basic import (
    ACTIVATIONS,
    BatchNorm,
    Conv,
    LayerNorm,
    Linear,
    Normalize,
)
from jaxrobust.models.modules.draws import Draws, Drop, branches, torch_default
from jaxrobust.models.modules.positions import resized
from jaxrobust.types import Array, ModuleMaker
from jaxrobust.zoo.shared import common
from jaxrobust.zoo.shared.transformer import EPS, TokenAttention


class Variant(BatchNormRow):
    """A row of the table: `models.create` can override every field."""

    dim: int = 192
    depth: int = 12
    heads: int = 3  # of 64 channels, whatever `dim` is
    patch: int = 4  # of the stem's map, which has a quarter of the image's side
    stem_width: int = 32
    activation: str = "gelu"  # of the feed-forwards
    scan: bool = False  # compile one block for all of them


class FeedForward(nnx.Module):
    """Linear to four times the width, depthwise 3x3, linear back: each with BN and activation."""

    def __init__(self, v: Variant, rngs: Draws) -> None:
        dim, wide, group = v.dim, 4 * v.dim, v.bn_group
        options: dict[str, Any] = {"init": torch_default, "rngs": rngs}
        self.act = ACTIVATIONS[v.activation]
        self.fc1, self.bn1 = Linear(dim, wide, **options), BatchNorm(wide, group=group)
        self.conv = Conv(wide, wide, 3, padding=1, groups=wide, bias=False, **options)
        self.bn2 = BatchNorm(wide, group=group)
        self.fc2, self.bn3 = Linear(wide, dim, **options), BatchNorm(dim, group=group)

    def __call__(self, x: Array, train: bool) -> Array:
        batch, tokens, _ = x.shape
        side = round(tokens**0.5)
        x = self.act(self.bn1(self.fc1(x), train))
        x = self.conv(x.reshape(batch, side, side, -1))
        x = self.act(self.bn2(x, train)).reshape(batch, tokens, -1)
        return self.act(self.bn3(self.fc2(x), train))


class Block(nnx.Module):
    """x + attention(LN(x)), then, except for the class token, x + feed-forward(LN(x))."""

    def __init__(self, v: Variant, rngs: Draws) -> None:
        self.norm1, self.norm2 = LayerNorm(v.dim, eps=EPS), LayerNorm(v.dim, eps=EPS)
        self.attn = TokenAttention(v.dim, v.heads, 64, rngs)
        self.leff = FeedForward(v, rngs)

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        path1, path2 = branches(drop, 2)
        x = x + path1(self.attn(self.norm1(x)))
        token, patches = x[:, :1], x[:, 1:]
        patches = patches + path2(self.leff(self.norm2(patches), train))
        return jnp.concatenate([token, patches], axis=1)


class CeiT(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, grid: int, rngs: Draws) -> None:
        options: dict[str, Any] = {"init": torch_default, "rngs": rngs}
        self.normalize = Normalize(v.in_channels)
        self.conv = Conv(v.in_channels, v.stem_width, 7, stride=2, padding=4, **options)
        self.bn = BatchNorm(v.stem_width, group=v.bn_group)
        self.patch_embed = Linear(v.patch * v.patch * v.stem_width, v.dim, **options)
        normal = jax.nn.initializers.normal(1.0)
        self.pos_embedding = nnx.Param(normal(rngs.params(), (1, grid * grid + 1, v.dim)))
        self.cls_token = nnx.Param(normal(rngs.params(), (1, 1, v.dim)))
        self.blocks = nnx.List([Block(v, rngs) for _ in range(v.depth)])
        self.norm = LayerNorm(v.dim, eps=EPS)
        self.head = Linear(v.dim, num_classes, **options)
        self.variant, self.grid = v, grid

    def patches(self, images: Array, train: bool) -> Array:
        """Return the stem's patches as tokens f[B,N,D], row by row."""
        x = max_pool(self.bn(self.conv(images), train), 0)
        batch, height, width, channels = x.shape
        grid, patch = self.grid, self.variant.patch
        fits, positions = (
            (height, width) == (grid * patch,) * 2,
            f"{grid}x{grid} patches of {patch}",
        )
        check_fits(fits, images, f"a map of {height}x{width}", f"positions for {positions}")
        x = x.reshape(batch, grid, patch, grid, patch, channels).transpose(0, 1, 3, 2, 4, 5)
        return self.patch_embed(x.reshape(batch, grid * grid, -1))

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.patches(self.normalize(images).astype(jnp.dtype(v.dtype)), train)
        x = add_bias(with_token(self.cls_token, x), self.pos_embedding[...])
        x = run_blocks(self.blocks, x, **of_one_stage(v, train, key))
        return self.head(self.norm(x[:, 0]))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Make the maker of a row's network; `ValueError` where the row or the size cannot work."""
    architecture_checks.check_row(
        v, dim=1, depth=1, heads=1, patch=1, stem_width=1, in_channels=1, bn_group=0
    )
    side = max(0, (image_size + 1) // 2 + 1 - 3) // 2 + 1  # after the convolution and the pooling
    if image_size < 4 or side < v.patch or side % v.patch:
        near = max(1, round(side / v.patch)) * 4 * v.patch
        raise ValueError(
            f"image_size={image_size}: the stem's map of {side}x{side} does not divide into "
            f"patches of {v.patch}x{v.patch}; use image_size={near}, or another patch"
        )
    return lambda rngs: CeiT(v, num_classes, side // v.patch, rngs)


_LAYER = r"transformer\.layers\.(\d+)\."
_ATTN, _LEFF = rf"{_LAYER}0\.fn\.", rf"{_LAYER}1\.fn\."
TORCH_NAMES = table(
    row(r"pos_embedding", "pos_embedding", resize=resized),
    row(r"cls_token", "cls_token"),
    row(rf"{_LEFF}fn\.depth_conv\.0\.weight", r"blocks.\1.leff.conv.kernel", conv_oihw),
    BATCH_NORM_COUNT,
    convs={r"conv\.0": "conv"},
    norms={
        r"conv\.1": "bn",
        rf"{_ATTN}norm": r"blocks.\1.norm1",
        rf"{_LEFF}norm": r"blocks.\1.norm2",
        rf"{_LEFF}fn\.up_proj\.2": r"blocks.\1.leff.bn1",
        rf"{_LEFF}fn\.depth_conv\.1": r"blocks.\1.leff.bn2",
        rf"{_LEFF}fn\.down_proj\.2": r"blocks.\1.leff.bn3",
        r"mlp_head\.0": "norm",
    },
    linears={
        r"to_patch_embedding\.1": "patch_embed",
        rf"{_ATTN}fn\.to_qkv": r"blocks.\1.attn.qkv",
        rf"{_ATTN}fn\.to_out\.0": r"blocks.\1.attn.proj",
        rf"{_LEFF}fn\.up_proj\.0": r"blocks.\1.leff.fc1",
        rf"{_LEFF}fn\.down_proj\.0": r"blocks.\1.leff.fc2",
        r"mlp_head\.1": "head",
    },
)


def torch_keys(v: Variant) -> list[str]:
    """List the names of rishikksh20's code, in its order."""
    names = keys("", "pos_embedding: cls_token: conv.0 conv.1:bn to_patch_embedding.1")
    parts = "up_proj.0 up_proj.2:bn depth_conv.0:w depth_conv.1:bn down_proj.0 down_proj.2:bn"
    feed_forward = " ".join(f"1.fn.fn.{part}" for part in parts.split())
    attn = "0.fn.norm 0.fn.fn.to_qkv:w 0.fn.fn.to_out.0"
    names += keys("transformer.layers", f"{attn} 1.fn.norm {feed_forward}", v.depth)
    return names + keys("mlp_head", "0 1")


_NETWORKS = {
    "cifar_ceit": common.Study("CeiT-T at 32 px", counted="5.56"),
    "cifar_ceit_224": common.Study("CeiT-T"),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"(conv|bn)\..*", head=r"head\..*")
FAMILY = common.family("cifar_ceit", "CeiT", Variant, maker, NAMES, _NETWORKS, any_size=False)
