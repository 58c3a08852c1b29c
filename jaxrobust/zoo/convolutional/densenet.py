"""DenseNet-BC with 4 x 16 layers of growth 12 at 32 pixels, DenseNet-121 at 224.

New channels come before the old ones. Source: Huang et al. 2017 (arXiv 1608.06993).
"""

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families import residual
from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.classifier import of_stages, run_blocks
from jaxrobust.models.interface.family import BatchNormRow, Names
from jaxrobust.models.interface.renaming import keys
from jaxrobust.models.kernels import pooling
from jaxrobust.models.modules.basic import ACTIVATIONS, BatchNorm, Linear, Normalize
from jaxrobust.models.modules.draws import Draws, Drop, branches, torch_default
from jaxrobust.types import Array, ModuleMaker
from jaxrobust.zoo.shared import common


class Variant(BatchNormRow):
    """A row of the table; `drop_path` drops a layer's channels, `remat` recomputes each layer."""

    depths: tuple[int, ...] = (16, 16, 16, 16)  # layers of each stage
    growth: int = 12  # channels that each layer adds
    stem: int = 24  # channels of the first convolution
    small_stem: bool = True  # for 32 px: 3x3, stride 1; else 7x7, stride 2, norm, pooling
    activation: str = "relu"


class Layer(nnx.Module):
    """[3x3(act(norm(1x1(act(norm(x)))))), x]: new channels come first."""

    def __init__(self, ins: int, v: Variant, rngs: Draws) -> None:
        inner = 4 * v.growth
        self.bn1, self.conv1 = BatchNorm(ins, group=v.bn_group), residual.conv(ins, inner, 1, rngs)
        self.bn2 = BatchNorm(inner, group=v.bn_group)
        self.conv2 = residual.conv(inner, v.growth, 3, rngs)
        self.act = ACTIVATIONS[v.activation]

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        y = self.conv1(self.act(self.bn1(x, train)))
        y = self.conv2(self.act(self.bn2(y, train)))
        (path,) = branches(drop, 1)
        return jnp.concatenate([path(y), x], -1)


class Transition(nnx.Module):
    """Half as many channels, rounded down, then 2x2 average pooling."""

    def __init__(self, ins: int, v: Variant, rngs: Draws) -> None:
        self.bn, self.conv = BatchNorm(ins, group=v.bn_group), residual.conv(ins, ins // 2, 1, rngs)
        self.act = ACTIVATIONS[v.activation]

    def __call__(self, x: Array, train: bool) -> Array:
        return pooling.avg_pool_2x2(self.conv(self.act(self.bn(x, train))))


class DenseNet(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, rngs: Draws) -> None:
        ins = v.stem
        self.normalize = Normalize(v.in_channels)
        kernel, stride = (3, 1) if v.small_stem else (7, 2)
        self.conv1 = residual.conv(v.in_channels, ins, kernel, rngs, stride)
        if not v.small_stem:
            self.bn1 = BatchNorm(ins, group=v.bn_group)
        for i, depth in enumerate(v.depths, 1):
            stage = [Layer(ins + j * v.growth, v, rngs) for j in range(depth)]
            setattr(self, f"dense{i}", nnx.List(stage))
            ins += depth * v.growth
            if i < len(v.depths):
                setattr(self, f"trans{i}", Transition(ins, v, rngs))
                ins //= 2
        self.bn = BatchNorm(ins, group=v.bn_group)
        self.linear = Linear(ins, num_classes, init=torch_default, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v, act = self.variant, ACTIVATIONS[self.variant.activation]
        x = self.conv1(self.normalize(images).astype(jnp.dtype(v.dtype)))
        if not v.small_stem:
            x = pooling.max_pool(act(self.bn1(x, train)))
        for i, settings in enumerate(of_stages(v, train, key), 1):
            if i > 1:
                x = getattr(self, f"trans{i - 1}")(x, train)
            x = run_blocks(getattr(self, f"dense{i}"), x, **settings)
        return self.linear(act(self.bn(x, train)).mean(axis=(1, 2)))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Make the maker of a row's network; `ValueError` where the row or the size cannot work."""
    architecture_checks.check_stages(v, "depths")
    architecture_checks.check_row(v, growth=1, stem=1, in_channels=1, bn_group=0)
    architecture_checks.check_halvings(image_size, len(v.depths) - 1 + (0 if v.small_stem else 2))
    return lambda rngs: DenseNet(v, num_classes, rngs)


_LAYER = r"dense\d+\.\d+\."
TORCH_NAMES = common.rows(
    rf"((?:{_LAYER})?conv\d|trans\d+\.conv)", rf"((?:{_LAYER})?bn\d|(?:trans\d+\.)?bn)"
)


def torch_keys(v: Variant) -> list[str]:
    """List the names of kuangliu/pytorch-cifar in its order; a larger stem's norm is `bn1`."""
    names = keys("", "conv1:w" if v.small_stem else "conv1:w bn1:bn")
    for i, depth in enumerate(v.depths, 1):
        names += keys(f"dense{i}", "bn1:bn conv1:w bn2:bn conv2:w", depth)
        if i < len(v.depths):
            names += keys(f"trans{i}", "bn:bn conv:w")
    return names + keys("", "bn:bn linear")


_121 = {"depths": (6, 12, 24, 16), "growth": 32, "stem": 64, "small_stem": False}
_NETWORKS = {
    "cifar_densenet": common.Study("DenseNet-BC at 32 px", counted="1.12"),
    "cifar_densenet_224": common.Study("DenseNet-121", _121),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"(conv1|bn1)\..*", head=r"linear\..*")
FAMILY = common.family("cifar_densenet", "DenseNet", Variant, maker, NAMES, _NETWORKS)
