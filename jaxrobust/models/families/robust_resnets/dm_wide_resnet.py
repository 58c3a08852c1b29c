"""DeepMind's wide residual networks; RaWideResNets add wider stems and squeeze-and-excitation.

Strided convolutions are padded as in TensorFlow, and all activations are SiLU (Swish). Sources:
Gowal et al. 2020 (arXiv 2010.03593), Peng et al. 2023 (arXiv 2308.16258), and RobustBench 1.1.1's
code (architectures/dm_wide_resnet.py, robustarch_wide_resnet.py).
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families import residual
from jaxrobust.models.families.residual import SameConv
from jaxrobust.models.families.robust_resnets.robust_blocks import Squeeze
from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.classifier import of_stages
from jaxrobust.models.interface.family import BatchNormRow, Family, Member, Names, TorchVariant
from jaxrobust.models.interface.renaming import BATCH_NORM_COUNT, keys, pointwise_oi, row, table
from jaxrobust.models.modules.basic import ACTIVATIONS, BatchNorm, Linear, Normalize
from jaxrobust.models.modules.draws import Draws, Drop, branches, torch_default
from jaxrobust.types import Array, ModuleMaker


class Variant(BatchNormRow):
    """A row of the table: `models.create` can override every field."""

    depths: tuple[int, ...]  # blocks of each stage
    channels: tuple[int, ...]  # of each stage
    stem: int = 16  # channels
    activation: str = "silu"
    # Hidden units of squeeze-and-excitation per channel; 0: no squeeze-and-excitation.
    se_ratio: float = 0.0
    bn_momentum: float = 0.1  # of the running statistics, torch's
    scan: bool = False  # compile one block for all of a stage except its first


def _wide(depth: int, width: int) -> Variant:
    return Variant(((depth - 4) // 6,) * 3, tuple((16 << i) * width for i in range(3)))


_SIZES = ((28, 10), (34, 10), (34, 20), (70, 16), (82, 8), (94, 16), (106, 16))
VARIANTS = {f"dm_wrn_{depth}_{width}": _wide(depth, width) for depth, width in _SIZES}
VARIANTS["ra_wrn_70_16"] = Variant(
    *((30, 31, 10), (216, 432, 864)), stem=96, se_ratio=0.25, bn_momentum=0.01
)


def hidden(channels: int, ratio: float) -> int:
    """Count the hidden units of squeeze-and-excitation; 0: none."""
    return round(ratio * channels)


class Block(nnx.Module):
    """x + 3x3(act(norm(3x3(act(norm(x)))))); with 1x1(act(norm(x))) for x if channels change."""

    def __init__(self, ins: int, outs: int, stride: int, v: Variant, rngs: Draws) -> None:
        norm: dict[str, Any] = {"group": v.bn_group, "momentum": v.bn_momentum}
        self.batchnorm_0, self.conv_0 = BatchNorm(ins, **norm), SameConv(ins, outs, rngs, stride)
        self.batchnorm_1, self.conv_1 = BatchNorm(outs, **norm), SameConv(outs, outs, rngs)
        changes = ins != outs
        self.shortcut = residual.conv(ins, outs, 1, rngs, stride) if changes else None
        self.se = Squeeze(outs, hidden(outs, v.se_ratio), rngs, bias=True) if v.se_ratio else None
        self.act = ACTIVATIONS[v.activation]

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        (path,) = branches(drop, 1)
        activated = self.act(self.batchnorm_0(x, train))
        y = self.conv_1(self.act(self.batchnorm_1(self.conv_0(activated), train)))
        y = path(y if self.se is None else self.se(y))
        return y + (x if self.shortcut is None else self.shortcut(activated))


class Stage(nnx.Module):
    """The blocks between two reductions of the map."""

    def __init__(self, blocks: list[Block]) -> None:
        self.block = nnx.List(blocks)


class DmWideResNet(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        self.init_conv = SameConv(v.in_channels, v.stem, rngs)
        ins, stages = v.stem, []
        for i, (depth, outs) in enumerate(zip(v.depths, v.channels, strict=True)):
            rows = [(ins, 2 if i else 1)] + [(outs, 1)] * (depth - 1)
            stages.append(Stage([Block(a, outs, stride, v, rngs) for a, stride in rows]))
            ins = outs
        self.layer = nnx.List(stages)
        self.batchnorm = BatchNorm(ins, group=v.bn_group, momentum=v.bn_momentum)
        self.logits = Linear(ins, num_classes, init=torch_default, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.init_conv(self.normalize(images).astype(jnp.dtype(v.dtype)))
        for stage, settings in zip(self.layer, of_stages(v, train, key), strict=True):
            x = residual.run_stage(stage.block, x, **settings)
        x = ACTIVATIONS[v.activation](self.batchnorm(x, train))
        return self.logits(x.mean(axis=(1, 2)))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Return the constructor of a row's network; `ValueError` if row or image size is invalid."""
    architecture_checks.check_stages(v, "depths", "channels")
    architecture_checks.check_row(v, stem=1, in_channels=1, bn_group=0, se_ratio=0)
    if not 0 < v.bn_momentum <= 1:
        raise ValueError(f"bn_momentum={v.bn_momentum} must be above 0 and at most 1")
    for ins, outs in zip(v.channels, v.channels[1:], strict=False):
        if ins == outs:
            raise ValueError(
                f"channels={v.channels}: a stage that halves the map needs a projection, which "
                "these networks only have where the channels change; give adjacent stages "
                "different channels"
            )
    if v.se_ratio and (least := min(v.channels)) and not hidden(least, v.se_ratio):
        raise ValueError(
            f"se_ratio={v.se_ratio} leaves {least} channels without a hidden unit; use at least "
            f"{1 / least:.3g}"
        )
    multiple = 1 << (len(v.depths) - 1)
    if image_size % multiple:
        near = max(multiple, image_size // multiple * multiple)
        raise ValueError(
            f"image_size={image_size}: the map must halve evenly {len(v.depths) - 1} times, so use "
            f"{near} or {near + multiple}"
        )
    return lambda rngs: DmWideResNet(v, num_classes, rngs)


_BLOCK = r"layer\.\d+\.block\.\d+\."
TORCH_NAMES = table(
    row(rf"({_BLOCK}se\.fc[12])\.weight", r"\1.kernel", pointwise_oi),
    row(rf"({_BLOCK}se\.fc[12])\.bias", r"\1.bias"),
    BATCH_NORM_COUNT,
    convs={rf"(init_conv|{_BLOCK}(?:conv_\d|shortcut))": r"\1"},
    norms={rf"({_BLOCK}batchnorm_\d|batchnorm)": r"\1"},
    linears={"logits": "logits"},
)


def torch_keys(v: Variant) -> list[str]:
    """List the names of DeepMind's PyTorch network, in order."""
    names, ins = keys("", "init_conv:w"), v.stem
    for i, (depth, outs) in enumerate(zip(v.depths, v.channels, strict=True)):
        for j in range(depth):
            parts = "batchnorm_0:bn conv_0:w batchnorm_1:bn conv_1:w" + " shortcut:w" * (
                ins != outs
            )
            parts += " se.fc1 se.fc2" * bool(v.se_ratio)
            names += keys(f"layer.{i}.block.{j}", parts)
            ins = outs
    return names + keys("", "batchnorm:bn logits")


def _member(name: str, v: Variant) -> Member:
    plain = Variant((), ())._asdict()
    free = ("bn_momentum",)
    fields = {k: x for k, x in v._asdict().items() if x != plain[k] and k not in free}
    kind, _, size = name.partition("_wrn_")
    title = f"{'Ra' * (kind == 'ra')}WideResNet-{size.replace('_', '-')}"
    reference = TorchVariant("dm_wide_resnet.py", fields)
    return Member(reference, counted_at=32, num_classes=10, title=title)


MEMBERS = {name: _member(name, v) for name, v in VARIANTS.items()}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"init_conv\..*", head=r"logits\..*")
FAMILY = Family(
    "dm_wide_resnet", "WideResNet", VARIANTS, maker, NAMES, MEMBERS, "all", any_size=True
)
