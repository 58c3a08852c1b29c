"""What residual networks share: convolutions, blocks, stages, and their names."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.interface.classifier import of_stages, run_blocks
from jaxrobust.models.modules.basic import ACTIVATIONS, BatchNorm, Conv
from jaxrobust.models.modules.draws import Draws, Drop, branches, split, torch_default
from jaxrobust.types import Array

STEM = 64  # channels before the first stage


def conv(ins: int, outs: int, kernel: int, rngs: Draws, stride: int = 1, **options: Any) -> Conv:
    """Make a convolution that keeps the size, but for its stride.

    It has no bias and is drawn as PyTorch does, unless further arguments of `Conv` say otherwise.
    """
    default: dict[str, Any] = {"padding": kernel // 2, "bias": False, "init": torch_default}
    return Conv(ins, outs, kernel, stride=stride, rngs=rngs, **default | options)


class SameConv(Conv):
    """3x3 convolution without a bias, padded as in TensorFlow: of a stride below and right alone.

    So DeepMind's networks are padded; a stride in PyTorch's has a row of zeros on every side.
    """

    def __init__(self, ins: int, outs: int, rngs: Draws, stride: int = 1) -> None:
        options: dict[str, Any] = {"bias": False, "init": torch_default, "rngs": rngs}
        super().__init__(ins, outs, 3, stride=stride, padding=int(stride == 1), **options)

    def __call__(self, x: Array) -> Array:
        if self.stride > 1:
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        return super().__call__(x)


def shortcut(ins: int, outs: int, stride: int, v: Any, rngs: Draws, **options: Any) -> nnx.List:
    """Make a 1x1 convolution and batch norm where size or channels change, else nothing."""
    if stride == 1 and ins == outs:
        return nnx.List([])
    return nnx.List(
        [conv(ins, outs, 1, rngs, stride, **options), BatchNorm(outs, group=v.bn_group)]
    )


def through(shortcut: nnx.List, x: Array, train: bool) -> Array:
    """Return a map after its shortcut."""
    if not shortcut:
        return x
    conv, norm = shortcut
    return norm(conv(x), train)


class ConvNorm(nnx.Module):
    """Convolution without a bias that keeps the size but for its stride, batch norm, activation."""

    def __init__(
        self,
        ins: int,
        outs: int,
        kernel: int,
        v: Any,
        rngs: Draws,
        *,
        act: bool = True,
        **options: Any,
    ) -> None:
        self.conv = conv(ins, outs, kernel, rngs, **options)
        self.bn = BatchNorm(outs, group=v.bn_group)
        self.act = ACTIVATIONS[v.activation] if act else None

    def __call__(self, x: Array, train: bool) -> Array:
        x = self.bn(self.conv(x), train)
        return x if self.act is None else self.act(x)


class Bottleneck(nnx.Module):
    """act(x + 1x1(act(3x3(act(1x1(x)))))), each with a norm; the stride is the 3x3 one's.

    Args:
      expansion: the output's channels by those of the 3x3 convolution, which has `groups`.
      middle: makes what stands in its place, if anything, of its channels and stride.
      bias: whether a shortcut's convolution has one.
    """

    def __init__(
        self,
        ins: int,
        outs: int,
        stride: int,
        v: Any,
        rngs: Draws,
        *,
        expansion: int,
        groups: int = 1,
        middle: Callable[[int, int], Any] = lambda inner, stride: None,
        bias: bool = False,
    ) -> None:
        inner = outs // expansion
        norm = lambda channels: BatchNorm(channels, group=v.bn_group)  # noqa: E731
        self.conv1, self.bn1 = conv(ins, inner, 1, rngs), norm(inner)
        self.conv2 = middle(inner, stride) or conv(inner, inner, 3, rngs, stride, groups=groups)
        self.bn2 = norm(inner)
        self.conv3, self.bn3 = conv(inner, outs, 1, rngs), norm(outs)
        self.shortcut = shortcut(ins, outs, stride, v, rngs, bias=bias)
        self.act = ACTIVATIONS[v.activation]

    def __call__(self, x: Array, drop: Drop | None, train: bool) -> Array:
        (path,) = branches(drop, 1)
        y = self.act(self.bn1(self.conv1(x), train))
        y = self.act(self.bn2(self.conv2(y), train))
        y = self.bn3(self.conv3(y), train)
        return self.act(through(self.shortcut, x, train) + path(y))


def add_stages(net: Any, v: Any, rngs: Draws, block: Any, outs: int, ins: int = STEM) -> int:
    """Give a network its stages `layer1`, `layer2`, ..., which halve the map but for the first.

    Args:
      block: makes one of its channels before and after, its stride, the row and the draws.
      outs: channels after the first stage; they double with each.
    Returns:
      channels after the last stage.
    """
    for i, depth in enumerate(v.depths):
        sizes = [(ins, outs, 2 if i else 1)] + [(outs, outs, 1)] * (depth - 1)
        setattr(net, f"layer{i + 1}", nnx.List([block(*size, v, rngs) for size in sizes]))
        ins, outs = outs, 2 * outs
    return ins


def run_stages(net: Any, x: Array, train: bool, key: Array | None, draws: bool = False) -> Array:
    """Run the stages that `add_stages` made."""
    for i, settings in enumerate(of_stages(net.variant, train, key), 1):
        x = run_blocks(getattr(net, f"layer{i}"), x, draws=draws, **settings)
    return x


def run_stage(
    blocks: Any, x: Array, key: Array | None, rates: list[float], **settings: Any
) -> Array:
    """Run the blocks of a stage; the first one has other arrays, and is never part of a scan."""
    key, others_key = (None, None) if key is None else split(key, 2)
    x = run_blocks(blocks[:1], x, key=key, rates=rates[:1], **settings | {"scan": False})
    return (
        run_blocks(blocks[1:], x, key=others_key, rates=rates[1:], **settings)
        if len(blocks) > 1
        else x
    )


def block_names(depths: Sequence[int], stem: int, first: int) -> Iterator[tuple[str, bool]]:
    """Yield each residual block's name, and whether there is a convolution in its shortcut.

    Args:
      depths: blocks of each stage; the first one of each stage but the first has a stride.
      stem: channels before the first stage.
      first: channels behind a block of the first stage; they double with each stage.
    """
    ins = stem
    for i, depth in enumerate(depths):
        for j in range(depth):
            yield f"layer{i + 1}.{j}", ins != first << i or (i > 0 and j == 0)
            ins = first << i
