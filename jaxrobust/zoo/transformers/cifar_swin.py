"""Swin-T with small windows, and one table of position biases for all heads.

Differences from families/swin.py: patches, including the first, are merged by a linear map with
bias and without norm; the bias depends on the key's offset from the query; every second block is
shifted, even if one window covers the map; pixels that only the shift makes neighbors are fully
masked; and the norm comes after the mean over the map, not before it.

Source: Liu et al. 2021 (arXiv 2103.14030), as in berniwal/swin-transformer-pytorch c921ebf (MIT),
whose `swin_t` is the row for 224 px.
"""

from collections.abc import Mapping
from re import Match
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrobust.models.families.swin import merged, partition, relative_index, shift_mask
from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.classifier import of_stages, run_blocks
from jaxrobust.models.interface.family import Names, VariantRow
from jaxrobust.models.interface.renaming import drop, keys, row, table
from jaxrobust.models.kernels import attention
from jaxrobust.models.kernels.primitives import widened
from jaxrobust.models.modules.basic import LayerNorm, Linear, Normalize
from jaxrobust.models.modules.draws import Draws, torch_default
from jaxrobust.types import Array, ModuleMaker
from jaxrobust.zoo.shared import common
from jaxrobust.zoo.shared.transformer import EPS, Mlp, PreNorm, check


class Variant(VariantRow):
    """A row of the table: `models.create` can override every field."""

    dim: int = 96  # of the first stage; doubled at each later one
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    patch: int = 2
    merges: tuple[int, ...] = (1, 2, 2)  # pixels per side that each later stage joins
    window: int = 4
    activation: str = "gelu"  # of the feed-forward parts; or relu, silu, softplus


