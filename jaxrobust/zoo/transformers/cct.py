"""CCT: a convolutional tokenizer, and a weighted mean of the tokens with learned weights.

Source: Hassani et al. 2021 (arXiv 2104.05704), CCT-7/3x1 as in SHI-Labs/Compact-Transformers
(cd11f09). The second norm of its blocks is on the trunk instead of before the MLP: the MLP is added
to its own input.
"""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.interface.architecture_checks import check_fits
from jaxrobust.models.interface.classifier import of_one_stage, run_blocks
from jaxrobust.models.interface.family import Names, VariantRow
from jaxrobust.models.interface.renaming import keys, row, table
from jaxrobust.models.kernels import attention, layers, pooling
from jaxrobust.models.kernels.primitives import add_bias, widened
from jaxrobust.models.modules.basic import Conv, LayerNorm, Linear, Normalize
from jaxrobust.models.modules.draws import Draws, Drop, branches, dropouts, normal_02
from jaxrobust.models.modules.positions import resized
from jaxrobust.types import Array, ModuleMaker
from jaxrobust.zoo.shared import common
from jaxrobust.zoo.shared.transformer import EPS, Mlp, Place, check


class Variant(VariantRow):
    """A row of the table: `models.create` can override every field."""

    dim: int = 256
    depth: int = 7
    heads: int = 4
    hidden: int = 512  # of the MLPs
    convolutions: int = 1  # of the tokenizer; all but the last have 64 channels
    kernel: int = 3  # their windows, odd
    stride: int = 1  # of each; a maximum over 3x3 with stride 2 is after it
    activation: str = "gelu"
    attention_dropout: float = 0.1  # of the weights of attention
    drop_path: float = 0.1  # of the last block; grows linearly from 0 at the first
    scan: bool = False  # compile one block for all of them


class Attention(nnx.Module):
    """Attention of all tokens to all, with dropout of its weights in training."""

    def __init__(self, dim: int, heads: int, rngs: Draws) -> None:
        self.qkv = Linear(dim, 3 * dim, bias=False, rngs=rngs)
        self.proj = Linear(dim, dim, rngs=rngs)
        self.heads = heads

    def __call__(self, x: Array, dropout: Place | None) -> Array:
        qkv = self.qkv(x)
        if dropout is None:
            return self.proj(attention.self_attention(qkv, self.heads))
        batch, tokens, dim = x.shape
        parts = qkv.reshape(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = (parts[:, :, i] for i in range(3))
        scaled, wide = q * q.shape[-1] ** -0.5, widened(q)[0].dtype
        logits = jnp.einsum("bqhd,bkhd->bhqk", scaled, k, preferred_element_type=wide)
        weights = dropout(jax.nn.softmax(logits).astype(x.dtype))
        return self.proj(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))


class Block(nnx.Module):
    """y = LN(x + attention(LN(x))), then y + MLP(y)."""

    def __init__(self, v: Variant, rngs: Draws) -> None:
        self.pre_norm, self.norm1 = (LayerNorm(v.dim, eps=EPS) for _ in range(2))
        self.self_attn = Attention(v.dim, v.heads, rngs)
        self.mlp = Mlp(v.dim, v.hidden, v.activation, rngs, init=normal_02)
        self.attention_dropout = v.attention_dropout

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        path1, path2 = branches(drop, 2)
        (dropout,) = dropouts(drop, 1, self.attention_dropout, paths=2)
        draws = train and self.attention_dropout > 0
        x = x + path1(self.self_attn(self.pre_norm(x), dropout if draws else None))
        x = self.norm1(x)
        return x + path2(self.mlp(x))


