"""ConvNeXt with the original PatchStem or the ConvStem of robust training.

Sources: Liu et al. 2022 (arXiv 2201.03545); stems: Singh, Croce, Hein 2023 (arXiv 2303.01870).
"""

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families import stems
from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.classifier import of_stages, run_blocks
from jaxrobust.models.interface.family import (
    Family,
    Member,
    Names,
    PaperFigures,
    TorchVariant,
    VariantRow,
)
from jaxrobust.models.interface.renaming import Naming, keys, row, table
from jaxrobust.models.kernels.convnext_layers import (
    BlockParameters,
    HalvingParameters,
    convnext_block,
    norm_halving,
)
from jaxrobust.models.modules.basic import Conv, DepthwiseConv, LayerNorm, Linear, Mlp, Normalize
from jaxrobust.models.modules.draws import Draws, Drop, branches
from jaxrobust.types import Array, ModuleMaker


class Variant(VariantRow):
    """A row of the table: `models.create` can override every field."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    stem_widths: tuple[int, ...] = ()  # of the ConvStem's convolutions; empty: PatchStem
    stem_strides: tuple[int, ...] = (4,)  # a PatchStem's kernel is as large as its stride
    downsample_strides: tuple[int, ...] = ()  # of the 2x2 convolutions between stages; empty: 2
    gamma_init: float = 1e-6
    stem_kernels: tuple[int, ...] = ()  # of the ConvStem's convolutions, odd; empty: all 3
    scan: bool = False  # compile one block per stage for all of its blocks


_S, _B, _L = (3, 3, 27, 3), (128, 256, 512, 1024), (192, 384, 768, 1536)
_T = (96, 192, 384, 768)
VARIANTS = {
    "convnext_t": Variant((3, 3, 9, 3), _T),
    "convnext_t_cvst": Variant((3, 3, 9, 3), _T, (48, 96), (2, 2)),
    "convnext_s": Variant(_S, _T),
    "convnext_s_cvst": Variant(_S, _T, (48, 96), (2, 2)),
    "convnext_b": Variant(_S, _B),
    "convnext_b_cvst": Variant(_S, _B, (64, 96, 128), (2, 2, 1)),
    "convnext_l": Variant(_S, _L),
    "convnext_l_cvst": Variant(_S, _L, (96, 144, 192), (2, 2, 1)),
    # Ours, for 8 to 64 px: a stem with half the reduction, three stages, and a layer scale that
    # lets a network learn in minutes without pre-training.
    "convnext_n": Variant((2, 2, 2), (64, 128, 256), (), (2,), gamma_init=0.1),
    "convnext_n_cvst": Variant((2, 2, 2), (64, 128, 256), (32, 64), (2, 1), gamma_init=0.1),
}


class Block(nnx.Module):
    """x + drop(gamma * MLP(LN(depthwise 7x7(x)))), one kernel on TPUs; None: no gamma."""

    def __init__(self, dim: int, gamma_init: float | None, rngs: Draws) -> None:
        self.conv_dw = DepthwiseConv(dim, 7, rngs=rngs)
        self.norm = LayerNorm(dim)
        self.mlp = Mlp(dim, rngs)
        gamma = None if gamma_init is None else jnp.full(dim, gamma_init, jnp.float32)
        self.gamma = None if gamma is None else nnx.Param(gamma)

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        conv, norm, fc1, fc2 = self.conv_dw, self.norm, self.mlp.fc1, self.mlp.fc2
        parameters = BlockParameters(
            *(conv.kernel[...], conv.bias[...], norm.scale[...], norm.bias[...]),
            *(fc1.kernel[...], fc1.bias[...], fc2.kernel[...], fc2.bias[...]),
            gamma=None if self.gamma is None else self.gamma[...],
        )
        path = None if drop is None else branches(drop, 1)[0]
        return convnext_block(x, parameters, path, eps=norm.eps)


class Stage(nnx.Module):
    """LN and 2x2 convolution (except in the first stage), then the blocks."""

    def __init__(
        self, ins: int, dim: int, depth: int, stride: int, gamma_init: float, rngs: Draws
    ) -> None:
        down: list[Any] = []
        if ins:
            down = [LayerNorm(ins), Conv(ins, dim, 2, stride=stride, rngs=rngs)]
        self.downsample = nnx.List(down)
        self.blocks = nnx.List([Block(dim, gamma_init, rngs) for _ in range(depth)])

    def __call__(self, x: Array, **settings: Any) -> Array:
        if self.downsample:
            norm, conv = self.downsample
            affine = norm.scale[...], norm.bias[...]
            parameters = HalvingParameters(*affine, conv.kernel[...], conv.bias[...])
            x = norm_halving(x, parameters, stride=conv.stride, eps=norm.eps)
        return run_blocks(self.blocks, x, **settings)


class Head(nnx.Module):
    """LN of the pooled features, then the classifier."""

    def __init__(self, dim: int, num_classes: int, rngs: Draws) -> None:
        self.norm = LayerNorm(dim)
        self.fc = Linear(dim, num_classes, rngs=rngs)

    def __call__(self, pooled: Array) -> Array:
        return self.fc(self.norm(pooled))


class ConvNeXt(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        stem = stems.stem(v, v.dims[0], rngs)
        self.stem = nnx.List(stem if v.stem_widths else [*stem, LayerNorm(v.dims[0])])
        rows = zip((0, *v.dims[:-1]), v.dims, v.depths, (0, *v.downsample_strides), strict=True)
        self.stages = nnx.List([Stage(*row, v.gamma_init, rngs) for row in rows])
        self.head = Head(v.dims[-1], num_classes, rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.normalize(images).astype(jnp.dtype(v.dtype))
        x = stems.through(self.stem, x)
        for stage, settings in zip(self.stages, of_stages(v, train, key), strict=True):
            x = stage(x, **settings)
        return self.head(x.mean(axis=(1, 2)))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Return the constructor of a row's network; `ValueError` if row or image size is invalid."""
    stems.check_stem(v.stem_widths, v.stem_strides, v.stem_kernels)
    architecture_checks.check_tuples(v, "depths", "dims", "downsample_strides", empty=True)
    v = v._replace(downsample_strides=v.downsample_strides or (2,) * (len(v.dims) - 1))
    if not v.dims or v.in_channels < 1:
        raise ValueError(f"dims={v.dims} and in_channels={v.in_channels} must not be empty or 0")
    if len(v.depths) != len(v.dims):
        raise ValueError(f"depths={v.depths} and dims={v.dims} must have the same length")
    if len(v.downsample_strides) != len(v.dims) - 1:
        raise ValueError(
            f"downsample_strides={v.downsample_strides} needs one entry for each pair of adjacent "
            f"dims={v.dims}"
        )
    if v.stem_widths and v.stem_widths[-1] != v.dims[0]:
        raise ValueError(f"the last of stem_widths={v.stem_widths} must be dims[0]={v.dims[0]}")
    reduction = math.prod((*v.stem_strides, *v.downsample_strides))
    if image_size < reduction:
        raise ValueError(
            f"image_size={image_size} is smaller than the {reduction} px that become one feature; "
            "use a larger image_size, smaller stem_strides, or convnext_n"
        )
    return lambda rngs: ConvNeXt(v, num_classes, rngs)


