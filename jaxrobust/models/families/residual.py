"""Parts of residual networks: convolutions, blocks, stages, and their names."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.interface.classifier import of_stages, run_blocks
from jaxrobust.models.modules.basic import BatchNorm, Conv
from jaxrobust.models.modules.draws import Draws, split, torch_default
from jaxrobust.types import Array

STEM = 64  # channels before the first stage


def conv(ins: int, outs: int, kernel: int, rngs: Draws, stride: int = 1, **options: Any) -> Conv:
    """Make a convolution that keeps the size, apart from its stride.

    It has no bias and PyTorch's initialization, unless `options` of `Conv` say otherwise.
    """
    default: dict[str, Any] = {"padding": kernel // 2, "bias": False, "init": torch_default}
    return Conv(ins, outs, kernel, stride=stride, rngs=rngs, **default | options)


class SameConv(Conv):
    """3x3 convolution without bias, padded as in TensorFlow: with a stride, only below and right.

    DeepMind's networks pad this way; PyTorch pads a row of zeros on every side.
    """

    def __init__(self, ins: int, outs: int, rngs: Draws, stride: int = 1) -> None:
        options: dict[str, Any] = {"bias": False, "init": torch_default, "rngs": rngs}
        super().__init__(ins, outs, 3, stride=stride, padding=int(stride == 1), **options)

    def __call__(self, x: Array) -> Array:
        if self.stride > 1:
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        return super().__call__(x)


def shortcut(ins: int, outs: int, stride: int, v: Any, rngs: Draws, **options: Any) -> nnx.List:
    """Make a 1x1 convolution and batch norm if the size or channels change, else nothing."""
    if stride == 1 and ins == outs:
        return nnx.List([])
    return nnx.List(
        [conv(ins, outs, 1, rngs, stride, **options), BatchNorm(outs, group=v.bn_group)]
    )


def through(shortcut: nnx.List, x: Array, train: bool) -> Array:
    """Apply a shortcut."""
    if not shortcut:
        return x
    conv, norm = shortcut
    return norm(conv(x), train)


def add_stages(net: Any, v: Any, rngs: Draws, block: Any, outs: int, ins: int = STEM) -> int:
    """Add the stages `layer1`, `layer2`, ... to a network; all but the first halve the map.

    Args:
      block: makes a block from its channels before and after, its stride, the row and the draws.
      outs: channels after the first stage; each stage doubles them.
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
    """Run the blocks of a stage; the first has different arrays and is never part of a scan."""
    key, others_key = (None, None) if key is None else split(key, 2)
    x = run_blocks(blocks[:1], x, key=key, rates=rates[:1], **settings | {"scan": False})
    return (
        run_blocks(blocks[1:], x, key=others_key, rates=rates[1:], **settings)
        if len(blocks) > 1
        else x
    )


def block_names(depths: Sequence[int], stem: int, first: int) -> Iterator[tuple[str, bool]]:
    """Yield the name of each residual block and whether its shortcut has a convolution.

    Args:
      depths: blocks of each stage; in all stages but the first, the first block has a stride.
      stem: channels before the first stage.
      first: channels after a block of the first stage; each stage doubles them.
    """
    ins = stem
    for i, depth in enumerate(depths):
        for j in range(depth):
            yield f"layer{i + 1}.{j}", ins != first << i or (i > 0 and j == 0)
            ins = first << i