class Tokenizer(nnx.Module):
    """Convolutions without bias, each followed by ReLU and max pooling: tokens, row by row."""

    def __init__(self, v: Variant, rngs: Draws) -> None:
        he = jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        settings: dict[str, Any] = {"stride": v.stride, "padding": v.kernel // 2, "bias": False}
        widths = (v.in_channels, *(64,) * (v.convolutions - 1), v.dim)
        convs = [Conv(*pair, v.kernel, init=he, rngs=rngs, **settings) for pair in pairwise(widths)]
        self.conv_layers = nnx.List(convs)

    def __call__(self, x: Array) -> Array:
        for conv in self.conv_layers:
            x = pooling.max_pool(layers.relu(conv(x)))
        return x.reshape(x.shape[0], -1, x.shape[3])


class CCT(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, grid: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        self.tokenizer = Tokenizer(v, rngs)
        draw = jax.nn.initializers.normal(0.2)
        self.pos_embed = nnx.Param(draw(rngs.params(), (1, grid * grid, v.dim)))
        self.blocks = nnx.List([Block(v, rngs) for _ in range(v.depth)])
        self.norm = LayerNorm(v.dim, eps=EPS)
        self.attention_pool = Linear(v.dim, 1, rngs=rngs)
        self.head = Linear(v.dim, num_classes, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.tokenizer(self.normalize(images).astype(jnp.dtype(v.dtype)))
        tokens, positions = x.shape[1], self.pos_embed.shape[1]
        check_fits(tokens == positions, images, f"{tokens} tokens", f"positions for {positions}")
        x = add_bias(x, self.pos_embed[...])
        settings = of_one_stage(v, train, key)
        x = self.norm(run_blocks(self.blocks, x, draws=v.attention_dropout > 0, **settings))
        (logits,) = widened(self.attention_pool(x))
        weights = jax.nn.softmax(logits[:, :, 0]).astype(x.dtype)
        return self.head(jnp.einsum("bn,bnd->bd", weights, x))


def grid_of(v: Variant, image_size: int) -> int:
    """Return the side of the grid of tokens, 0 if there is none."""
    side = image_size
    for _ in range(v.convolutions):
        side = ((side - 1) // v.stride + 2) // 2 if side > 0 else 0
    return side


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Make the maker of a row's network; `ValueError` where the row or the size cannot work."""
    check(v, "dim", "depth", "heads", "hidden", "convolutions", "kernel", "stride")
    if v.kernel % 2 == 0:
        raise ValueError(f"kernel={v.kernel} must be odd, so that windows have a center pixel")
    grid = grid_of(v, image_size)
    return lambda rngs: CCT(v, num_classes, grid, rngs)


_BLOCK = r"classifier\.blocks\.(\d+)\."
TORCH_NAMES = table(
    row(r"classifier\.positional_emb", "pos_embed", resize=resized),
    convs={r"tokenizer\.conv_layers\.(\d+)\.0": r"tokenizer.conv_layers.\1"},
    norms={_BLOCK + r"(pre_norm|norm1)": r"blocks.\1.\2", r"classifier\.norm": "norm"},
    linears={
        _BLOCK + r"self_attn\.(qkv|proj)": r"blocks.\1.self_attn.\2",
        _BLOCK + r"linear([12])": r"blocks.\1.mlp.fc\2",
        r"classifier\.attention_pool": "attention_pool",
        r"classifier\.fc": "head",
    },
)


def torch_keys(v: Variant) -> list[str]:
    """List the names of the public code, in its order."""
    names = keys("tokenizer.conv_layers", "0:w", v.convolutions)
    names += keys("classifier", "positional_emb: attention_pool")
    block = "pre_norm self_attn.qkv:w self_attn.proj linear1 norm1 linear2"
    names += keys("classifier.blocks", block, v.depth)
    return names + keys("classifier", "norm fc")


_224 = {"dim": 384, "depth": 14, "heads": 6, "hidden": 1152}
_224 |= {"convolutions": 2, "kernel": 7, "stride": 2}
_NETWORKS = {
    "cifar_cct": common.Study("CCT-7/3x1", counted="3.76"),
    "cifar_cct_224": common.Study("CCT-14/7x2", _224),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"tokenizer\..*", head=r"head\..*")
FAMILY = common.family("cifar_cct", "CCT (32 px)", Variant, maker, NAMES, _NETWORKS, any_size=False)
