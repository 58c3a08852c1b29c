"""Whole blocks of PyTorch modules that the package's own kernels compute in training.

A pattern recognizes a part of a program by its operators alone, and returns None for other blocks.
Parity: tests/pytorch/test_torch_blocks.py against the steps one by one.
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
from jaxrobust.pytorch.networks.torch_fusions import (
    CLONE,
    NORM,
    PERMUTE,
    PLAIN,
    VIEW,
    OtherPattern,
    Reader,
)
from jaxrobust.pytorch.program import ChannelsLast, OperatorCall, channels_last
from jaxrobust.types import Array

_CONVOLUTION = "aten.convolution.default"
_SIZES = ("mul", "aten.sym_size.int")


class _Reader(Reader):
    """A reader that skips steps that change no value."""

    def behind(self, operand: Any, operator: str, *others: Any) -> OperatorCall:
        return self.step(operand, operator, *others, skip=(VIEW, CLONE))

    def linear(self, operand: Any) -> tuple[Any, str, str]:
        """Return the operand of a linear layer, and the names of its weight and bias."""
        bias, x, weight = self.behind(operand, "aten.addmm.default").operands[:3]
        turned = self.behind(weight, PERMUTE, (1, 0))
        return x, self.before(turned.operands[0]), self.before(bias)


class _ConvNeXt(NamedTuple):
    """Names of the values that a block of ConvNeXt reads, and what is not an array."""

    x: str
    weights: dict[str, str]  # by the names of `BlockParameters`
    padding: tuple[int, ...]
    groups: int
    eps: float
    share: str | None  # of the kept share of each image's path
    views: list[tuple[Any, ...]]


def _convnext(part: Part) -> _ConvNeXt:
    """Read `x + gamma * MLP(LN(depthwise(x)))`, as timm writes it."""
    read, last = _Reader(part.steps), part.steps[-1]
    if last.operator != "aten.add.Tensor" or not last.keywords.items() <= PLAIN:
        raise OtherPattern
    branch, x = sorted(last.operands, key=lambda operand: operand.name not in read.steps)
    scaled, share = read.behind(branch, "aten.mul.Tensor"), None
    drawn = read.steps.get(scaled.operands[1].name)
    if drawn is not None and drawn.operator == "aten.div.Tensor":
        # Only random draws: the kernel has no gradient for an image's kept share.
        read.behind(drawn.operands[0], "aten.bernoulli.p")
        if not isinstance(drawn.operands[1], float):
            raise OtherPattern
        share = drawn.name
        scaled = read.behind(scaled.operands[0], "aten.mul.Tensor")
    gamma = read.step(scaled.operands[1], VIEW, (1, -1, 1, 1))
    back = read.behind(scaled.operands[0], PERMUTE, (0, 3, 1, 2))
    hidden, second, second_bias = read.linear(back.operands[0])
    gelu = read.behind(hidden, "aten.gelu.default")
    normal, first, first_bias = read.linear(gelu.operands[0])
    item = read.behind(normal, "getitem", 0)
    norm = read.behind(item.operands[0], NORM)
    _, shape, scale, shift, eps = norm.operands
    turned = read.behind(norm.operands[0], PERMUTE, (0, 2, 3, 1))
    conv = read.behind(turned.operands[0], _CONVOLUTION)
    _, taps, bias, stride, padding, dilation, transposed, _, groups = conv.operands
    if (stride, dilation, transposed, (groups,)) != ((1, 1), (1, 1), False, shape):
        raise OtherPattern
    operands = {"taps": taps, "bias": bias, "scale": scale, "shift": shift}
    operands["gamma"] = gamma.operands[0]
    names = {name: read.before(operand) for name, operand in operands.items()}
    names |= {"first": first, "first_bias": first_bias}
    names |= {"second": second, "second_bias": second_bias}
    if read.before(conv.operands[0]) != read.before(x):
        raise OtherPattern
    return _ConvNeXt(x.name, names, padding, groups, eps, share, read.views)


def _convnext_block(part: Part, values: Mapping[str, Any], subset: Subset) -> dict[str, Any] | None:
    """Compute a block of ConvNeXt with one kernel; None if the part is something else."""
    try:
        block = _convnext(part)
    except (OtherPattern, AttributeError, ValueError):  # operands of other kinds, or other numbers
        return None
    x, weights = channels_last(values[block.x]), {n: values[at] for n, at in block.weights.items()}
    taps, others = weights["taps"], part.results - {part.steps[-1].name}
    if any(step.operator not in _SIZES for step in part.steps if step.name in others):
        return None
    sides = x.shape[1:3]
    window = (2 * block.padding[0] + 1, 2 * block.padding[1] + 1)
    flat = all(len(view) == 2 or view[1:3] == sides for view in block.views)
    if taps.shape != (block.groups, 1, *window) or window[0] != window[1] or not flat:
        return None
    weights |= {"taps": jnp.transpose(taps, (2, 3, 1, 0))}
    weights |= {name: weights[name].T for name in ("first", "second")}
    computed, path = subset([*others, *filter(None, [block.share])]), None
    if block.share is not None:
        if computed[block.share].shape != (len(x), 1, 1, 1):
            return None
        share = computed[block.share].reshape(-1)

        def path(y: Array) -> Array:
            return y * share.astype(y.dtype).reshape(-1, *[1] * (y.ndim - 1))

    out = convnext_block(x, BlockParameters(**weights), path, eps=block.eps)
    return {part.steps[-1].name: ChannelsLast(out), **{name: computed[name] for name in others}}


def _norm_halving(part: Part, values: Mapping[str, Any], subset: Subset) -> dict[str, Any] | None:
    """Compute the norm and convolution between two stages with one kernel; None: another part."""
    del subset
    read, last = _Reader(part.steps), part.steps[-1]
    if last.operator != _CONVOLUTION or part.results != {last.name}:
        return None
    normal, kernel, bias, stride, padding, dilation, transposed, _, groups = last.operands
    try:
        turned = read.behind(normal, PERMUTE, (0, 3, 1, 2))
        item = read.behind(turned.operands[0], "getitem", 0)
        norm = read.behind(item.operands[0], NORM)
        x, shape, scale, shift, eps = norm.operands
        x = read.behind(x, PERMUTE, (0, 2, 3, 1)).operands[0]
        names = [read.before(operand) for operand in (x, scale, shift, kernel, bias)]
    except OtherPattern:
        return None
    x, *weights = (values[name] for name in names)
    window, kernel = (stride[0], stride[0]), weights[2]
    if (
        (padding, dilation, transposed, groups) != ((0, 0), (1, 1), False, 1)
        or read.views
        or stride != window
        or kernel.shape[1:] != (*shape, *window)
    ):
        return None
    weights[2] = jnp.transpose(kernel, (2, 3, 1, 0))
    parameters = HalvingParameters(*weights)
    out = norm_halving(channels_last(x), parameters, stride=stride[0], eps=eps)
    return {last.name: ChannelsLast(out)}


PATTERNS: tuple[Pattern, ...] = (_convnext_block, _norm_halving)
