"""ResNet, wide ResNet and ResNet with GELU; batch statistics are explicit `stats`.

Sources: He et al. 2016 (arXiv 1512.03385); Zagoruyko & Komodakis 2016 (arXiv 1605.07146); GELU:
Bai et al. 2021 (arXiv 2111.05464); `cifar_resnet50` is the ResNet of Tang et al. 2022 (arXiv
2209.14105). Compared with torchvision 0.28.0 too.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrobust.models.families import residual
from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.family import (
    BatchNormRow,
    Family,
    Member,
    Names,
    PaperFigures,
    TorchVariant,
)
from jaxrobust.models.interface.renaming import BATCH_NORM_COUNT, Naming, drop, keys, row, table
from jaxrobust.models.kernels import layers, pooling
from jaxrobust.models.modules.basic import BatchNorm, Linear, Normalize
from jaxrobust.models.modules.draws import Draws, Drop, branches, fan_out, torch_default
from jaxrobust.types import Array, ModuleMaker

ACTIVATIONS = {"relu": layers.relu, "gelu": layers.gelu}


class Variant(BatchNormRow):
    """A row of the table: `models.create` can override every field."""

    depths: tuple[int, ...]
    bottleneck: bool = True  # blocks of 1x1, 3x3 and 1x1 convolutions; otherwise two 3x3
    width: int = 64  # inner channels of the first stage's blocks; each stage doubles them
    base: int = 64  # channels of the stem; the first stage returns as many, with bottlenecks 4x
    activation: str = "relu"  # everywhere, also after the residual
    small_stem: bool = False  # for 32 px: 3x3, stride 1, no pooling; else 7x7, stride 2, pooling


_50 = (3, 4, 6, 3)
VARIANTS = {
    "resnet18": Variant((2, 2, 2, 2), bottleneck=False),
    "resnet50": Variant(_50),
    "resnet50_gelu": Variant(_50, activation="gelu"),
    "wide_resnet50_2": Variant(_50, width=128),
    "cifar_resnet50": Variant(_50, small_stem=True),
    "resnet18_32px": Variant((2, 2, 2, 2), bottleneck=False, small_stem=True),
}

_conv = functools.partial(residual.conv, init=fan_out)


class Basic(nnx.Module):
    """act(x + 3x3(act(3x3(x)))); the first 3x3 has the stride."""

    def __init__(self, ins: int, outs: int, stride: int, v: Variant, rngs: Draws) -> None:
        group, self.act = v.bn_group, ACTIVATIONS[v.activation]
        self.conv1, self.bn1 = _conv(ins, outs, 3, rngs, stride), BatchNorm(outs, group=group)
        self.conv2, self.bn2 = _conv(outs, outs, 3, rngs), BatchNorm(outs, group=group)
        self.downsample = residual.shortcut(ins, outs, stride, v, rngs, init=fan_out)

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        (path,) = branches(drop, 1)
        y = self.act(self.bn1(self.conv1(x), train))
        y = self.bn2(self.conv2(y), train)
        return self.act(residual.through(self.downsample, x, train) + path(y))


class Bottleneck(nnx.Module):
    """act(x + 1x1(act(3x3(act(1x1(x)))))); the 3x3 has the stride."""

    def __init__(self, ins: int, outs: int, stride: int, v: Variant, rngs: Draws) -> None:
        group, self.act = v.bn_group, ACTIVATIONS[v.activation]
        width = outs * v.width // (4 * v.base)
        self.conv1, self.bn1 = _conv(ins, width, 1, rngs), BatchNorm(width, group=group)
        self.conv2, self.bn2 = _conv(width, width, 3, rngs, stride), BatchNorm(width, group=group)
        self.conv3, self.bn3 = _conv(width, outs, 1, rngs), BatchNorm(outs, group=group)
        self.downsample = residual.shortcut(ins, outs, stride, v, rngs, init=fan_out)

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        (path,) = branches(drop, 1)
        y = self.act(self.bn1(self.conv1(x), train))
        y = self.act(self.bn2(self.conv2(y), train))
        y = self.bn3(self.conv3(y), train)
        return self.act(residual.through(self.downsample, x, train) + path(y))


class ResNet(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        kernel, stride = (3, 1) if v.small_stem else (7, 2)
        self.conv1 = _conv(v.in_channels, v.base, kernel, rngs, stride)
        self.bn1 = BatchNorm(v.base, group=v.bn_group)
        block = Bottleneck if v.bottleneck else Basic
        ins = residual.add_stages(self, v, rngs, block, _first(v), v.base)
        self.fc = Linear(ins, num_classes, init=torch_default, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.normalize(images).astype(jnp.dtype(v.dtype))
        x = ACTIVATIONS[v.activation](self.bn1(self.conv1(x), train))
        x = x if v.small_stem else pooling.max_pool(x)
        return self.fc(residual.run_stages(self, x, train, key).mean(axis=(1, 2)))


def _first(v: Variant) -> int:
    return (4 if v.bottleneck else 1) * v.base


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Return the constructor of a row's network; `ValueError` if row or image size is invalid."""
    architecture_checks.check_tuples(v, "depths")
    if v.activation not in ACTIVATIONS:
        raise ValueError(
            f"activation={v.activation!r} is unknown; choose one of {list(ACTIVATIONS)}"
        )
    architecture_checks.check_least(v, width=1, base=1, in_channels=1, bn_group=0)
    if not v.bottleneck and v.width != v.base:
        raise ValueError(f"width={v.width}: blocks of two 3x3 convolutions need width={v.base}")
    return lambda rngs: ResNet(v, num_classes, rngs)


