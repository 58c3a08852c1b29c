"""InternImage: blocks like ConvNeXt's whose convolutions choose their sampling points.

Sources: Wang et al. 2022 (arXiv 2211.05778) and OpenGVLab/InternImage, size T; with a PatchStem:
Singh, Croce, Hein 2023 (arXiv 2303.01870), appendix C.3.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxrobust.models.families import stems
from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.classifier import of_stages, run_blocks
from jaxrobust.models.interface.family import BatchNormRow, Family, Member, Names, TorchVariant
from jaxrobust.models.interface.renaming import BATCH_NORM_COUNT, keys, pointwise_oi, row, table
from jaxrobust.models.kernels import layers
from jaxrobust.models.kernels.deformable.operator import deformable
from jaxrobust.models.kernels.deformable.places import POINTS
from jaxrobust.models.kernels.primitives import widened
from jaxrobust.models.modules.basic import (
    BatchNorm,
    Conv,
    DepthwiseConv,
    LayerNorm,
    Linear,
    Mlp,
    Normalize,
    residual,
)
from jaxrobust.models.modules.draws import Draws, Drop, branches, torch_default
from jaxrobust.types import Array, ModuleMaker


class Variant(BatchNormRow):
    """A row of the table: `models.create` can override every field."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    groups: tuple[int, ...]  # groups of channels that share offsets, in each stage
    stem_widths: tuple[int, ...] = (32, 64)  # of the ConvStem's convolutions; empty: PatchStem
    stem_strides: tuple[int, ...] = (2, 2)  # a PatchStem's kernel is as large as its stride
    head_dim: int = 768  # channels of the pooled features
    offset_scale: float = 1.0  # of the grid of nine points and their offsets
    gamma_init: float | None = None  # of the layer scale; None: no layer scale
    stem_kernels: tuple[int, ...] = ()  # of the ConvStem's convolutions, odd; empty: all 3
    scan: bool = False  # compile one block per stage for all of its blocks


_T = Variant((4, 4, 18, 4), (64, 128, 256, 512), (4, 8, 16, 32))
VARIANTS = {"internimage_t": _T, "internimage_t_ps": _T._replace(stem_widths=(), stem_strides=(4,))}
_KEEPING = jax.checkpoint_policies.save_only_these_names("value")
_xavier = jax.nn.initializers.xavier_uniform()


def _zeros(key: Array, shape: tuple[int, ...]) -> Array:
    return jnp.zeros(shape)


class DeformableConv(nnx.Module):
    """DCNv3: a depthwise convolution of the input predicts nine offsets and weights."""

    def __init__(self, dim: int, groups: int, scale: float, rngs: Draws) -> None:
        self.dw_conv = DepthwiseConv(dim, 3, init=torch_default, rngs=rngs)
        self.dw_norm = LayerNorm(dim)
        self.offset = Linear(dim, 2 * POINTS * groups, init=_zeros, rngs=rngs)
        self.mask = Linear(dim, POINTS * groups, init=_zeros, rngs=rngs)
        self.input_proj = Linear(dim, dim, init=_xavier, rngs=rngs)
        self.output_proj = Linear(dim, dim, init=_xavier, rngs=rngs)
        self.groups, self.scale = groups, scale

    def __call__(self, x: Array) -> Array:
        # Values are stored. What offsets and weights need, a third of a block's residuals, is
        # recomputed at a seventh of its products.
        return self.output_proj(jax.checkpoint(self.sampled, policy=_KEEPING)(x))

    def sampled(self, x: Array) -> Array:
        """Sum the values at nine places, moved and weighted by the input f[B,H,W,C]."""
        value = checkpoint_name(self.input_proj(x), "value")
        around = layers.gelu(self.dw_norm(self.dw_conv(x)))
        (mask,) = widened(self.mask(around))
        shares = jax.nn.softmax(mask.reshape(*x.shape[:3], self.groups, POINTS))
        return deformable(
            *(value, self.offset(around), shares.reshape(mask.shape)),
            groups=self.groups,
            offset_scale=self.scale,
        )


