"""CvT-13: queries, keys and values from depthwise convolutions, no class token.

Source: Wu et al. 2021 (arXiv 2103.15808), as in lucidrains/vit-pytorch 69d24fe (MIT), whose sizes
the row for 224 px has. The study's first convolution is 3x3 with stride 2, not 7x7 with stride 4.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families import residual
from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.classifier import of_stages, run_blocks
from jaxrobust.models.interface.family import BatchNormRow, Names
from jaxrobust.models.interface.renaming import (
    BATCH_NORM_COUNT,
    channels,
    conv_oihw,
    keys,
    pointwise_oi,
    row,
    table,
)
from jaxrobust.models.kernels import attention
from jaxrobust.models.modules.basic import BatchNorm, LayerNorm, Linear, Normalize
from jaxrobust.models.modules.draws import Draws, torch_default
from jaxrobust.types import Array, ModuleMaker
from jaxrobust.zoo.shared import common
from jaxrobust.zoo.shared.transformer import EPS, Mlp, PreNorm, check


class Variant(BatchNormRow):
    """A row of the table: `models.create` can override every field."""

    dims: tuple[int, ...] = (64, 192, 384)
    depths: tuple[int, ...] = (1, 2, 10)
    heads: tuple[int, ...] = (1, 3, 6)
    head_dim: int = 64
    window: int = 3  # of the first convolution, odd; 3 in the other stages
    patch: int = 2  # its stride; 2 in the other stages
    activation: str = "gelu"  # of the feed-forward parts; or relu, silu, softplus


class Project(nnx.Module):
    """Depthwise 3x3, BN, linear: f[B,H,W,D] -> f[B,H/stride,W/stride,outs]."""

    def __init__(self, dim: int, outs: int, stride: int, v: Variant, rngs: Draws) -> None:
        self.conv = residual.conv(dim, dim, 3, rngs, stride, groups=dim)
        self.norm = BatchNorm(dim, group=v.bn_group)
        self.linear = Linear(dim, outs, bias=False, init=torch_default, rngs=rngs)

    def __call__(self, x: Array, train: bool) -> Array:
        return self.linear(self.norm(self.conv(x), train))


class Attention(nnx.Module):
    """Attention of all pixels f[B,H,W,D] to every second pixel of each row and column."""

    def __init__(self, dim: int, heads: int, v: Variant, rngs: Draws) -> None:
        inner = heads * v.head_dim
        self.to_q, self.to_kv = Project(dim, inner, 1, v, rngs), Project(dim, 2 * inner, 2, v, rngs)
        self.to_out = Linear(inner, dim, init=torch_default, rngs=rngs)
        self.heads = heads

    def __call__(self, x: Array, train: bool) -> Array:
        batch, height, width, dim = x.shape
        q = self.to_q(x, train).reshape(batch, height * width, self.heads, -1)
        kv = self.to_kv(x, train).reshape(batch, -1, 2, self.heads, q.shape[3])
        y = attention.attention(q, kv[:, :, 0], kv[:, :, 1])
        return self.to_out(y).reshape(batch, height, width, dim)


def block(dim: int, heads: int, v: Variant, rngs: Draws) -> PreNorm:
    """Make one block."""
    return PreNorm(dim, Attention(dim, heads, v, rngs), Mlp(dim, 4 * dim, v.activation, rngs))


class Stage(nnx.Module):
    """An overlapping convolution, LN, then the blocks."""

    def __init__(self, ins: int, stage: int, v: Variant, rngs: Draws) -> None:
        dim, heads = v.dims[stage], v.heads[stage]
        window, stride = (3, 2) if stage else (v.window, v.patch)
        self.embed = residual.conv(ins, dim, window, rngs, stride, bias=True)
        self.norm = LayerNorm(dim, eps=EPS)
        self.blocks = nnx.List([block(dim, heads, v, rngs) for _ in range(v.depths[stage])])

    def __call__(self, x: Array, **settings: Any) -> Array:
        return run_blocks(self.blocks, self.norm(self.embed(x)), **settings)


class CvT(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        ins = (v.in_channels, *v.dims)
        self.stages = nnx.List([Stage(ins[i], i, v, rngs) for i in range(len(v.dims))])
        self.head = Linear(ins[-1], num_classes, init=torch_default, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.normalize(images).astype(jnp.dtype(v.dtype))
        for stage, settings in zip(self.stages, of_stages(v, train, key), strict=True):
            x = stage(x, **settings)
        return self.head(x.mean(axis=(1, 2)))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Make the maker of a row's network; `ValueError` where the row or the size cannot work."""
    check(v, "head_dim")
    architecture_checks.check_stages(v, "dims", "depths", "heads")
    architecture_checks.check_row(v, bn_group=0)
    if v.window < 1 or v.window % 2 == 0:
        raise ValueError(f"window={v.window} must be odd, such as 3 or 7")
    fitting = [patch for patch in range(1, v.window + 1) if image_size % patch == 0]
    if v.patch not in fitting:
        raise ValueError(
            f"patch={v.patch} must divide image_size={image_size} and be at most the window of "
            f"{v.window}; use one of {', '.join(map(str, fitting))}"
        )
    return lambda rngs: CvT(v, num_classes, rngs)


