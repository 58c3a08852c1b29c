"""XCiT: attention between channels instead of patches, for any image size.

Source: El-Nouby et al. 2021 (arXiv 2106.09681); robust variants: Debenedetti et al. 2022 (arXiv
2209.07399).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrobust.models.families import residual
from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.classifier import of_one_stage, run_blocks
from jaxrobust.models.interface.family import (
    BatchNormRow,
    Family,
    Member,
    Names,
    PaperFigures,
    TorchVariant,
)
from jaxrobust.models.interface.renaming import BATCH_NORM_COUNT, Naming, keys, row, table
from jaxrobust.models.kernels import attention, channel_attention, layers
from jaxrobust.models.kernels.local_interaction import Interaction, local_interaction
from jaxrobust.models.kernels.primitives import add_bias, spread
from jaxrobust.models.kernels.stem_layers import BatchLayer, batch_stem_layers
from jaxrobust.models.modules.basic import (
    BatchNorm,
    Conv,
    DepthwiseConv,
    Gelu,
    LayerNorm,
    Linear,
    Mlp,
    Normalize,
)
from jaxrobust.models.modules.draws import Draws, Drop, branches, normal_02, torch_default
from jaxrobust.models.modules.positions import fourier_features
from jaxrobust.types import Array, ModuleMaker

Path = Callable[[Array], Array]  # stochastic depth of a branch


class Variant(BatchNormRow):
    """A row of the table; `drop_path` is the rate of every block, the same at all depths."""

    dim: int
    depth: int
    heads: int
    # Of the stem's 3x3 convolutions, whose channels double up to `dim`; the product is the patch.
    stem_strides: tuple[int, ...] = (2, 2, 2, 2)
    gamma_init: float = 1.0
    tokens_norm: bool = True  # class attention normalizes all tokens, not only the class token
    scan: bool = False  # compile one block for all of them


_SIZES = {
    "xcit_n12": Variant(128, 12, 4, tokens_norm=False),
    "xcit_t12": Variant(192, 12, 4),
    "xcit_t24": Variant(192, 24, 4, gamma_init=1e-5),
    "xcit_s12": Variant(384, 12, 8),
    "xcit_s24": Variant(384, 24, 8, gamma_init=1e-5),
    "xcit_m12": Variant(512, 12, 8),
    "xcit_l12": Variant(768, 12, 16),
}
# For 32 px images, patches of 4 px keep the weights of 16 px; only two strides change.
_STEMS = {"": (2, 2, 2, 2), "_p8": (2, 2, 2), "_p4": (1, 1, 2, 2)}
VARIANTS = {
    name + suffix: size._replace(stem_strides=strides)
    for name, size in _SIZES.items()
    for suffix, strides in _STEMS.items()
}


class PatchEmbed(nnx.Module):
    """3x3 convolutions with batch norm, and GELU between them but not after the last."""

    def __init__(self, v: Variant, rngs: Draws) -> None:
        ins, proj = v.in_channels, []
        for i, stride in enumerate(v.stem_strides, 1):
            out = v.dim >> (len(v.stem_strides) - i)
            conv = residual.conv(ins, out, 3, rngs, stride)
            proj += [nnx.List([conv, BatchNorm(out, group=v.bn_group)]), Gelu()]
            ins = out
        self.proj = nnx.List(proj[:-1])
        self.halved_twice = v.stem_strides[:2] == (2, 2) and len(v.stem_strides) > 2

    def _first_layers(self, x: Array, train: bool) -> Array:
        pairs = [cast(nnx.List, self.proj[i]) for i in (0, 2)]
        one, two = (
            BatchLayer(conv.kernel[...], norm.scale[...], norm.bias[...]) for conv, norm in pairs
        )
        norms = [norm for _, norm in pairs]
        first, second = ((norm.mean[...], norm.var[...]) for norm in norms)
        running = None if train else (first, second)
        x, statistics = batch_stem_layers(x, (one, two), running, group=norms[0].group)
        for norm, moments in zip(norms, statistics, strict=True):
            if train:
                norm.move(*moments)
        return x

    def __call__(self, x: Array, train: bool) -> Array:
        x = self._first_layers(x, train) if self.halved_twice else x
        for layer in self.proj[4 if self.halved_twice else 0 :]:
            if isinstance(layer, Gelu):
                x = layer(x)
            else:
                conv, norm = cast(nnx.List, layer)
                x = norm(conv(x), train)
        return x


class FourierPositions(nnx.Module):
    """A learned 1x1 convolution of each position's sines and cosines."""

    def __init__(self, dim: int, rngs: Draws) -> None:
        self.token_projection = Conv(64, dim, 1, init=torch_default, rngs=rngs)

    def __call__(self, height: int, width: int, dtype: jnp.dtype) -> Array:
        return self.token_projection(jnp.asarray(fourier_features(height, width), dtype)[None])


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tokens"], meta_fields=["width"])
@dataclasses.dataclass(frozen=True)
class TokenMap:
    """Tokens f[B,N,D] of maps with rows of `width`; TPUs would pad separate axes."""

    tokens: Array
    width: int


