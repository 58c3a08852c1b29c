"""PVTv2-B1 "linear": keys and values from 7 x 7 means of the map.

If the map is smaller, as in the last stages at 32 px, the 7 x 7 means repeat its pixels. The
feed-forward part has a ReLU before its depthwise convolution, in addition to the activation after
it.

Source: Wang et al. 2022 (arXiv 2106.13797), as in timm 1.0.9 (Apache-2.0): `pvt_v2_b1` with
`linear=True`, also at 224 px. The study's patches of 4, 2 and 1 pixels are the stride of the first
7x7 convolution.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families import residual
from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.classifier import of_stages, run_blocks
from jaxrobust.models.interface.family import Names, VariantRow
from jaxrobust.models.interface.renaming import keys, table
from jaxrobust.models.kernels import attention, layers, pooling
from jaxrobust.models.modules.basic import (
    ACTIVATIONS,
    Conv,
    DepthwiseConv,
    LayerNorm,
    Linear,
    Normalize,
)
from jaxrobust.models.modules.draws import Draws, fan_out
from jaxrobust.types import Array, ModuleMaker
from jaxrobust.zoo.shared import common
from jaxrobust.zoo.shared.transformer import EPS, PreNorm, check

MEANS = 7  # per side of the map, from which keys and values are made


class Variant(VariantRow):
    """A row of the table: `models.create` can override every field."""

    dims: tuple[int, ...] = (64, 128, 320, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    heads: tuple[int, ...] = (1, 2, 5, 8)
    ratios: tuple[int, ...] = (8, 8, 4, 4)  # of the feed-forward parts' hidden units
    patch: int = 4  # stride of the first convolution, 7x7
    activation: str = "gelu"  # or relu, silu, softplus, instead of every GELU


class Embed(nnx.Module):
    """Overlapping patches by a convolution, then LN."""

    def __init__(self, ins: int, outs: int, kernel: int, stride: int, rngs: Draws) -> None:
        self.proj = residual.conv(ins, outs, kernel, rngs, stride, bias=True, init=fan_out)
        self.norm = LayerNorm(outs, eps=EPS)

    def __call__(self, x: Array) -> Array:
        return self.norm(self.proj(x))


class Attention(nnx.Module):
    """Attention of all pixels f[B,H,W,D] to the 7 x 7 means of the map."""

    def __init__(self, dim: int, heads: int, v: Variant, rngs: Draws) -> None:
        self.q, self.kv = Linear(dim, dim, rngs=rngs), Linear(dim, 2 * dim, rngs=rngs)
        self.proj = Linear(dim, dim, rngs=rngs)
        self.sr = Conv(dim, dim, 1, init=fan_out, rngs=rngs)
        self.norm = LayerNorm(dim, eps=EPS)
        self.heads, self.act = heads, ACTIVATIONS[v.activation]

    def __call__(self, x: Array, train: bool) -> Array:
        batch, height, width, dim = x.shape
        q = self.q(x).reshape(batch, height * width, self.heads, -1)
        means = self.sr(pooling.adaptive_avg_pool(x, MEANS))
        kv = self.kv(self.act(self.norm(means))).reshape(batch, MEANS**2, 2, self.heads, -1)
        y = attention.attention(q, kv[:, :, 0], kv[:, :, 1])
        return self.proj(y).reshape(batch, height, width, dim)


class Mlp(nnx.Module):
    """Linear, ReLU, depthwise 3x3, activation, linear."""

    def __init__(self, dim: int, hidden: int, v: Variant, rngs: Draws) -> None:
        self.fc1, self.fc2 = Linear(dim, hidden, rngs=rngs), Linear(hidden, dim, rngs=rngs)
        # He initialization by fan-out, within one group.
        init = jax.nn.initializers.variance_scaling(2.0 * hidden, "fan_out", "normal")
        self.dwconv = DepthwiseConv(hidden, 3, init=init, rngs=rngs)
        self.act = ACTIVATIONS[v.activation]

    def __call__(self, x: Array) -> Array:
        return self.fc2(self.act(self.dwconv(layers.relu(self.fc1(x)))))


def block(dim: int, heads: int, ratio: int, v: Variant, rngs: Draws) -> PreNorm:
    """Make one block."""
    return PreNorm(dim, Attention(dim, heads, v, rngs), Mlp(dim, ratio * dim, v, rngs), eps=1e-6)


class Stage(nnx.Module):
    """Overlapping patches at half the size (except in the first stage), the blocks, LN."""

    def __init__(self, v: Variant, stage: int, rngs: Draws) -> None:
        dim, heads, ratio = v.dims[stage], v.heads[stage], v.ratios[stage]
        self.downsample = Embed(v.dims[stage - 1], dim, 3, 2, rngs) if stage else None
        blocks = [block(dim, heads, ratio, v, rngs) for _ in range(v.depths[stage])]
        self.blocks, self.norm = nnx.List(blocks), LayerNorm(dim)

    def __call__(self, x: Array, **settings: Any) -> Array:
        x = x if self.downsample is None else self.downsample(x)
        return self.norm(run_blocks(self.blocks, x, **settings))


class PVTv2(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        self.patch_embed = Embed(v.in_channels, v.dims[0], 7, v.patch, rngs)
        self.stages = nnx.List([Stage(v, stage, rngs) for stage in range(len(v.dims))])
        self.head = Linear(v.dims[-1], num_classes, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.patch_embed(self.normalize(images).astype(jnp.dtype(v.dtype)))
        for stage, settings in zip(self.stages, of_stages(v, train, key), strict=True):
            x = stage(x, **settings)
        return self.head(x.mean(axis=(1, 2)))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Make the maker of a row's network; `ValueError` where the row or the size cannot work."""
    check(v)
    architecture_checks.check_stages(v, "dims", "depths", "heads", "ratios")
    if any(dim % heads for dim, heads in zip(v.dims, v.heads, strict=True)):
        raise ValueError(f"heads={v.heads} must divide dims={v.dims}, stage by stage")
    fitting = [patch for patch in range(1, 7) if image_size % patch == 0]
    if v.patch not in fitting:
        raise ValueError(
            f"patch={v.patch} must divide image_size={image_size} and be below the 7 pixels of "
            f"the first window; use one of {', '.join(map(str, fitting))}"
        )
    return lambda rngs: PVTv2(v, num_classes, rngs)


