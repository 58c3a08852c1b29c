"""Isotropic ConvNeXt: one stage of ConvNeXt blocks without layer scale, at 1/16 resolution.

Sources: Liu et al. 2022 (arXiv 2201.03545), section 3.3; ConvStem: Singh, Croce, Hein 2023
(2303.01870). It is not in timm; weights have the names of Meta's code.
"""

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families import stems
from jaxrobust.models.families.convnext import Block
from jaxrobust.models.interface.classifier import of_one_stage, run_blocks
from jaxrobust.models.interface.family import (
    Family,
    Member,
    Names,
    PaperFigures,
    TorchVariant,
    VariantRow,
)
from jaxrobust.models.interface.renaming import keys, table
from jaxrobust.models.modules.basic import LayerNorm, Linear, Normalize
from jaxrobust.models.modules.draws import Draws
from jaxrobust.types import Array, ModuleMaker


class Variant(VariantRow):
    """A row of the table: `models.create` can override every field."""

    dim: int
    depth: int
    stem_widths: tuple[int, ...] = ()  # of the ConvStem's convolutions; empty: PatchStem
    stem_strides: tuple[int, ...] = (16,)  # a PatchStem's kernel is as large as its stride
    stem_kernels: tuple[int, ...] = ()  # of the ConvStem's convolutions, odd; empty: all 3
    scan: bool = False  # compile one block for all of them


class IsotropicConvNeXt(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        self.stem = nnx.List(stems.stem(v, v.dim, rngs, project=True))
        self.blocks = nnx.List([Block(v.dim, None, rngs) for _ in range(v.depth)])
        self.norm = LayerNorm(v.dim)
        self.head = Linear(v.dim, num_classes, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.normalize(images).astype(jnp.dtype(v.dtype))
        x = stems.through(self.stem, x)
        x = run_blocks(self.blocks, x, **of_one_stage(v, train, key))
        return self.head(self.norm(x.mean(axis=(1, 2))))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Return the constructor of a row's network; `ValueError` if row or image size is invalid."""
    stems.check_stem(v.stem_widths, v.stem_strides, v.stem_kernels)
    if min(v.dim, v.depth, v.in_channels) < 1:
        raise ValueError(
            f"dim={v.dim}, depth={v.depth} and in_channels={v.in_channels} must be positive"
        )
    reduction = math.prod(v.stem_strides)
    if image_size < reduction:
        raise ValueError(
            f"image_size={image_size} is smaller than the {reduction} px that become one feature; "
            "use a larger image_size or smaller stem_strides"
        )
    return lambda rngs: IsotropicConvNeXt(v, num_classes, rngs)


_PLACE = r"(blocks\.\d+)"
TORCH_NAMES = table(
    *stems.conv_stem_rows(r"stem\.stem", "stem"),
    convs={"stem": "stem.0", rf"{_PLACE}\.dwconv": r"\1.conv_dw"},
    norms={rf"{_PLACE}\.norm": r"\1.norm", "norm": "norm"},
    linears={rf"{_PLACE}\.pwconv([12])": r"\1.mlp.fc\2", "head": "head"},
)


def torch_keys(v: Variant) -> list[str]:
    """List Meta's names in order (with ConvStem, the paper's)."""
    names = keys("", "stem")
    if v.stem_widths:
        names = stems.conv_stem_keys("stem.stem", len(v.stem_widths), project=True)
    names += keys("blocks", "dwconv norm pwconv1 pwconv2", v.depth)
    return names + keys("", "norm head")


_ISO: dict[str, Any] = {"depth": 18, "dim": 384}
_CVST: dict[str, Any] = {"stem_widths": (48, 96, 192, 384), "stem_strides": (2, 2, 2, 2)}
VARIANTS = {"iso_convnext_s": Variant(**_ISO), "iso_convnext_s_cvst": Variant(**_ISO, **_CVST)}
MEMBERS = {
    "iso_convnext_s": Member(TorchVariant("iso_convnext.py", _ISO), PaperFigures("22.31", "4.29")),
    "iso_convnext_s_cvst": Member(
        TorchVariant("iso_convnext.py", _ISO | _CVST), PaperFigures("23.04", "4.67")
    ),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"stem\..*", head=r"head\..*")
FAMILY = Family(
    *("iso_convnext", "Isotropic ConvNeXt", VARIANTS, maker, NAMES, MEMBERS, "not-bias"),
    any_size=True,
)
