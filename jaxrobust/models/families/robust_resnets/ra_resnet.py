"""RaWideResNet-101-2 for ImageNet: bottlenecks with squeeze-and-excitation, two groups, SiLU.

The first 1x1 convolution of a block has no norm, and every stage halves the map. Sources: Peng et
al. 2023 (arXiv 2308.16258), and RobustBench 1.1.1's code (architectures/robustarch_wide_resnet.py).
"""

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families import residual
from jaxrobust.models.families.robust_resnets.robust_blocks import Squeeze
from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.classifier import of_stages
from jaxrobust.models.interface.family import BatchNormRow, Family, Member, Names, TorchVariant
from jaxrobust.models.interface.renaming import BATCH_NORM_COUNT, keys, pointwise_oi, row, table
from jaxrobust.models.kernels import layers
from jaxrobust.models.modules.basic import ACTIVATIONS, BatchNorm, Linear, Normalize
from jaxrobust.models.modules.draws import Draws, Drop, branches, fan_out, torch_default
from jaxrobust.types import Array, ModuleMaker

REDUCTION = 4  # ratio of a block's channels to its inner channels and to its squeeze's hidden units


class Variant(BatchNormRow):
    """A row of the table: `models.create` can override every field."""

    depths: tuple[int, ...]  # blocks of each stage
    channels: tuple[int, ...]  # of each stage
    groups: int = 2  # of the 3x3 convolutions
    stem: int = 96  # channels
    activation: str = "silu"  # of the blocks; the stem uses ReLU
    scan: bool = False  # compile one block for all of a stage except its first


VARIANTS = {"ra_wrn_101_2": Variant((7, 11, 18, 1), (512, 1024, 2016, 4032))}


class Block(nnx.Module):
    """act(x + 1x1(squeeze(act(3x3(act(1x1(x))))))), with a norm after each but the first."""

    def __init__(self, ins: int, outs: int, stride: int, v: Variant, rngs: Draws) -> None:
        inner = outs // REDUCTION
        self.conv1 = residual.conv(ins, inner, 1, rngs, init=fan_out)
        settings = {"groups": v.groups, "init": fan_out}
        self.conv2 = residual.conv(inner, inner, 3, rngs, stride, **settings)
        self.bn2 = BatchNorm(inner, group=v.bn_group)
        # The hidden units depend on the block's input channels, not on the squeezed ones.
        self.se = Squeeze(inner, ins // REDUCTION, rngs, bias=True)
        self.conv3 = residual.conv(inner, outs, 1, rngs, init=fan_out)
        self.bn3 = BatchNorm(outs, group=v.bn_group)
        self.shortcut = residual.shortcut(ins, outs, stride, v, rngs, init=fan_out)
        self.act = ACTIVATIONS[v.activation]

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        (path,) = branches(drop, 1)
        y = self.act(self.conv1(x))
        y = self.se(self.act(self.bn2(self.conv2(y), train)))
        y = self.bn3(self.conv3(y), train)
        return self.act(residual.through(self.shortcut, x, train) + path(y))


class RaWideResNet(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        self.conv1 = residual.conv(v.in_channels, v.stem, 7, rngs, 2, init=fan_out)
        self.bn1 = BatchNorm(v.stem, group=v.bn_group)
        ins = v.stem
        for i, (depth, outs) in enumerate(zip(v.depths, v.channels, strict=True), 1):
            rows = [(ins, 2)] + [(outs, 1)] * (depth - 1)
            blocks = [Block(a, outs, stride, v, rngs) for a, stride in rows]
            setattr(self, f"layer{i}", nnx.List(blocks))
            ins = outs
        self.fc = Linear(ins, num_classes, init=torch_default, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.conv1(self.normalize(images).astype(jnp.dtype(v.dtype)))
        x = layers.relu(self.bn1(x, train))
        for i, settings in enumerate(of_stages(v, train, key), 1):
            x = residual.run_stage(getattr(self, f"layer{i}"), x, **settings)
        return self.fc(x.mean(axis=(1, 2)))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Return the constructor of a row's network; `ValueError` if row or image size is invalid."""
    architecture_checks.check_stages(v, "depths", "channels")
    architecture_checks.check_row(v, groups=1, stem=REDUCTION, in_channels=1, bn_group=0)
    unit = REDUCTION * v.groups
    if wrong := [outs for outs in v.channels if outs % unit]:
        raise ValueError(
            f"channels={v.channels}: a quarter of them is divided into {v.groups} groups, so use "
            f"multiples of {unit} instead of {wrong[0]}"
        )
    return lambda rngs: RaWideResNet(v, num_classes, rngs)


_BLOCK = r"stages\.stage(\d+)\.stage\d+-block(\d+)\."
_OURS = r"layer\1.\2."
TORCH_NAMES = table(
    row(rf"{_BLOCK}F\.se\.(fc[12])\.weight", rf"{_OURS}se.\3.kernel", pointwise_oi),
    row(rf"{_BLOCK}F\.se\.(fc[12])\.bias", rf"{_OURS}se.\3.bias"),
    BATCH_NORM_COUNT,
    convs={
        r"stem\.stem\.stem\.0": "conv1",
        **{rf"{_BLOCK}F\.{part}\.0": f"{_OURS}conv{i}" for i, part in enumerate("abc", 1)},
        rf"{_BLOCK}proj\.0": f"{_OURS}shortcut.0",
    },
    norms={
        r"stem\.stem\.stem\.1": "bn1",
        **{rf"{_BLOCK}F\.{part}\.1": f"{_OURS}bn{i}" for i, part in enumerate("bc", 2)},
        rf"{_BLOCK}proj\.1": f"{_OURS}shortcut.1",
    },
    linears={"fc": "fc"},
)


def torch_keys(v: Variant) -> list[str]:
    """List the names of the authors' network, in order."""
    names = keys("stem.stem.stem", "0:w 1:bn")
    for i, depth in enumerate(v.depths, 1):
        for j in range(depth):
            branch = "F.a.0:w F.b.0:w F.b.1:bn F.se.fc1 F.se.fc2 F.c.0:w F.c.1:bn"
            parts = "proj.0:w proj.1:bn " * (j == 0) + branch
            names += keys(f"stages.stage{i}.stage{i}-block{j}", parts)
    return names + keys("", "fc")


MEMBERS = {
    name: Member(
        TorchVariant("ra_resnet.py", {"depths": v.depths, "channels": v.channels}),
        title="RaWideResNet-101-2",
    )
    for name, v in VARIANTS.items()
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"(conv1|bn1)\..*", head=r"fc\..*")
FAMILY = Family("ra_resnet", "RaWideResNet", VARIANTS, maker, NAMES, MEMBERS, "all", any_size=True)
