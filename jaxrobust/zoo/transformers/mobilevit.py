"""MobileViT-S: inverted bottlenecks, and transformers that attend across patches of 2x2 pixels.

Source: Mehta & Rastegari 2022 (arXiv 2110.02178), as in chinhsuanwu/mobilevit-pytorch (4df62dd):
batch norm and SiLU also follow the 1x1 convolutions around each transformer, and the classifier has
no bias. At 32 px the stem and the second bottleneck keep the size, so the last map is 4x4. At 224
px that code's last map would be 7x7, which 2x2 patches do not tile; in our row for ImageNette the
last bottleneck keeps the size instead.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.interface.classifier import of_stages, run_blocks
from jaxrobust.models.interface.family import BatchNormRow, Names
from jaxrobust.models.interface.renaming import BATCH_NORM_COUNT, keys, table
from jaxrobust.models.modules.basic import ACTIVATIONS, LayerNorm, Linear, Normalize
from jaxrobust.models.modules.draws import Draws, Drop, branches, torch_default
from jaxrobust.types import Array, ModuleMaker
from jaxrobust.zoo.shared import common, convolutions
from jaxrobust.zoo.shared.transformer import EPS, TokenAttention

_PATCH = 2  # side of patches; transformers attend across patches, separately for each pixel in them


class Variant(BatchNormRow):
    """A row of the table; `drop_path` and `remat` are of transformer layers."""

    channels: tuple[int, ...] = (16, 32, 64, 64, 64, 96, 128, 160)  # of the stem and bottlenecks
    strides: tuple[int, ...] = (1, 1, 1, 1, 1, 2, 2, 2)  # of the stem and bottlenecks
    dims: tuple[int, ...] = (144, 192, 240)  # of the transformers after the last bottlenecks
    depths: tuple[int, ...] = (2, 4, 3)
    ratios: tuple[int, ...] = (2, 4, 4)  # hidden units of their feed-forwards, in widths
    heads: int = 4
    head_width: int = 8
    expansion: int = 4  # of the bottlenecks, and of the channels before the classifier
    activation: str = "silu"  # everywhere


class Bottleneck(nnx.Module):
    """1x1 to more channels, depthwise 3x3, 1x1 without activation; added to x if shapes agree."""

    def __init__(self, ins: int, outs: int, stride: int, v: Variant, rngs: Draws) -> None:
        wide = v.expansion * ins
        self.expand = convolutions.ConvNorm(ins, wide, 1, v, rngs)
        self.depthwise = convolutions.ConvNorm(wide, wide, 3, v, rngs, stride=stride, groups=wide)
        self.project = convolutions.ConvNorm(wide, outs, 1, v, rngs, act=False)
        self.adds = stride == 1 and ins == outs

    def __call__(self, x: Array, train: bool) -> Array:
        y = self.project(self.depthwise(self.expand(x, train), train), train)
        return x + y if self.adds else y


class Layer(nnx.Module):
    """x + attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, dim: int, hidden: int, v: Variant, rngs: Draws) -> None:
        settings: dict[str, Any] = {"init": torch_default, "rngs": rngs}
        self.norm1, self.norm2 = LayerNorm(dim, eps=EPS), LayerNorm(dim, eps=EPS)
        self.attn = TokenAttention(dim, v.heads, v.head_width, rngs)
        self.fc1, self.fc2 = Linear(dim, hidden, **settings), Linear(hidden, dim, **settings)
        self.act = ACTIVATIONS[v.activation]

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        path1, path2 = branches(drop, 2)
        x = x + path1(self.attn(self.norm1(x)))
        return x + path2(self.fc2(self.act(self.fc1(self.norm2(x)))))


