"""BoTNet-50: a ResNet-50 with attention instead of convolutions in the last stage.

Source: Srinivas et al. 2021 (arXiv 2101.11605), as in leaderj1001/BottleneckTransformers (142e965):
logits are not scaled, and the products of queries and positions are transposed.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.families import residual
from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.family import BatchNormRow, Names
from jaxrobust.models.interface.renaming import BATCH_NORM_COUNT, keys, row, table
from jaxrobust.models.kernels import attention, pooling
from jaxrobust.models.kernels.layers import dropout
from jaxrobust.models.kernels.primitives import spread, widened
from jaxrobust.models.modules.basic import ACTIVATIONS, BatchNorm, Linear, Normalize
from jaxrobust.models.modules.draws import Draws, split, torch_default
from jaxrobust.types import Array, ModuleMaker
from jaxrobust.zoo.shared import common
from jaxrobust.zoo.shared.convolutions import Bottleneck


class Variant(BatchNormRow):
    """A row of the table: `models.create` can override every field."""

    depths: tuple[int, ...] = (3, 4, 6, 3)  # of the stages; the last one has attention
    width: int = 64  # inner channels of the first stage's blocks; they double with each stage
    heads: int = 4
    small_stem: bool = True  # for 32 px: 3x3, stride 1, no pooling; else 7x7, stride 2, pooling
    activation: str = "relu"  # everywhere, also after the residual
    dropout: float = 0.3  # of the classifier's input


class Attention(nnx.Module):
    """Attention of each pixel of f[B,S,S,D] to all: softmax over j of q_i.k_j + r_i.q_j.

    r is the sum of a row's and a column's embedding; logits are not divided by the root of the
    width. With `halves`, 2x2 average pooling follows.
    """

    def __init__(self, dim: int, heads: int, side: int, rngs: Draws, halves: bool = False) -> None:
        normal, place = jax.nn.initializers.normal(1.0), (1, heads, dim // heads)
        self.rel_h = nnx.Param(normal(rngs.params(), (*place, 1, side)))
        self.rel_w = nnx.Param(normal(rngs.params(), (*place, side, 1)))
        maps = (residual.conv(dim, dim, 1, rngs, bias=True) for _ in range(3))
        self.query, self.key, self.value = maps
        self.heads, self.halves = heads, halves

    def __call__(self, x: Array) -> Array:
        side = self.rel_h.shape[-1]
        if x.shape[1:3] != (side, side):
            raise ValueError(
                f"the map is {x.shape[1]}x{x.shape[2]}, but this network has positions for "
                f"{side}x{side}; create it, and convert its weights, with the images' image_size"
            )
        tokens = x.shape[0], side * side, self.heads, x.shape[3] // self.heads
        q, k, v = (part(x).reshape(tokens) for part in (self.query, self.key, self.value))
        columns, rows = widened(self.rel_h[...], self.rel_w[...])
        positions = (columns + rows).reshape(*tokens[2:], side * side).transpose(2, 0, 1)
        r = spread(positions.astype(x.dtype), tokens)
        q, k = jnp.concatenate([q, r], -1), jnp.concatenate([k, q], -1)
        y = attention.attention(q, k, v, scale=1.0).reshape(x.shape)
        return pooling.avg_pool_2x2(y) if self.halves else y


class BoTNet(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, image_size: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        kernel, stride = (3, 1) if v.small_stem else (7, 2)
        self.conv1 = residual.conv(v.in_channels, residual.STEM, kernel, rngs, stride)
        self.bn1 = BatchNorm(residual.STEM, group=v.bn_group)
        last = len(v.depths) - 1
        side = image_size // (1 if v.small_stem else 4) >> last  # of the last stage's map

        def middle(inner: int, stride: int) -> nnx.Module:
            if inner != v.width << last:
                return residual.conv(inner, inner, 3, rngs, stride)
            return Attention(inner, v.heads, side * stride, rngs, halves=stride > 1)

        block = functools.partial(Bottleneck, middle=middle)
        ins = residual.add_stages(self, v, rngs, block, 4 * v.width)
        self.fc = Linear(ins, num_classes, init=torch_default, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.normalize(images).astype(jnp.dtype(v.dtype))
        x = ACTIVATIONS[v.activation](self.bn1(self.conv1(x), train))
        x = x if v.small_stem else pooling.max_pool(x)
        key, last = (None, None) if key is None else split(key, 2)
        x = residual.run_stages(self, x, train, key, draws=v.dropout > 0)
        return self.fc(dropout(x.mean(axis=(1, 2)), last if train else None, v.dropout))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Make the maker of a row's network; `ValueError` where the row or the size cannot work."""
    if len(v.depths) < 2 or min(v.depths) < 1:
        raise ValueError(f"depths={v.depths!r} must be two or more positive integers")
    architecture_checks.check_row(v, width=1, heads=1, in_channels=1, bn_group=0)
    if (dim := v.width << (len(v.depths) - 1)) % v.heads:
        raise ValueError(f"heads={v.heads} must divide the {dim} channels of the last stage")
    step = (1 if v.small_stem else 4) << (len(v.depths) - 1)
    if image_size < step or image_size % step:
        raise ValueError(
            f"image_size={image_size} cannot be halved at every stage; use a multiple of {step}"
        )
    return lambda rngs: BoTNet(v, num_classes, image_size, rngs)


_BLOCK = r"(layer\d\.\d+)"
TORCH_NAMES = table(
    row(
        rf"{_BLOCK}\.conv2(?:\.0)?\.(rel_[hw])",
        r"\1.conv2.\2",
        resize=common.refusing("positions"),
    ),
    BATCH_NORM_COUNT,
    convs={
        r"((?:layer\d\.\d+\.)?conv\d)": r"\1",
        rf"{_BLOCK}\.shortcut\.0": r"\1.shortcut.0",
        rf"{_BLOCK}\.conv2\.0\.(query|key|value)": r"\1.conv2.\2",
    },
    norms={r"((?:layer\d\.\d+\.)?bn\d)": r"\1", rf"{_BLOCK}\.shortcut\.1": r"\1.shortcut.1"},
    linears={r"fc\.1": "fc"},
)


def torch_keys(v: Variant) -> list[str]:
    """List the names of leaderj1001's code, in its order."""
    names = keys("", "conv1:w bn1:bn")
    attends = "conv2.0.rel_h: conv2.0.rel_w: conv2.0.query conv2.0.key conv2.0.value"
    for block, projects in residual.block_names(v.depths, residual.STEM, 4 * v.width):
        conv2 = attends if block.startswith(f"layer{len(v.depths)}.") else "conv2:w"
        parts = f"conv1:w bn1:bn {conv2} bn2:bn conv3:w bn3:bn"
        names += keys(block, parts + " shortcut.0 shortcut.1:bn" * projects)
    return names + keys("", "fc.1")


_NETWORKS = {
    "cifar_botnet50": common.Study("BoTNet-50 at 32 px", counted="18.82"),
    "cifar_botnet50_224": common.Study("BoTNet-50", {"small_stem": False}),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"(conv1|bn1)\..*", head=r"fc\..*")
FAMILY = common.family("cifar_botnet", "BoTNet", Variant, maker, NAMES, _NETWORKS, any_size=False)