_STAGE = r"layers\.(\d+)\."
_BLOCK = rf"{_STAGE}2\.layers\.(\d+)\."
_OURS = r"stages.\1.blocks.\2."
_PROJECT = rf"{_BLOCK}0\.(to_q|to_kv)\.net\."
# Their pattern -> our name, for channel norms and 1x1 convolutions.
_NORMS = {
    rf"{_STAGE}1": r"stages.\1.norm",
    rf"{_BLOCK}0\.norm": f"{_OURS}norm1",
    rf"{_BLOCK}1\.net\.0": f"{_OURS}norm2",
}
_LINEARS = {
    rf"{_PROJECT}2": rf"{_OURS}attn.\3.linear",
    rf"{_BLOCK}0\.to_out\.0": f"{_OURS}attn.to_out",
    rf"{_BLOCK}1\.net\.1": f"{_OURS}mlp.fc1",
    rf"{_BLOCK}1\.net\.4": f"{_OURS}mlp.fc2",
}
TORCH_NAMES = table(
    *(row(rf"{a}\.g", f"{b}.scale", channels) for a, b in _NORMS.items()),
    *(row(rf"{a}\.b", f"{b}.bias", channels) for a, b in _NORMS.items()),
    *(row(rf"{a}\.weight", f"{b}.kernel", pointwise_oi) for a, b in _LINEARS.items()),
    *(row(rf"{a}\.bias", f"{b}.bias") for a, b in _LINEARS.items()),
    row(rf"{_PROJECT}0\.weight", rf"{_OURS}attn.\3.conv.kernel", conv_oihw),
    BATCH_NORM_COUNT,
    convs={rf"{_STAGE}0": r"stages.\1.embed"},
    norms={rf"{_PROJECT}1": rf"{_OURS}attn.\3.norm"},
    linears={r"to_logits\.2": "head"},
)


def torch_keys(v: Variant) -> list[str]:
    """List the repository's names in its order."""
    names = []
    project = " ".join(f"0.{to}.net.0:w 0.{to}.net.1:bn 0.{to}.net.2:w" for to in ("to_q", "to_kv"))
    parts = f"0.norm.g: 0.norm.b: {project} 0.to_out.0 1.net.0.g: 1.net.0.b: 1.net.1 1.net.4"
    for i, depth in enumerate(v.depths):
        names += keys(f"layers.{i}", "0 1.g: 1.b:")
        names += keys(f"layers.{i}.2.layers", parts, depth)
    return names + keys("", "to_logits.2")


_NETWORKS = {
    "cifar_cvt": common.Study("CvT-13 (32 px)", counted="19.54"),
    "cifar_cvt_224": common.Study("CvT-13 (224 px)", {"window": 7, "patch": 4}),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"stages\.0\.(embed|norm)\..*", head=r"head\..*")
FAMILY = common.family("cifar_cvt", "CvT", Variant, maker, NAMES, _NETWORKS)