_BLOCK = r"stages\.\d+\.blocks\.\d+"
_CONVS = rf"patch_embed\.proj|stages\.\d+\.downsample\.proj|{_BLOCK}\.(?:attn\.sr|mlp\.dwconv)"
_LINEARS = rf"{_BLOCK}\.(?:attn\.(?:q|kv|proj)|mlp\.fc[12])|head"
_NORMS = rf"patch_embed\.norm|stages\.\d+\.(?:downsample\.)?norm|{_BLOCK}\.(?:norm[12]|attn\.norm)"
TORCH_NAMES = table(
    convs={f"({_CONVS})": r"\1"}, linears={f"({_LINEARS})": r"\1"}, norms={f"({_NORMS})": r"\1"}
)


def torch_keys(v: Variant) -> list[str]:
    """List timm 1.0.9's names, in its order."""
    names = keys("patch_embed", "proj norm")
    attn = "attn.q attn.kv attn.proj attn.sr attn.norm"
    block = f"norm1 {attn} norm2 mlp.fc1 mlp.dwconv mlp.fc2"
    for i, depth in enumerate(v.depths):
        names += keys(f"stages.{i}.downsample", "proj norm") if i else []
        names += keys(f"stages.{i}.blocks", block, depth)
        names += keys(f"stages.{i}", "norm")
    return names + keys("", "head")


_NETWORKS = {
    "cifar_pvt_v2": common.Study("PVTv2-B1-Li (32 px)", counted="12.40"),
    "cifar_pvt_v2_224": common.Study("PVTv2-B1-Li (224 px)"),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"patch_embed\..*", head=r"head\..*")
FAMILY = common.family("cifar_pvt_v2", "PVTv2", Variant, maker, NAMES, _NETWORKS)