class CrossCovariance(nnx.Module):
    """Attention between channels within each head."""

    def __init__(self, dim: int, heads: int, rngs: Draws) -> None:
        self.temperature = nnx.Param(jnp.ones((heads, 1, 1)))
        self.qkv = Linear(dim, 3 * dim, rngs=rngs)
        self.proj = Linear(dim, dim, rngs=rngs)

    def hidden(self, x: Array) -> Array:
        """Compute f[B,N,D], the output without its last map, which is fused with what follows."""
        return channel_attention.self_cross_covariance(self.qkv(x), self.temperature[...])


class LocalInteraction(nnx.Module):
    """Depthwise 3x3, GELU, batch norm, depthwise 3x3: mixes neighboring patches."""

    def __init__(self, dim: int, group: int, rngs: Draws) -> None:
        self.conv1 = DepthwiseConv(dim, 3, init=torch_default, rngs=rngs)
        self.bn = BatchNorm(dim, group=group)
        self.conv2 = DepthwiseConv(dim, 3, init=torch_default, rngs=rngs)

    def __call__(
        self, x: TokenMap, norm: LayerNorm, gamma: nnx.Param, path: Path | None, train: bool
    ) -> Array:
        """Add this layer's output for the normalized tokens f[B,N,D], times `gamma`."""
        bn = self.bn
        parameters = Interaction(
            *(norm.scale[...], norm.bias[...], self.conv1.kernel[...], self.conv1.bias[...]),
            *(cast(nnx.Param, bn.scale)[...], cast(nnx.Param, bn.bias)[...]),
            *(self.conv2.kernel[...], self.conv2.bias[...], gamma[...]),
        )
        running = None if train else (bn.mean[...], bn.var[...])
        settings = {"width": x.width, "group": bn.group}
        out, statistics = local_interaction(x.tokens, parameters, running, path, **settings)
        if train:
            bn.move(*statistics)
        return out


def _residual(
    x: Array, hidden: Array, last: Linear, gamma: nnx.Param, path: Path | None = None
) -> Array:
    """Compute x + path(gamma * last(hidden))."""
    kernel, bias = last.kernel[...], cast(nnx.Param, last.bias)[...]
    return layers.linear_residual(x, hidden, kernel, bias, gamma[...], path)


class Block(nnx.Module):
    """Tokens plus attention between channels, plus local interaction, plus MLP."""

    def __init__(self, v: Variant, rngs: Draws) -> None:
        self.gamma1, self.gamma3, self.gamma2 = (_gamma(v) for _ in range(3))
        self.norm1 = LayerNorm(v.dim)
        self.attn = CrossCovariance(v.dim, v.heads, rngs)
        self.norm3 = LayerNorm(v.dim)
        self.local_mp = LocalInteraction(v.dim, v.bn_group, rngs)
        self.norm2 = LayerNorm(v.dim)
        self.mlp = Mlp(v.dim, rngs)

    def __call__(self, x: TokenMap, drop: Drop | None, train: bool) -> TokenMap:
        paths: Sequence[Path | None] = [None] * 3 if drop is None else branches(drop, 3)
        attn, mlp, y = self.attn, self.mlp, x.tokens
        normal, y = self.norm1.with_tokens(y)
        y = _residual(y, attn.hidden(normal), attn.proj, self.gamma1, paths[0])
        y = self.local_mp(TokenMap(y, x.width), self.norm3, self.gamma3, paths[1], train)
        normal, y = self.norm2.with_tokens(y)
        y = _residual(y, mlp.inner(normal), mlp.fc2, self.gamma2, paths[2])
        return TokenMap(y, x.width)


