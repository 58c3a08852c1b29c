"""ConvNeXt with the PatchStem of the original and the ConvStem of robust training.

Sources: Liu et al. 2022 (arXiv 2201.03545); stems: Singh, Croce, Hein 2023 (arXiv 2303.01870).
Parity: tests/test_convnext.py against timm 1.0.9 and the seeded-weight golden logits.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models import layers
from jaxrobust.models.classifier import classifier
from jaxrobust.models.modules import Conv, DepthwiseConv, Gelu, LayerNorm, Linear, Normalize
from jaxrobust.names import Row, conv_oihw, linear_oi, row
from jaxrobust.types import Classifier


class Variant(NamedTuple):
    """One row of the table: every field can be overridden in `models.create`."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    stem_widths: tuple[int, ...] = ()  # of the ConvStem's 3x3 convolutions; empty: PatchStem
    stem_strides: tuple[int, ...] = (4,)  # a PatchStem's kernel is as large as its stride
    gamma_init: float = 1e-6
    in_channels: int = 3
    remat: bool = False  # recompute each block in the backward pass instead of storing it
    dtype: str = "float32"  # compute type; parameters stay float32


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
    # Ours, for 8 to 64 px: half the reduction of the stem, three stages, and a layer scale that
    # lets a network without pre-training learn in minutes.
    "convnext_n": Variant((2, 2, 2), (64, 128, 256), (), (2,), gamma_init=0.1),
    "convnext_n_cvst": Variant((2, 2, 2), (64, 128, 256), (32, 64), (2, 1), gamma_init=0.1),
}


class Block(nnx.Module):
    """x + gamma * MLP(LN(depthwise 7x7(x)))."""

    def __init__(self, dim, gamma_init, rngs):
        self.conv_dw = DepthwiseConv(dim, 7, rngs=rngs)
        self.norm = LayerNorm(dim)
        self.mlp = Mlp(dim, rngs)
        self.gamma = nnx.Param(jnp.full(dim, gamma_init, jnp.float32))

    def __call__(self, x):
        return self.mlp.add(x, self.norm(self.conv_dw(x)), self.gamma[...])


class Mlp(nnx.Module):
    """Linear to four times the width, exact GELU, linear back."""

    def __init__(self, dim, rngs):
        self.fc1 = Linear(dim, 4 * dim, rngs=rngs)
        self.fc2 = Linear(4 * dim, dim, rngs=rngs)

    def add(self, x, y, gamma):
        """x + gamma * mlp(y); each bias goes with what follows it, which saves a pass."""
        hidden = layers.gelu(layers.linear(y, self.fc1.kernel[...]), self.fc1.bias[...])
        out = layers.linear(hidden, self.fc2.kernel[...])
        return layers.scaled_residual(x, out, self.fc2.bias[...], gamma)


class Stage(nnx.Module):
    """LN and 2x2 stride-2 convolution (but for the first stage), then the blocks."""

    def __init__(self, ins, dim, depth, variant, rngs):
        down = [LayerNorm(ins), Conv(ins, dim, 2, stride=2, rngs=rngs)] if ins else []
        self.downsample = nnx.List(down)
        self.blocks = nnx.List([Block(dim, variant.gamma_init, rngs) for _ in range(depth)])
        self.remat = variant.remat

    def __call__(self, x):
        for layer in self.downsample:
            x = layer(x)
        for block in self.blocks:
            x = nnx.remat(Block.__call__)(block, x) if self.remat else block(x)
        return x


class Head(nnx.Module):
    """LN of the pooled features, then the classifier."""

    def __init__(self, dim, num_classes, rngs):
        self.norm = LayerNorm(dim)
        self.fc = Linear(dim, num_classes, rngs=rngs)

    def __call__(self, pooled):
        return self.fc(self.norm(pooled))


class ConvNeXt(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, variant: Variant, num_classes: int, rngs: nnx.Rngs):
        self.normalize = Normalize(variant.in_channels)
        self.stem = nnx.List(_stem(variant, rngs))
        ins = (0, *variant.dims)
        self.stages = nnx.List(
            [
                Stage(i, dim, depth, variant, rngs)
                for i, dim, depth in zip(ins, variant.dims, variant.depths, strict=False)
            ]
        )
        self.head = Head(variant.dims[-1], num_classes, rngs)
        self.dtype = jnp.dtype(variant.dtype)

    def __call__(self, images):
        x = self.normalize(images).astype(self.dtype)
        for layer in (*self.stem, *self.stages):
            x = layer(x)
        return self.head(x.mean(axis=(1, 2)))


