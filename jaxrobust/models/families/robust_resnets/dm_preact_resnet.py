"""DeepMind's PreActResNet-18 with SiLU: projections are 3x3 and read the block's raw input.

Strided convolutions are padded as in TensorFlow. Sources: Rebuffi et al. 2021 (arXiv 2103.01946),
and RobustBench 1.1.1's code (architectures/dm_wide_resnet.py).
"""

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families import residual
from jaxrobust.models.families.residual import SameConv
from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.classifier import of_stages
from jaxrobust.models.interface.family import BatchNormRow, Family, Member, Names, TorchVariant
from jaxrobust.models.interface.renaming import BATCH_NORM_COUNT, keys, table
from jaxrobust.models.modules.basic import ACTIVATIONS, BatchNorm, Linear, Normalize
from jaxrobust.models.modules.draws import Draws, Drop, branches, torch_default
from jaxrobust.types import Array, ModuleMaker


class Variant(BatchNormRow):
    """A row of the table: `models.create` can override every field."""

    depths: tuple[int, ...]  # blocks of each stage
    width: int = 64  # channels of the stem and the first stage; each stage doubles them
    activation: str = "silu"
    scan: bool = False  # compile one block for all of a stage except its first


VARIANTS = {"dm_preactresnet18": Variant((2, 2, 2, 2))}


class Block(nnx.Module):
    """x + 3x3(act(norm(3x3(act(norm(x)))))); with 3x3(x) for x if size or channels change."""

    def __init__(self, ins: int, outs: int, stride: int, v: Variant, rngs: Draws) -> None:
        norms = (BatchNorm(channels, group=v.bn_group) for channels in (ins, outs))
        self.batchnorm_0, self.batchnorm_1 = norms
        self.conv_2d_1, self.conv_2d_2 = (
            SameConv(ins, outs, rngs, stride),
            SameConv(outs, outs, rngs),
        )
        changes = stride > 1 or ins != outs
        self.shortcut = SameConv(ins, outs, rngs, stride) if changes else None
        self.act = ACTIVATIONS[v.activation]

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        (path,) = branches(drop, 1)
        y = self.conv_2d_1(self.act(self.batchnorm_0(x, train)))
        y = self.conv_2d_2(self.act(self.batchnorm_1(y, train)))
        return path(y) + (x if self.shortcut is None else self.shortcut(x))


class DmPreActResNet(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        self.conv_2d = SameConv(v.in_channels, v.width, rngs)
        ins = v.width
        for i, depth in enumerate(v.depths):
            outs = v.width << i
            rows = [(ins, 2 if i else 1)] + [(outs, 1)] * (depth - 1)
            blocks = [Block(a, outs, stride, v, rngs) for a, stride in rows]
            setattr(self, f"layer_{i}", nnx.List(blocks))
            ins = outs
        self.batchnorm = BatchNorm(ins, group=v.bn_group)
        self.logits = Linear(ins, num_classes, init=torch_default, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.conv_2d(self.normalize(images).astype(jnp.dtype(v.dtype)))
        for i, settings in enumerate(of_stages(v, train, key)):
            x = residual.run_stage(getattr(self, f"layer_{i}"), x, **settings)
        x = ACTIVATIONS[v.activation](self.batchnorm(x, train))
        return self.logits(x.mean(axis=(1, 2)))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Return the constructor of a row's network; `ValueError` if row or image size is invalid."""
    architecture_checks.check_stages(v, "depths")
    architecture_checks.check_row(v, width=1, in_channels=1, bn_group=0)
    architecture_checks.check_halvings(image_size, len(v.depths) - 1)
    return lambda rngs: DmPreActResNet(v, num_classes, rngs)


_BLOCK = r"layer_\d+\.\d+\."
TORCH_NAMES = table(
    BATCH_NORM_COUNT,
    convs={rf"(conv_2d|{_BLOCK}(?:conv_2d_\d|shortcut))": r"\1"},
    norms={rf"({_BLOCK}batchnorm_\d|batchnorm)": r"\1"},
    linears={"logits": "logits"},
)


def torch_keys(v: Variant) -> list[str]:
    """List the names of DeepMind's PyTorch network, in order."""
    names = keys("", "conv_2d:w")
    for i, depth in enumerate(v.depths):
        for j in range(depth):
            parts = "batchnorm_0:bn conv_2d_1:w batchnorm_1:bn conv_2d_2:w"
            names += keys(f"layer_{i}.{j}", parts + " shortcut:w" * (i > 0 and j == 0))
    return names + keys("", "batchnorm:bn logits")


MEMBERS = {
    "dm_preactresnet18": Member(
        TorchVariant("dm_preact_resnet.py", {"depths": (2, 2, 2, 2)}),
        counted_at=32,
        num_classes=10,
        title="PreActResNet-18",
    )
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"conv_2d\..*", head=r"logits\..*")
FAMILY = Family(
    "dm_preact_resnet", "PreActResNet", VARIANTS, maker, NAMES, MEMBERS, "all", any_size=True
)
