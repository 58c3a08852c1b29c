"""Whole blocks of PyTorch's modules that the package's own kernels compute, where a module trains.

A pattern says of a part of a program what it computes, by its operators alone; None: it is another
block. Parity: tests/pytorch/test_torch_blocks.py against the steps one by one.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxrobust.models.kernels.convnext_layers import (
    BlockParameters,
    HalvingParameters,
    convnext_block,
    norm_halving,
)
from jaxrobust.pytorch.blocks import Part, Pattern, Subset
from jaxrobust.pytorch.program import ChannelsLast, Of, OperatorCall
from jaxrobust.types import Array

_SHAPES = ("aten.view.default", "aten.clone.default")  # steps that change no value
_PLAIN = {"alpha": 1, "beta": 1, "approximate": "none"}.items()  # of sums, products and the GELU
_SIZES = ("mul", "aten.sym_size.int")


class _OtherBlock(Exception):
    """A step is not what the pattern has there."""


class _Reader:
    """Follows a part from its result back to what it reads."""

    def __init__(self, part: Part) -> None:
        self.steps = {step.name: step for step in part.steps}
        self.views: list[tuple[Any, ...]] = []  # sizes to which values were reshaped

    def before(self, operand: Any) -> str:
        """Return the name of a value from before the block."""
        if not isinstance(operand, Of) or operand.name in self.steps:
            raise _OtherBlock
        return operand.name

    def step(self, operand: Any, operator: str, *rest: Any) -> OperatorCall:
        """Return the step that makes a value, whose operands after the first begin with `rest`."""
        while True:
            step = self.steps.get(operand.name) if isinstance(operand, Of) else None
            if step is None:
                raise _OtherBlock
            if step.operator == operator:
                break
            if step.operator not in _SHAPES:
                raise _OtherBlock
            if len(step.operands) > 1 and isinstance(step.operands[1], tuple):
                self.views.append(step.operands[1])
            operand = step.operands[0]
        if step.operands[1 : 1 + len(rest)] != rest or not step.named.items() <= _PLAIN:
            raise _OtherBlock
        return step

    def linear(self, operand: Any) -> tuple[Any, str, str]:
        """Return the operand of a linear layer, and the names of its weight and bias."""
        step = self.step(operand, "aten.addmm.default")
        bias, x, weight = step.operands[:3]
        turned = self.step(weight, "aten.permute.default", (1, 0))
        return x, self.before(turned.operands[0]), self.before(bias)


class _ConvNeXt(NamedTuple):
    """Names of the values that a block of ConvNeXt reads, and what is no array."""

    x: str
    weights: dict[str, str]  # by the names of `BlockParameters`
    padding: tuple[int, ...]
    groups: int
    eps: float
    share: str | None  # of what a path keeps of each image
    views: list[tuple[Any, ...]]


def _convnext(part: Part) -> _ConvNeXt:
    """Read `x + gamma * MLP(LN(depthwise(x)))`, as timm writes it; `_OtherBlock`: it is none."""
    read, last = _Reader(part), part.steps[-1]
    if last.operator != "aten.add.Tensor" or not last.named.items() <= _PLAIN:
        raise _OtherBlock
    branch, x = sorted(last.operands, key=lambda each: each.name not in read.steps)
    scaled, share = read.step(branch, "aten.mul.Tensor"), None
    drawn = read.steps.get(scaled.operands[1].name)
    if drawn is not None and drawn.operator == "aten.div.Tensor":
        # A draw alone: the kernel gives what is kept of an image no gradient.
        read.step(drawn.operands[0], "aten.bernoulli.p")
        if not isinstance(drawn.operands[1], float):
            raise _OtherBlock
        share = drawn.name
        scaled = read.step(scaled.operands[0], "aten.mul.Tensor")
    gamma = read.steps.get(getattr(scaled.operands[1], "name", ""))
    if gamma is None or (gamma.operator, *gamma.operands[1:]) != (_SHAPES[0], (1, -1, 1, 1)):
        raise _OtherBlock
    back = read.step(scaled.operands[0], "aten.permute.default", (0, 3, 1, 2))
    hidden, second, second_bias = read.linear(back.operands[0])
    gelu = read.step(hidden, "aten.gelu.default")
    normal, first, first_bias = read.linear(gelu.operands[0])
    item = read.step(normal, "getitem", 0)
    norm = read.step(item.operands[0], "aten.native_layer_norm.default")
    _, shape, scale, shift, eps = norm.operands
    turned = read.step(norm.operands[0], "aten.permute.default", (0, 2, 3, 1))
    conv = read.step(turned.operands[0], "aten.convolution.default")
    _, taps, bias, stride, padding, dilation, transposed, _, groups = conv.operands
    if (stride, dilation, transposed, (groups,)) != ((1, 1), (1, 1), False, shape):
        raise _OtherBlock
    weights = {"taps": taps, "bias": bias, "scale": scale, "shift": shift}
    names = {name: read.before(operand) for name, operand in weights.items()}
    names |= {"first": first, "first_bias": first_bias, "second": second}
    names |= {"second_bias": second_bias, "gamma": read.before(gamma.operands[0])}
    if read.before(conv.operands[0]) != read.before(x):
        raise _OtherBlock
    return _ConvNeXt(x.name, names, padding, groups, eps, share, read.views)


def _convnext_block(part: Part, values: Mapping[str, Any], subset: Subset) -> dict[str, Any] | None:
    """Compute a block of ConvNeXt in one; None: the part is another one."""
    try:
        block = _convnext(part)
    except (_OtherBlock, AttributeError, ValueError):  # operands of other kinds, or other numbers
        return None
    x, weights = values[block.x], {name: values[at] for name, at in block.weights.items()}
    x = x.array if isinstance(x, ChannelsLast) else jnp.moveaxis(x, 1, -1)
    taps, beside = weights["taps"], part.kept - {part.steps[-1].name}
    sizes = [step for step in part.steps if step.name in beside]
    if any(step.operator not in _SIZES for step in sizes):
        return None
    sides = x.shape[1:3]
    window = (2 * block.padding[0] + 1, 2 * block.padding[1] + 1)
    flat = all(len(view) == 2 or view[1:3] == sides for view in block.views)
    if taps.shape != (block.groups, 1, *window) or window[0] != window[1] or not flat:
        return None
    weights |= {"taps": jnp.transpose(taps, (2, 3, 1, 0))}
    weights |= {name: weights[name].T for name in ("first", "second")}
    made, path = subset([*beside, *filter(None, [block.share])]), None
    if block.share is not None:
        if made[block.share].shape != (len(x), 1, 1, 1):
            return None
        share = made[block.share].reshape(-1)

        def path(y: Array) -> Array:
            return y * share.astype(y.dtype).reshape(-1, *[1] * (y.ndim - 1))

    out = convnext_block(x, BlockParameters(**weights), path, eps=block.eps)
    return {part.steps[-1].name: ChannelsLast(out), **{name: made[name] for name in beside}}


def _norm_halving(part: Part, values: Mapping[str, Any], subset: Subset) -> dict[str, Any] | None:
    """Compute the norm and the convolution between two stages in one; None: another part."""
    del subset
    read, last = _Reader(part), part.steps[-1]
    if last.operator != "aten.convolution.default" or part.kept != {last.name}:
        return None
    made, kernel, bias, stride, padding, dilation, transposed, _, groups = last.operands
    try:
        turned = read.step(made, "aten.permute.default", (0, 3, 1, 2))
        item = read.step(turned.operands[0], "getitem", 0)
        norm = read.step(item.operands[0], "aten.native_layer_norm.default")
        x, shape, scale, shift, eps = norm.operands
        x = read.before(read.step(x, "aten.permute.default", (0, 2, 3, 1)).operands[0])
        names = [read.before(operand) for operand in (scale, shift, kernel, bias)]
    except _OtherBlock:
        return None
    found, *weights = (values[name] for name in (x, *names))
    window = (stride[0], stride[0])
    plain = (padding, dilation, transposed, groups) == ((0, 0), (1, 1), False, 1)
    if (
        not plain
        or read.views
        or stride != window
        or weights[2].shape != (*weights[2].shape[:1], *shape, *window)
    ):
        return None
    weights[2] = jnp.transpose(weights[2], (2, 3, 1, 0))
    array = found.array if isinstance(found, ChannelsLast) else jnp.moveaxis(found, 1, -1)
    out = norm_halving(array, HalvingParameters(*weights), stride=stride[0], eps=eps)
    return {last.name: ChannelsLast(out)}


PATTERNS: tuple[Pattern, ...] = (_convnext_block, _norm_halving)