class Transformer(nnx.Module):
    """3x3 and 1x1 convolution, layers over the patches, 1x1 back; then 3x3, concatenated with x."""

    def __init__(self, channels: int, stage: int, v: Variant, rngs: Draws) -> None:
        dim = v.dims[stage]
        self.conv1 = convolutions.ConvNorm(channels, channels, 3, v, rngs)
        self.conv2 = convolutions.ConvNorm(channels, dim, 1, v, rngs)
        hidden, depth = v.ratios[stage] * dim, v.depths[stage]
        self.layers = nnx.List([Layer(dim, hidden, v, rngs) for _ in range(depth)])
        self.conv3 = convolutions.ConvNorm(dim, channels, 1, v, rngs)
        self.conv4 = convolutions.ConvNorm(2 * channels, channels, 3, v, rngs)

    def __call__(self, x: Array, settings: dict) -> Array:
        train = settings["train"]
        y = self.conv2(self.conv1(x, train), train)
        y = merged(run_blocks(self.layers, patches(y), **settings), y.shape)
        y = self.conv3(y, train)
        return self.conv4(jnp.concatenate([y, x], axis=3), train)


def patches(x: Array) -> Array:
    """Return f[B,H,W,D] as f[B,4,N,D]: each of the 4 pixels in a 2x2 patch, for all patches."""
    batch, height, width, dim = x.shape
    shape = (batch, height // _PATCH, _PATCH, width // _PATCH, _PATCH, dim)
    return x.reshape(shape).transpose(0, 2, 4, 1, 3, 5).reshape(batch, _PATCH**2, -1, dim)


def merged(x: Array, shape: tuple[int, ...]) -> Array:
    """Reassemble the map of `shape` from `patches`."""
    batch, height, width, dim = shape
    x = x.reshape(batch, _PATCH, _PATCH, height // _PATCH, width // _PATCH, dim)
    return x.transpose(0, 3, 1, 4, 2, 5).reshape(shape)


class MobileViT(nnx.Module):
    """f[B,H,W,C] images in [0, 1] -> f[B,num_classes] logits."""

    def __init__(self, v: Variant, num_classes: int, rngs: Draws) -> None:
        self.normalize = Normalize(v.in_channels)
        first, *others = zip(v.channels, v.strides, strict=True)
        self.conv1 = convolutions.ConvNorm(v.in_channels, first[0], 3, v, rngs, stride=first[1])
        ins, mv2 = first[0], []
        for outs, stride in others:
            mv2.append(Bottleneck(ins, outs, stride, v, rngs))
            ins = outs
        self.mv2 = nnx.List(mv2)
        behind = v.channels[-len(v.dims) :]
        self.mvit = nnx.List([Transformer(c, i, v, rngs) for i, c in enumerate(behind)])
        self.conv2 = convolutions.ConvNorm(ins, v.expansion * ins, 1, v, rngs)
        wide = v.expansion * ins
        self.fc = Linear(wide, num_classes, bias=False, init=torch_default, rngs=rngs)
        self.variant = v

    def __call__(self, images: Array, train: bool = False, key: Array | None = None) -> Array:
        v = self.variant
        x = self.conv1(self.normalize(images).astype(jnp.dtype(v.dtype)), train)
        plain = len(self.mv2) - len(self.mvit)
        for bottleneck in self.mv2[:plain]:
            x = bottleneck(x, train)
        stages = zip(self.mv2[plain:], self.mvit, of_stages(v, train, key), strict=True)
        for bottleneck, transformer, settings in stages:
            x = transformer(bottleneck(x, train), settings)
        return self.fc(self.conv2(x, train).mean(axis=(1, 2)))


def maker(v: Variant, *, num_classes: int, image_size: int) -> ModuleMaker:
    """Make the maker of a row's network; `ValueError` where the row or the size cannot work."""
    architecture_checks.check_tuples(v, "channels", "strides", "dims", "depths", "ratios")
    for names in (("channels", "strides"), ("dims", "depths", "ratios")):
        if len({len(getattr(v, name)) for name in names}) > 1:
            rows = ", ".join(f"{name}={getattr(v, name)}" for name in names)
            raise ValueError(f"{rows} must have the same length")
    if len(v.channels) <= len(v.dims):
        raise ValueError(f"channels={v.channels} needs more entries than dims={v.dims}")
    architecture_checks.check_row(v, heads=1, head_width=1, expansion=1, in_channels=1, bn_group=0)
    _check_maps(v, image_size)
    return lambda rngs: MobileViT(v, num_classes, rngs)


def _check_maps(v: Variant, image_size: int) -> None:
    side, plain = image_size, len(v.strides) - len(v.dims)
    step = _PATCH
    for stride in v.strides:
        step *= stride
    for i, stride in enumerate(v.strides):
        side = -(-side // stride)
        if i >= plain and (side < _PATCH or side % _PATCH):
            raise ValueError(
                f"image_size={image_size}: transformer {i - plain + 1} of {len(v.dims)} has a map "
                f"of {side}x{side}, which does not divide into patches of {_PATCH}x{_PATCH}; use "
                f"an image_size that is a multiple of {step}, or smaller strides"
            )


_LAYER = r"(mvit\.\d+)\.transformer\.layers\.(\d+)\."
_PAIR = r"(conv\d|mvit\.\d+\.conv\d)\."
_INNER = {"expand": (0, 1), "depthwise": (3, 4), "project": (6, 7)}  # their indices in PyTorch's
_CONVS = {rf"(mv2\.\d+)\.conv\.{at}": rf"\1.{part}.conv" for part, (at, _) in _INNER.items()}
_NORMS = {rf"(mv2\.\d+)\.conv\.{at}": rf"\1.{part}.bn" for part, (_, at) in _INNER.items()}
TORCH_NAMES = table(
    BATCH_NORM_COUNT,
    convs=_CONVS | {f"{_PAIR}0": r"\1.conv"},
    norms={
        **_NORMS,
        f"{_PAIR}1": r"\1.bn",
        rf"{_LAYER}0\.norm": r"\1.layers.\2.norm1",
        rf"{_LAYER}1\.norm": r"\1.layers.\2.norm2",
    },
    linears={
        rf"{_LAYER}0\.fn\.to_qkv": r"\1.layers.\2.attn.qkv",
        rf"{_LAYER}0\.fn\.to_out\.0": r"\1.layers.\2.attn.proj",
        rf"{_LAYER}1\.fn\.net\.0": r"\1.layers.\2.fc1",
        rf"{_LAYER}1\.fn\.net\.3": r"\1.layers.\2.fc2",
        "fc": "fc",
    },
)


def torch_keys(v: Variant) -> list[str]:
    """List the names of chinhsuanwu's code, in its order."""
    names = keys("conv1", "0:w 1:bn")
    bottleneck = "conv.0:w conv.1:bn conv.3:w conv.4:bn conv.6:w conv.7:bn"
    names += keys("mv2", bottleneck, len(v.channels) - 1)
    layer = "0.norm 0.fn.to_qkv:w 0.fn.to_out.0 1.norm 1.fn.net.0 1.fn.net.3"
    for i, depth in enumerate(v.depths):
        names += keys(f"mvit.{i}", "conv1.0:w conv1.1:bn conv2.0:w conv2.1:bn")
        names += keys(f"mvit.{i}.transformer.layers", layer, depth)
        names += keys(f"mvit.{i}", "conv3.0:w conv3.1:bn conv4.0:w conv4.1:bn")
    return names + keys("", "conv2.0:w conv2.1:bn fc:w")


_NETWORKS = {
    "cifar_mobilevit": common.Study("MobileViT-S at 32 px", counted="5.00"),
    "cifar_mobilevit_224": common.Study("MobileViT-S", {"strides": (2, 1, 2, 1, 1, 2, 2, 1)}),
}
NAMES = Names(TORCH_NAMES, torch_keys, stem=r"conv1\..*", head=r"fc\..*")
FAMILY = common.family("cifar_mobilevit", "MobileViT", Variant, maker, NAMES, _NETWORKS)