def _stem(variant: Variant, rngs) -> list[nnx.Module]:
    if not variant.stem_widths:
        (stride,), dim = variant.stem_strides, variant.dims[0]
        return [
            Conv(variant.in_channels, dim, stride, stride=stride, rngs=rngs),
            LayerNorm(dim),
        ]
    ins = (variant.in_channels, *variant.stem_widths)
    stem: list[nnx.Module] = []
    for i, out, stride in zip(ins, variant.stem_widths, variant.stem_strides, strict=False):
        conv = Conv(i, out, 3, stride=stride, padding=1, torch_init=True, rngs=rngs)
        stem += [conv, LayerNorm(out), Gelu()]
    return stem


def create(variant: Variant, *, num_classes: int, image_size: int) -> Classifier:
    """The network of one row; `ValueError` where the row or the size cannot work."""
    v = variant
    for name in ("depths", "dims", "stem_widths", "stem_strides"):
        values = getattr(v, name)
        if not (isinstance(values, tuple | list) and all(n >= 1 for n in values)):
            raise ValueError(f"{name}={values!r} must be a tuple of positive integers")
    if not v.dims or v.in_channels < 1:
        raise ValueError(f"dims={v.dims} and in_channels={v.in_channels} must not be empty or 0")
    if len(v.depths) != len(v.dims):
        raise ValueError(f"depths={v.depths} and dims={v.dims} must have the same length")
    if len(v.stem_strides) != max(1, len(v.stem_widths)):
        raise ValueError(
            f"stem_strides={v.stem_strides} needs {max(1, len(v.stem_widths))} entries: one for "
            "each ConvStem convolution, or one for a PatchStem"
        )
    if v.stem_widths and v.stem_widths[-1] != v.dims[0]:
        raise ValueError(f"the last of stem_widths={v.stem_widths} must be dims[0]={v.dims[0]}")
    reduction = 2 ** (len(v.dims) - 1)
    for stride in v.stem_strides:
        reduction *= stride
    if image_size < reduction:
        raise ValueError(
            f"image_size={image_size} is smaller than the {reduction} px that become one feature; "
            "use a larger image_size, smaller stem_strides, or convnext_n"
        )
    return classifier(lambda rngs: ConvNeXt(v, num_classes, rngs), dtype=jnp.dtype(v.dtype))


_PLACE = r"(stages\.\d+\.blocks\.\d+)"
TORCH_NAMES: list[Row] = [
    # The ConvStem is an attribute `stem` that holds a Sequential called `stem`.
    row(r"(?:stem\.)?stem\.([036])\.weight", r"stem.\1.kernel", conv_oihw),
    row(r"(?:stem\.)?stem\.([147])\.weight", r"stem.\1.scale"),
    row(r"(?:stem\.)?stem\.(\d)\.bias", r"stem.\1.bias"),
    row(r"stages\.(\d)\.downsample\.0\.weight", r"stages.\1.downsample.0.scale"),
    row(r"stages\.(\d)\.downsample\.1\.weight", r"stages.\1.downsample.1.kernel", conv_oihw),
    row(r"stages\.(\d)\.downsample\.([01])\.bias", r"stages.\1.downsample.\2.bias"),
    row(_PLACE + r"\.gamma", r"\1.gamma"),
    row(_PLACE + r"\.conv_dw\.weight", r"\1.conv_dw.kernel", conv_oihw),
    row(_PLACE + r"\.norm\.weight", r"\1.norm.scale"),
    row(_PLACE + r"\.mlp\.fc([12])\.weight", r"\1.mlp.fc\2.kernel", linear_oi),
    row(_PLACE + r"\.(conv_dw|norm|mlp\.fc[12])\.bias", r"\1.\2.bias"),
    row(r"head\.norm\.weight", "head.norm.scale"),
    row(r"head\.fc\.weight", "head.fc.kernel", linear_oi),
    row(r"head\.(norm|fc)\.bias", r"head.\1.bias"),
]