class ClassAttention(nnx.Module):
    """Attention of the class token to all tokens."""

    def __init__(self, dim: int, heads: int, rngs: Draws) -> None:
        self.q, self.k, self.v, self.proj = (Linear(dim, dim, rngs=rngs) for _ in range(4))
        self.heads = heads

    def hidden(self, token: Array, patches: Array) -> Array:
        """Compute the output without its last map, which is fused with what follows."""
        tokens = jnp.concatenate([token, patches], 1)
        q, k, v = (
            layer(x).reshape(*x.shape[:2], self.heads, -1)
            for layer, x in ((self.q, token), (self.k, tokens), (self.v, tokens))
        )
        return attention.attention(q, k, v)


class ClassBlock(nnx.Module):
    """Class attention and MLP on the class token; the patches change too, as in the original.

    Their normalized values are added to them, and the last residual doubles them.
    """

    def __init__(self, v: Variant, rngs: Draws) -> None:
        self.gamma1, self.gamma2 = _gamma(v), _gamma(v)
        self.norm1 = LayerNorm(v.dim)
        self.attn = ClassAttention(v.dim, v.heads, rngs)
        self.norm2 = LayerNorm(v.dim)
        self.mlp = Mlp(v.dim, rngs)
        self.tokens_norm = v.tokens_norm

    def __call__(self, token: Array, patches: Array) -> tuple[Array, Array]:
        attn, mlp = self.attn, self.mlp
        normal = self.norm1(patches)
        update = attn.hidden(self.norm1(token), normal)
        token = self.norm2(_residual(token, update, attn.proj, self.gamma1))
        patches = patches + layers.scale(normal, self.gamma1[...])
        patches = self.norm2(patches) if self.tokens_norm else patches
        return _residual(token, mlp.inner(token), mlp.fc2, self.gamma2), 2 * patches