class Block(nnx.Module):
    """x + DCNv3(LN(x)), then x + MLP(LN(x)), each times gamma if there is one."""

    def __init__(self, v: Variant, stage: int, rngs: Draws) -> None:
        dim = v.dims[stage]
        scales = [None if v.gamma_init is None else _gamma(dim, v.gamma_init) for _ in range(2)]
        self.gamma1, self.gamma2 = scales
        self.norm1 = LayerNorm(dim)
        self.dcn = DeformableConv(dim, v.groups[stage], v.offset_scale, rngs)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, rngs)

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        first, second = branches(drop, 2)
        x = residual(x, self.norm1, lambda y: first(_scaled(self.dcn(y), self.gamma1)))
        return residual(x, self.norm2, lambda y: second(_scaled(self.mlp(y), self.gamma2)))


def _gamma(dim: int, value: float) -> nnx.Param:
    return nnx.Param(jnp.full(dim, value, jnp.float32))


def _scaled(y: Array, gamma: nnx.Param | None) -> Array:
    return y if gamma is None else layers.scale(y, gamma[...])


class Stage(nnx.Module):
    """Blocks and a LN; then, except in the last, a 3x3 convolution of stride 2 and another LN."""

    def __init__(self, v: Variant, stage: int, rngs: Draws) -> None:
        self.blocks = nnx.List([Block(v, stage, rngs) for _ in range(v.depths[stage])])
        self.norm = LayerNorm(v.dims[stage])
        down: list[Any] = []
        if stage + 1 < len(v.dims):
            ins, outs = v.dims[stage : stage + 2]
            options: dict[str, Any] = {"stride": 2, "padding": 1, "init": torch_default}
            down = [Conv(ins, outs, 3, bias=False, rngs=rngs, **options), LayerNorm(outs)]
        self.downsample = nnx.List(down)

    def __call__(self, x: Array, **settings: Any) -> Array:
        x = self.norm(run_blocks(self.blocks, x, **settings))
        for layer in self.downsample:
            x = layer(x)
        return x


class Features(nnx.Module):
    """A linear map of each pixel, batch norm and GELU."""

    def __init__(self, v: Variant, rngs: Draws) -> None:
        self.linear = Linear(v.dims[-1], v.head_dim, bias=False, init=torch_default, rngs=rngs)
        self.norm = BatchNorm(v.head_dim, group=v.bn_group)

    def __call__(self, x: Array, train: bool) -> Array:
        return layers.gelu(self.norm(self.linear(x), train))