class Merge(nnx.Module):
    """Merges squares of pixels into tokens, channel by channel, then a linear map."""

    def __init__(self, ins: int, outs: int, side: int, rngs: Draws) -> None:
        self.linear = Linear(ins * side**2, outs, init=torch_default, rngs=rngs)
        self.side = side

    def __call__(self, x: Array) -> Array:
        batch, height, width, dim = x.shape
        grid, side = (height // self.side, width // self.side), self.side
        x = x.reshape(batch, grid[0], side, grid[1], side, dim).transpose(0, 1, 3, 5, 2, 4)
        return self.linear(x.reshape(batch, *grid, dim * side**2))


class WindowAttention(nnx.Module):
    """Attention inside each window, with a learned bias for each offset, the same in all heads."""

    def __init__(self, dim: int, heads: int, shifted: bool, v: Variant, rngs: Draws) -> None:
        offsets = (2 * v.window - 1, 2 * v.window - 1)
        self.pos_embedding = nnx.Param(jax.random.normal(rngs.params(), offsets))
        self.to_qkv = Linear(dim, 3 * dim, bias=False, init=torch_default, rngs=rngs)
        self.to_out = Linear(dim, dim, init=torch_default, rngs=rngs)
        self.heads, self.window = heads, v.window
        self.shift = v.window // 2 if shifted else 0

    def __call__(self, x: Array, train: bool) -> Array:
        side, window, shift = x.shape[1], self.window, self.shift
        x = jnp.roll(x, (-shift, -shift), (1, 2)) if shift else x
        # Wide, because gradients of an offset's pairs are summed in the type of its bias.
        (table,) = widened(self.pos_embedding[...])
        bias = table.ravel()[relative_index(window).T.ravel()]  # by the key's offset from the query
        bias = bias.reshape(1, 1, window**2, window**2)
        if shift:
            strangers = shift_mask(side, window, shift) < 0
            bias = bias + jnp.where(strangers, -jnp.inf, 0).astype(bias.dtype)[:, None]
        qkv = self.to_qkv(partition(x, window))
        y = attention.self_attention(qkv, self.heads, bias=bias)
        x = merged(self.to_out(y), side)
        return jnp.roll(x, (shift, shift), (1, 2)) if shift else x


def block(dim: int, heads: int, shifted: bool, v: Variant, rngs: Draws) -> PreNorm:
    """Make one block."""
    attn = WindowAttention(dim, heads, shifted, v, rngs)
    return PreNorm(dim, attn, Mlp(dim, 4 * dim, v.activation, rngs))


class Stage(nnx.Module):
    """The merge, then the blocks, every second one shifted."""

    def __init__(self, ins: int, merge: int, stage: int, v: Variant, rngs: Draws) -> None:
        dim, heads = v.dim << stage, v.heads[stage]
        self.merge = Merge(ins, dim, merge, rngs)
        pair = lambda: nnx.List([block(dim, heads, s, v, rngs) for s in (False, True)])  # noqa: E731
        self.layers = nnx.List([pair() for _ in range(v.depths[stage] // 2)])

    def __call__(self, x: Array, **settings: Any) -> Array:
        blocks = [block for pair in self.layers for block in pair]
        return run_blocks(blocks, self.merge(x), **settings)


class Swin(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        ins = [v.in_channels, *(v.dim << stage for stage in range(len(v.depths)))]
        for i, merge in enumerate((v.patch, *v.merges)):
            setattr(self, f"stage{i + 1}", Stage(ins[i], merge, i, v, rngs))
        self.norm = LayerNorm(ins[-1], eps=EPS)
        self.head = Linear(ins[-1], num_classes, init=torch_default, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        _check_size(v, *images.shape[1:3])
        x = self.normalize(images).astype(jnp.dtype(v.dtype))
        for i, settings in enumerate(of_stages(v, train, key), 1):
            x = getattr(self, f"stage{i}")(x, **settings)
        return self.head(self.norm(x.mean(axis=(1, 2))))


def _check_size(v: Variant, height: int, width: int) -> None:
    if height != width:
        raise ValueError(f"images of {height} x {width} pixels: the windows need square images")
    multiple, remedy = 1, f"choose another patch, other merges or a window other than {v.window}"
    for stage, merge in enumerate((v.patch, *v.merges), 1):
        multiple *= merge
        if height % multiple:
            raise ValueError(
                f"patch={v.patch} and merges={v.merges} do not divide image_size={height}: stage "
                f"{stage} joins {multiple} pixels per side; {remedy}"
            )
        if (side := height // multiple) % v.window:
            raise ValueError(
                f"patch={v.patch} and merges={v.merges} leave a map of side {side} in stage "
                f"{stage}, which is not a whole number of windows of {v.window}; {remedy}"
            )


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Make the maker of a row's network; `ValueError` where the row or the size cannot work."""
    check(v, "dim", "patch", "window")
    architecture_checks.check_stages(v, "depths", "heads")
    if len(v.merges) != len(v.depths) - 1 or any(n < 1 for n in v.merges):
        raise ValueError(
            f"merges={v.merges!r} must be a tuple of positive integers, one for each stage but the "
            "first, which uses patch"
        )
    if any(depth % 2 for depth in v.depths):
        raise ValueError(f"depths={v.depths} must be even: every second block is shifted")
    if v.window < 2:
        raise ValueError(f"window={v.window}: attention needs windows of at least 2")
    if any((v.dim << i) % heads for i, heads in enumerate(v.heads)):
        raise ValueError(f"heads={v.heads} must divide dim={v.dim}, which doubles at every stage")
    _check_size(v, image_size, image_size)
    return lambda rngs: Swin(v, num_classes, rngs)


def _mask(target: Mapping[str, Any], match: Match[str]) -> np.ndarray:
    """Compute the masks that the reference stores next to a table: -inf between the parts of a
    window in the last row, or the last column, of windows.
    """
    table = target[match.expand(r"\1\2.attn.pos_embedding")]
    window = (table.shape[0] + 1) // 2
    at = np.arange(window**2)
    along = at // window if match[3] == "upper_lower" else at % window
    behind = along >= window - window // 2
    return np.where(behind[:, None] != behind[None], -np.inf, 0).astype(table.dtype)


_BLOCK = r"(stage\d+\.layers\.)(\d+\.\d)\."
_ATTENTION, _MLP = rf"{_BLOCK}attention_block\.fn\.", rf"{_BLOCK}mlp_block\.fn\."
TORCH_NAMES = table(
    row(rf"{_ATTENTION}fn\.pos_embedding", r"\1\2.attn.pos_embedding"),
    drop(rf"{_ATTENTION}fn\.(upper_lower|left_right)_mask", "follows from the window", _mask),
    norms={
        rf"{_ATTENTION}norm": r"\1\2.norm1",
        rf"{_MLP}norm": r"\1\2.norm2",
        r"mlp_head\.0": "norm",
    },
    linears={
        r"(stage\d+)\.patch_partition\.linear": r"\1.merge.linear",
        rf"{_ATTENTION}fn\.(to_qkv|to_out)": r"\1\2.attn.\3",
        rf"{_MLP}fn\.net\.0": r"\1\2.mlp.fc1",
        rf"{_MLP}fn\.net\.2": r"\1\2.mlp.fc2",
        r"mlp_head\.1": "head",
    },
)


def torch_keys(v: Variant) -> list[str]:
    """List the repository's names in its order."""
    names = []
    for i, depth in enumerate(v.depths, 1):
        names += keys(f"stage{i}", "patch_partition.linear")
        for j in range(depth):
            block, masks = f"stage{i}.layers.{j // 2}.{j % 2}", "upper_lower_mask: left_right_mask:"
            names += keys(f"{block}.attention_block.fn", "norm")
            parts = f"{masks * (j % 2)} pos_embedding: to_qkv:w to_out"
            names += keys(f"{block}.attention_block.fn.fn", parts)
            names += keys(f"{block}.mlp_block.fn", "norm fn.net.0 fn.net.2")
    return names + keys("mlp_head", "0 1")


_224 = {"patch": 4, "merges": (2, 2, 2), "window": 7}
_NETWORKS = {
    "cifar_swin": common.Study("Swin-T (32 px)", counted="27.42"),
    "cifar_swin_224": common.Study("Swin-T (224 px, one bias table)", _224),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"stage1\.merge\..*", head=r"head\..*")
FAMILY = common.family("cifar_swin", "Swin", Variant, maker, NAMES, _NETWORKS)