_PLACE = r"(stages\.\d+\.blocks\.\d+)\."
TORCH_NAMES = table(
    # The ConvStem is a Sequential `stem` inside an attribute `stem`.
    *stems.conv_stem_rows(r"(?:stem\.)?stem", "stem"),
    row(_PLACE + "gamma", r"\1.gamma"),
    convs={
        r"stages\.(\d)\.downsample\.1": r"stages.\1.downsample.1",
        _PLACE + "conv_dw": r"\1.conv_dw",
    },
    norms={
        r"stages\.(\d)\.downsample\.0": r"stages.\1.downsample.0",
        _PLACE + "norm": r"\1.norm",
        r"head\.norm": "head.norm",
    },
    linears={_PLACE + r"mlp\.fc([12])": r"\1.mlp.fc\2", r"head\.fc": "head.fc"},
)

_BLOCK = r"stages\.(\d)\.(\d+)\."
_HERE = r"stages.\1.blocks.\2."
OTHER_NAMES = [
    Naming(
        "Meta's ConvNeXt",
        r"downsample_layers\.\d\.\d\.weight",
        table(
            *stems.conv_stem_rows(r"downsample_layers\.0", "stem"),
            row(_BLOCK + "gamma", _HERE + "gamma"),
            convs={
                r"downsample_layers\.([123])\.1": r"stages.\1.downsample.1",
                _BLOCK + "dwconv": _HERE + "conv_dw",
            },
            norms={
                r"downsample_layers\.([123])\.0": r"stages.\1.downsample.0",
                _BLOCK + "norm": _HERE + "norm",
                "norm": "head.norm",
            },
            linears={_BLOCK + "pwconv([12])": _HERE + r"mlp.fc\3", "head": "head.fc"},
        ),
    )
]


def torch_keys(v: Variant) -> list[str]:
    """List the reference's names in order (timm 1.0.9; with ConvStem, the paper's files)."""
    names = keys("stem", "0 1")
    if v.stem_widths:
        names = stems.conv_stem_keys("stem.stem", len(v.stem_widths))
    for i, depth in enumerate(v.depths):
        names += keys(f"stages.{i}.downsample", "0 1" if i else "")
        names += keys(f"stages.{i}.blocks", "gamma: conv_dw norm mlp.fc1 mlp.fc2", depth)
    return names + keys("head", "norm fc")


_N: dict[str, Any] = {"depths": (2, 2, 2), "dims": (64, 128, 256), "gamma_init": 0.1}
MEMBERS = {
    "convnext_t": Member(TorchVariant("convnext_tiny"), PaperFigures("28.59", "4.47")),
    "convnext_t_cvst": Member(TorchVariant("convnext_tiny"), PaperFigures("28.63", "4.60")),
    "convnext_s": Member(
        TorchVariant("convnext_small"), PaperFigures("50.10", "8.70", misprint=True)
    ),
    "convnext_s_cvst": Member(
        TorchVariant("convnext_small"), PaperFigures("50.33", "8.79", misprint=True)
    ),
    "convnext_b": Member(TorchVariant("convnext_base"), PaperFigures("88.59", "15.38")),
    "convnext_b_cvst": Member(TorchVariant("convnext_base"), PaperFigures("88.75", "15.97")),
    "convnext_l": Member(TorchVariant("convnext_large")),
    "convnext_l_cvst": Member(TorchVariant("convnext_large")),
    "convnext_n": Member(TorchVariant("convnext.py", _N | {"stem_strides": (2,)}), counted_at=32),
    "convnext_n_cvst": Member(
        TorchVariant("convnext.py", _N | {"stem_widths": (32, 64), "stem_strides": (2, 1)}),
        counted_at=32,
    ),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"stem\..*", head=r"head\.fc\..*", others=OTHER_NAMES)
FAMILY = Family("convnext", "ConvNeXt", VARIANTS, maker, NAMES, MEMBERS, "not-bias", any_size=True)