class InternImage(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        stem = stems.stem(v, v.dims[0], rngs, init=torch_default)
        # No GELU follows the last convolution of the ConvStem.
        self.stem = nnx.List(stem[:-1] if v.stem_widths else [*stem, LayerNorm(v.dims[0])])
        self.stages = nnx.List([Stage(v, i, rngs) for i in range(len(v.dims))])
        self.features = Features(v, rngs)
        self.head = Linear(v.head_dim, num_classes, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.normalize(images).astype(jnp.dtype(v.dtype))
        x = stems.through(self.stem, x)
        for stage, settings in zip(self.stages, of_stages(v, train, key), strict=True):
            x = stage(x, **settings)
        return self.head(self.features(x, train).mean(axis=(1, 2)))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Return the constructor of a row's network; `ValueError` if row or image size is invalid."""
    stems.check_stem(v.stem_widths, v.stem_strides, v.stem_kernels)
    architecture_checks.check_stages(v, "dims", "depths", "groups")
    architecture_checks.check_least(v, head_dim=1, in_channels=1, bn_group=0)
    for dim, groups in zip(v.dims, v.groups, strict=True):
        if dim % groups:
            raise ValueError(
                f"groups={v.groups} must divide dims={v.dims}: {dim} channels cannot form {groups} "
                "groups of equal size"
            )
    if v.offset_scale <= 0:
        raise ValueError(f"offset_scale={v.offset_scale} must be above 0; InternImage-T uses 1.0")
    if v.stem_widths and v.stem_widths[-1] != v.dims[0]:
        raise ValueError(f"the last of stem_widths={v.stem_widths} must be dims[0]={v.dims[0]}")
    reduction = math.prod(v.stem_strides) * 2 ** (len(v.dims) - 1)
    if image_size < reduction:
        raise ValueError(
            f"image_size={image_size} is smaller than the {reduction} px that become one feature; "
            "use a larger image_size, smaller stem_strides, or fewer stages"
        )
    return lambda rngs: InternImage(v, num_classes, rngs)


_BLOCK, _HERE = r"levels\.(\d)\.blocks\.(\d+)\.", r"stages.\1.blocks.\2."
_CONVS = range(1, 6)  # layers of a ConvStem, numbered 0, 1, 3, 4, ... here
TORCH_NAMES = table(
    row(_BLOCK + "gamma([12])", _HERE + r"gamma\3"),
    row(r"conv_head\.0\.weight", "features.linear.kernel", pointwise_oi),
    BATCH_NORM_COUNT,
    convs={rf"patch_embed\.conv{n}": f"stem.{3 * n - 3}" for n in _CONVS}
    | {
        r"patch_embed\.0": "stem.0",
        _BLOCK + r"dcn\.dw_conv\.0": _HERE + "dcn.dw_conv",
        r"levels\.(\d)\.downsample\.conv": r"stages.\1.downsample.0",
    },
    norms={rf"patch_embed\.norm{n}\.1": f"stem.{3 * n - 2}" for n in _CONVS}
    | {
        r"patch_embed\.1\.1": "stem.1",
        _BLOCK + r"norm([12])\.0": _HERE + r"norm\3",
        _BLOCK + r"dcn\.dw_conv\.1\.1": _HERE + "dcn.dw_norm",
        r"levels\.(\d)\.norm\.0": r"stages.\1.norm",
        r"levels\.(\d)\.downsample\.norm\.1": r"stages.\1.downsample.1",
        r"conv_head\.1\.0": "features.norm",
    },
    linears={
        _BLOCK + r"dcn\.(offset|mask|input_proj|output_proj)": _HERE + r"dcn.\3",
        _BLOCK + r"mlp\.(fc[12])": _HERE + r"mlp.\3",
        "head": "head",
    },
)


def torch_keys(v: Variant) -> list[str]:
    """List the authors' names in order (OpenGVLab/InternImage); a PatchStem has our names."""
    convs = range(1, len(v.stem_widths) + 1)
    names = keys("patch_embed", " ".join(f"conv{n} norm{n}.1" for n in convs) or "0 1.1")
    gammas = "" if v.gamma_init is None else "gamma1: gamma2: "
    dcn = "dw_conv.0 dw_conv.1.1 offset mask input_proj output_proj"
    block = f"{gammas}norm1.0 {' '.join(f'dcn.{name}' for name in dcn.split())} norm2.0"
    for i, depth in enumerate(v.depths):
        names += keys(f"levels.{i}.blocks", f"{block} mlp.fc1 mlp.fc2", depth)
        down = "downsample.conv:w downsample.norm.1" if i + 1 < len(v.depths) else ""
        names += keys(f"levels.{i}", f"norm.0 {down}")
    return [*names, *keys("", "conv_head.0:w conv_head.1.0:bn head")]


_ROW: dict[str, Any] = {"depths": _T.depths, "dims": _T.dims, "groups": _T.groups}
_PATCHES = {"stem_widths": (), "stem_strides": (4,)}
MEMBERS = {
    "internimage_t": Member(TorchVariant("internimage.py", _ROW), title="InternImage-T"),
    "internimage_t_ps": Member(
        TorchVariant("internimage.py", _ROW | _PATCHES), title="InternImage-T + PatchStem"
    ),
}


def options(shapes: Any) -> dict[str, Any]:
    """Return the options that distinguish the sizes, read from array shapes, for messages."""
    stages = range(sum(f"stages.{i}.norm.scale" in shapes for i in range(9)))
    return {
        "dims": tuple(shapes[f"stages.{i}.norm.scale"][0] for i in stages),
        "depths": tuple(
            sum(
                name.startswith(f"stages.{i}.blocks.")
                for name in shapes
                if name.endswith("norm1.scale")
            )
            for i in stages
        ),
    }


NAMES = Names(TORCH_NAMES, torch_keys, stem=r"stem\..*", head=r"head\..*", options=options)
FAMILY = Family(
    *("internimage", "InternImage", VARIANTS, maker, NAMES, MEMBERS, "not-bias"), any_size=True
)