class Xcit(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        self.cls_token = nnx.Param(normal_02(rngs.params(), (1, 1, v.dim)))
        self.patch_embed = PatchEmbed(v, rngs)
        self.pos_embed = FourierPositions(v.dim, rngs)
        self.blocks = nnx.List([Block(v, rngs) for _ in range(v.depth)])
        self.cls_attn_blocks = nnx.List([ClassBlock(v, rngs) for _ in range(2)])
        self.norm = LayerNorm(v.dim)
        self.head = Linear(v.dim, num_classes, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.patch_embed(self.normalize(images).astype(jnp.dtype(v.dtype)), train)
        x = add_bias(x, self.pos_embed(x.shape[1], x.shape[2], x.dtype))
        settings = of_one_stage(v, train, key) | {"rates": (v.drop_path,) * v.depth}
        tokens = TokenMap(x.reshape(len(x), -1, v.dim), x.shape[2])
        patches = run_blocks(self.blocks, tokens, **settings).tokens
        token = spread(self.cls_token[...], (len(patches), 1, v.dim))
        for block in self.cls_attn_blocks:
            token, patches = block(token, patches)
        return self.head(self.norm(token)[:, 0])


def _gamma(v: Variant) -> nnx.Param:
    return nnx.Param(jnp.full(v.dim, v.gamma_init, jnp.float32))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Return the constructor of a row's network; `ValueError` if row or image size is invalid."""
    strides = v.stem_strides
    architecture_checks.check_tuples(v, "stem_strides")
    if min(v.dim, v.depth, v.heads, v.in_channels) < 1 or v.dim % v.heads:
        raise ValueError(
            f"dim={v.dim}, depth={v.depth}, heads={v.heads} and in_channels={v.in_channels} must "
            "be positive, and heads must divide dim"
        )
    if v.dim % 2 ** (len(strides) - 1):
        raise ValueError(
            f"dim={v.dim} cannot be reached by doubling the channels {len(strides) - 1} times; "
            "use a dim that can be halved that often, or fewer stem_strides"
        )
    if v.bn_group < 0:
        raise ValueError(f"bn_group={v.bn_group} must be a number of images, or 0 for all of them")
    if image_size < math.prod(strides):
        raise ValueError(
            f"image_size={image_size} is smaller than a patch of {math.prod(strides)} px; use a "
            "larger image_size, smaller stem_strides, or the variant with _p4"
        )
    return lambda rngs: Xcit(v, num_classes, rngs)


_CONVS = r"patch_embed\.proj\.\d\.0|blocks\.\d+\.local_mp\.conv[12]"
_LINEARS = (
    r"blocks\.\d+\.attn\.(?:qkv|proj)|cls_attn_blocks\.\d\.attn\.(?:[qkv]|proj)"
    r"|(?:cls_attn_)?blocks\.\d+\.mlp\.fc[12]|head"
)
_NORMS = (
    r"patch_embed\.proj\.\d\.1|blocks\.\d+\.local_mp\.bn|(?:cls_attn_)?blocks\.\d+\.norm[123]|norm"
)
_SHARED = table(
    row(r"(cls_token|.+\.gamma[123]|.+\.temperature)", r"\1"),
    BATCH_NORM_COUNT,
    convs={f"({_CONVS})": r"\1"},
    linears={f"({_LINEARS})": r"\1"},
    norms={f"({_NORMS})": r"\1"},
)
_POSITIONS = "pos_embed.token_projection"
TORCH_NAMES = table(*_SHARED, convs={r"pos_embed\.token_projection": _POSITIONS})
_FUSED = r"(cls_attn_blocks\.\d\.attn)\.qkv"
_KERNELS, _BIASES = (tuple(rf"\1.{a}.{part}" for a in "qkv") for part in ("kernel", "bias"))
OTHER_NAMES = [
    Naming(
        "Facebook's XCiT",
        rf"pos_embeder\..*|{_FUSED}\.weight",
        [
            *_SHARED,
            *table(convs={r"pos_embed(?:er)?\.token_projection": _POSITIONS}),
            row(_FUSED + r"\.weight", _KERNELS, lambda a: np.split(a.T, 3, axis=1)),
            row(_FUSED + r"\.bias", _BIASES, lambda a: np.split(a, 3)),
        ],
    )
]


def torch_keys(v: Variant) -> list[str]:
    """List the reference's names in order (timm 1.0.9)."""
    names = ["cls_token"]
    for slot in range(0, 2 * len(v.stem_strides), 2):
        names += keys(f"patch_embed.proj.{slot}", "0:w 1:bn")
    names += keys("", _POSITIONS)
    attn = "gamma1: gamma3: gamma2: norm1 attn.temperature: attn.qkv attn.proj"
    local = "norm3 local_mp.conv1 local_mp.bn:bn local_mp.conv2"
    names += keys("blocks", f"{attn} {local} norm2 mlp.fc1 mlp.fc2", v.depth)
    attn = "gamma1: gamma2: norm1 attn.q attn.k attn.v attn.proj"
    names += keys("cls_attn_blocks", f"{attn} norm2 mlp.fc1 mlp.fc2", 2)
    return names + keys("", "norm head")


_PAPERS = {
    "xcit_s12": PaperFigures(None, "4.82"),
    "xcit_m12": PaperFigures(None, "8.54"),
    "xcit_l12": PaperFigures(None, "18.97"),
}
_OF_TIMM = {
    "xcit_n12": TorchVariant("xcit_nano_12_p16_224"),
    "xcit_t12": TorchVariant("xcit_tiny_12_p16_224"),
    "xcit_t24": TorchVariant("xcit_tiny_24_p16_224"),
    "xcit_s12": TorchVariant("xcit_small_12_p16_224"),
    "xcit_s24": TorchVariant("xcit_small_24_p16_224"),
    # timm has only the versions with 24 blocks
    "xcit_m12": TorchVariant("xcit_medium_24_p16_224", {"depth": 12, "eta": 1.0}),
    "xcit_l12": TorchVariant("xcit_large_24_p16_224", {"depth": 12, "eta": 1.0}),
}


def _members() -> dict[str, Member]:
    """List all members: patches of 8 px use another stem, patches of 4 px change two strides."""
    members = {}
    for name, p16 in _OF_TIMM.items():
        members[name] = Member(p16, _PAPERS.get(name))
        members[f"{name}_p8"] = Member(p16._replace(base=p16.base.replace("_p16_", "_p8_")))
        members[f"{name}_p4"] = Member(p16._replace(strides=(1, 1)), counted_at=32)
    return members


_STEM, _HEAD = r"patch_embed\..*", r"head\..*"
NAMES = Names(TORCH_NAMES, torch_keys, _STEM, _HEAD, OTHER_NAMES)
FAMILY = Family(
    *("xcit", "XCiT", VARIANTS, maker, NAMES, _members(), "matrices-not-tokens"),
    any_size=True,
    compared={"positions": "in float64 with PyTorch's rounding of float32 sines on both sides"},
)
