"""CvT-13 of a study at 32 px: queries, keys and values through depthwise convolutions, no token.

Sources: Wu et al. 2021 (arXiv 2103.15808), as lucidrains/vit-pytorch 69d24fe (MIT) has it; in the
study: Tang et al. 2022 (arXiv 2209.14105), Table 1, whose first convolution was found by
counting parameters: 3x3 at stride 2 for 7x7 at stride 4. Parity: tests/models/cifar/test_stages.py
against golden logits of that repository. The row of 224 px is ours: the repository's own sizes.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.cifar.shared import common
from jaxrobust.models.cifar.shared.transformer import EPS, Mlp, check
from jaxrobust.models.interface.classifier import classifier, of_stages, run_blocks
from jaxrobust.models.interface.family import Family, Member, Names, Paper, Reference
from jaxrobust.models.interface.renaming import (
    BATCH_NORM_COUNT,
    Row,
    affine,
    batch_norm,
    channels,
    conv_oihw,
    conv_rows,
    linear_rows,
    norm_rows,
    pointwise_oi,
    row,
)
from jaxrobust.models.kernels import attention
from jaxrobust.models.modules.basic import BatchNorm, Conv, LayerNorm, Linear, Normalize
from jaxrobust.models.modules.initializers import Draws
from jaxrobust.models.modules.stochastic_depth import Drop, branches
from jaxrobust.types import Array, Classifier


class Variant(NamedTuple):
    """One row of the table: every field can be overridden in `models.create`."""

    dims: tuple[int, ...] = (64, 192, 384)
    depths: tuple[int, ...] = (1, 2, 10)
    heads: tuple[int, ...] = (1, 3, 6)
    head_dim: int = 64
    window: int = 3  # of the first convolution, odd; those of the other stages have 3
    patch: int = 2  # and its stride; those of the other stages have 2
    activation: str = "gelu"  # of the feed-forward parts; or relu, silu, softplus
    bn_group: int = 0  # batch statistics in training: of the whole batch, or of so many images
    drop_path: float = 0.0  # of the last block; grows linearly from 0 at the first
    in_channels: int = 3
    remat: bool = False  # recompute each block in the backward pass instead of storing it
    dtype: str = "float32"  # compute type; parameters stay float32


VARIANTS = {"cifar_cvt": Variant(), "cifar_cvt_224": Variant(window=7, patch=4)}


class Project(nnx.Module):
    """Depthwise 3x3, BN, linear: f[B,H,W,D] -> f[B,H/stride,W/stride,outs]."""

    def __init__(self, dim: int, outs: int, stride: int, v: Variant, rngs: Draws) -> None:
        how: dict[str, Any] = {"bias": False, "torch_init": True, "rngs": rngs}
        self.conv = Conv(dim, dim, 3, stride=stride, padding=1, groups=dim, **how)
        self.norm, self.linear = BatchNorm(dim, group=v.bn_group), Linear(dim, outs, **how)

    def __call__(self, x: Array, train: bool) -> Array:
        return self.linear(self.norm(self.conv(x), train))


class Attention(nnx.Module):
    """Attention of all pixels f[B,H,W,D] to every second one of each row and column."""

    def __init__(self, dim: int, heads: int, v: Variant, rngs: Draws) -> None:
        inner = heads * v.head_dim
        self.to_q, self.to_kv = Project(dim, inner, 1, v, rngs), Project(dim, 2 * inner, 2, v, rngs)
        self.to_out = Linear(inner, dim, torch_init=True, rngs=rngs)
        self.heads = heads

    def __call__(self, x: Array, train: bool) -> Array:
        batch, height, width, dim = x.shape
        q = self.to_q(x, train).reshape(batch, height * width, self.heads, -1)
        kv = self.to_kv(x, train)
        kv = kv.reshape(batch, -1, 2, self.heads, q.shape[3])
        y = attention.attention(q, kv[:, :, 0], kv[:, :, 1])
        return self.to_out(y).reshape(batch, height, width, dim)


class Block(nnx.Module):
    """x + attention(LN(x)), then x + feed-forward(LN(x))."""

    def __init__(self, dim: int, heads: int, v: Variant, rngs: Draws) -> None:
        self.norm1, self.attn = LayerNorm(dim, eps=EPS), Attention(dim, heads, v, rngs)
        self.norm2 = LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, 4 * dim, v.activation, rngs)

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        attn_path, mlp_path = branches(drop, 2)
        x = x + attn_path(self.attn(self.norm1(x), train))
        return x + mlp_path(self.mlp(self.norm2(x)))


class Stage(nnx.Module):
    """A convolution whose windows overlap, LN, the blocks."""

    def __init__(self, ins: int, stage: int, v: Variant, rngs: Draws) -> None:
        dim, heads = v.dims[stage], v.heads[stage]
        window, stride = (3, 2) if stage else (v.window, v.patch)
        how: dict[str, Any] = {"padding": window // 2, "torch_init": True, "rngs": rngs}
        self.embed = Conv(ins, dim, window, stride=stride, **how)
        self.norm = LayerNorm(dim, eps=EPS)
        self.blocks = nnx.List([Block(dim, heads, v, rngs) for _ in range(v.depths[stage])])

    def __call__(self, x: Array, **how: Any) -> Array:
        return run_blocks(self.blocks, self.norm(self.embed(x)), **how)


class CvT(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, variant: Variant, num_classes: int, rngs: Draws) -> None:
        v = variant
        self.normalize = Normalize(v.in_channels)
        ins = (v.in_channels, *v.dims)
        self.stages = nnx.List([Stage(ins[i], i, v, rngs) for i in range(len(v.dims))])
        self.head = Linear(ins[-1], num_classes, torch_init=True, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.normalize(images).astype(jnp.dtype(v.dtype))
        how = of_stages(v.depths, train=train, key=key, drop_path=v.drop_path, remat=v.remat)
        for stage, told in zip(self.stages, how, strict=True):
            x = stage(x, **told)
        return self.head(x.mean(axis=(1, 2)))


def create(variant: Variant, *, num_classes: int, image_size: int) -> Classifier:
    """Return the network of one row; `ValueError` where the row or the size cannot work."""
    v = variant
    check(v, "head_dim")
    common.check_stages(v, "dims", "depths", "heads")
    common.check_image_size(image_size)
    common.check(v, bn_group=0)
    if v.window < 1 or v.window % 2 == 0:
        raise ValueError(f"window={v.window} must be odd, such as 3 or 7")
    fitting = [patch for patch in range(1, v.window + 1) if image_size % patch == 0]
    if v.patch not in fitting:
        raise ValueError(
            f"patch={v.patch} must divide image_size={image_size} and be at most the window of "
            f"{v.window}; one of {', '.join(map(str, fitting))}"
        )
    return classifier(lambda rngs: CvT(v, num_classes, rngs), dtype=jnp.dtype(v.dtype))


_STAGE = r"layers\.(\d+)\."
_BLOCK = rf"{_STAGE}2\.layers\.(\d+)\."
_OURS = r"stages.\1.blocks.\2."
_PROJECT = rf"{_BLOCK}0\.(to_q|to_kv)\.net\."
# Their pattern -> our name, of the channel norms and the 1x1 convolutions.
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
TORCH_NAMES: list[Row] = [
    *conv_rows(rf"{_STAGE}0", r"stages.\1.embed"),
    *(row(rf"{a}\.g", f"{b}.scale", channels) for a, b in _NORMS.items()),
    *(row(rf"{a}\.b", f"{b}.bias", channels) for a, b in _NORMS.items()),
    *(row(rf"{a}\.weight", f"{b}.kernel", pointwise_oi) for a, b in _LINEARS.items()),
    *(row(rf"{a}\.bias", f"{b}.bias") for a, b in _LINEARS.items()),
    row(rf"{_PROJECT}0\.weight", rf"{_OURS}attn.\3.conv.kernel", conv_oihw),
    *norm_rows(rf"{_PROJECT}1", rf"{_OURS}attn.\3.norm"),
    *linear_rows(r"to_logits\.2", "head"),
    BATCH_NORM_COUNT,
]


def torch_keys(variant: Variant) -> list[str]:
    """Return the repository's names in its order."""
    keys = []
    for i, depth in enumerate(variant.depths):
        stage = f"layers.{i}"
        keys += [*affine(f"{stage}.0"), f"{stage}.1.g", f"{stage}.1.b"]
        for attn, mlp in (
            (f"{stage}.2.layers.{j}.0", f"{stage}.2.layers.{j}.1") for j in range(depth)
        ):
            keys += [f"{attn}.norm.g", f"{attn}.norm.b"]
            for net in (f"{attn}.to_q.net", f"{attn}.to_kv.net"):
                keys += [f"{net}.0.weight", *batch_norm(f"{net}.1"), f"{net}.2.weight"]
            keys += [*affine(f"{attn}.to_out.0"), f"{mlp}.net.0.g", f"{mlp}.net.0.b"]
            keys += affine(f"{mlp}.net.1", f"{mlp}.net.4")
    return keys + affine("to_logits.2")


MEMBERS = {
    "cifar_cvt": Member(
        Reference("cifar_cvt.py"),
        Paper("19.54", ""),
        counted_at=32,
        num_classes=10,
        title="CvT-13 (32 px)",
    ),
    "cifar_cvt_224": Member(
        Reference("cifar_cvt.py", {"window": 7, "patch": 4}),
        num_classes=10,
        title="CvT-13 (224 px)",
    ),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"stages\.0\.(embed|norm)\..*", head=r"head\..*")
FAMILY = Family("cifar_cvt", "CvT", VARIANTS, create, NAMES, MEMBERS, "all", any_size=True)