_CONV = r"((?:layer\d\.\d+\.)?(?:conv\d|downsample\.0))"
_NORM = r"((?:layer\d\.\d+\.)?(?:bn\d|downsample\.1))"
_SHARED = table(BATCH_NORM_COUNT, convs={_CONV: r"\1"}, linears={"fc": "fc"})
TORCH_NAMES = table(*_SHARED, norms={_NORM: r"\1"})


def _first_half(array: np.ndarray) -> np.ndarray:
    """Return the statistics of the first of two virtual groups, which evaluation uses.


    Raises:
      ValueError: the array does not hold two groups.
    """
    if array.ndim != 1 or len(array) % 2:
        raise ValueError(f"shape {array.shape} does not match the statistics of two groups")
    return array[: len(array) // 2]


OTHER_NAMES = [
    Naming(
        "Bai et al. 2021, GELU with eight-way batch norm",
        r".*\.aff\.bnconv\.weight",
        [
            *_SHARED,
            row(_NORM + r"\.aff\.bnconv\.weight", r"\1.scale", np.ravel),
            row(_NORM + r"\.aff\.bnconv\.bias", r"\1.bias"),
            row(_NORM + r"\.bn0\.proxy_bn\.running_(mean|var)", r"\1.\2", _first_half),
            drop(
                _NORM + r"\.bn[1-7]\.proxy_bn\.running_(mean|var)",
                "only the first of the eight batch norms is active by default",
            ),
        ],
        normalize=(0.5, 0.5),
        # Other activations have the same names and shapes.
        fits=lambda variant: variant.activation == "gelu",
        of="resnet50_gelu",
    ),
    Naming(
        "kuangliu/pytorch-cifar",
        r"linear\.weight",
        table(
            BATCH_NORM_COUNT,
            convs={
                r"((?:layer\d\.\d+\.)?conv\d)": r"\1",
                r"(layer\d\.\d+\.)shortcut\.0": r"\1downsample.0",
            },
            norms={
                r"((?:layer\d\.\d+\.)?bn\d)": r"\1",
                r"(layer\d\.\d+\.)shortcut\.1": r"\1downsample.1",
            },
            linears={"linear": "fc"},
        ),
    ),
]


def torch_keys(v: Variant) -> list[str]:
    """List the reference's names in order (timm 1.0.9, torchvision 0.28.0)."""
    names = keys("", "conv1:w bn1:bn")
    block = "conv1:w bn1:bn conv2:w bn2:bn" + " conv3:w bn3:bn" * v.bottleneck
    for name, projects in residual.block_names(v.depths, v.base, _first(v)):
        names += keys(name, block + " downsample.0:w downsample.1:bn" * projects)
    return names + keys("", "fc")


def options_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the options that follow from array shapes, a map from our name to a shape."""
    blocks = [match.groups() for key in shapes if (match := _BLOCK.fullmatch(key))]
    stages = sorted({stage for stage, _ in blocks})
    if not stages or shapes.get("conv1.kernel") is None:
        return {}
    base, bottleneck = shapes["conv1.kernel"][-1], "layer1.0.conv3.kernel" in shapes
    options = {"depths": tuple(len({b for s, b in blocks if s == stage}) for stage in stages)}
    return options | {
        "bottleneck": bottleneck,
        "width": shapes["layer1.0.conv1.kernel"][-1] if bottleneck else base,
        "base": base,
        "small_stem": shapes["conv1.kernel"][0] == 3,
    }


_BLOCK = re.compile(r"layer(\d+)\.(\d+)\.conv1\.kernel")
MEMBERS = {
    "resnet18": Member(TorchVariant("resnet18"), title="ResNet-18"),
    "resnet50": Member(TorchVariant("resnet50"), PaperFigures(None, "4.11"), title="ResNet-50"),
    "resnet50_gelu": Member(
        TorchVariant("resnet50", {"act_layer": "gelu"}), title="ResNet-50 with GELU"
    ),
    "wide_resnet50_2": Member(
        TorchVariant("wide_resnet50_2"), PaperFigures(None, "11.47"), title="WideResNet-50-2"
    ),
    "cifar_resnet50": Member(
        TorchVariant("resnet.py", {"depths": _50, "small_stem": True}),
        paper=PaperFigures("23.52", ""),
        counted_at=32,
        num_classes=10,
        title="ResNet-50 at 32 px",
        decay_mask="all",
    ),
    "resnet18_32px": Member(
        TorchVariant(
            "resnet.py", {"depths": (2, 2, 2, 2), "bottleneck": False, "small_stem": True}
        ),
        counted_at=32,
        num_classes=10,
        title="ResNet-18 at 32 px",
        decay_mask="all",
    ),
}
NAMES = Names(
    *(TORCH_NAMES, torch_keys, r"(conv1|bn1)\..*", r"fc\..*"),
    others=OTHER_NAMES,
    options=options_of,
)
FAMILY = Family("resnet", "ResNet", VARIANTS, maker, NAMES, MEMBERS, "not-bias", any_size=True)
