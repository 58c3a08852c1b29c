"""Operators of PyTorch that follow each other and that one kernel computes, wherever they stand.

PyTorch writes a linear map of tokens f[B,N,C] as one of rows f[B*N,C], attention as three arrays
cut out of one product, and a norm apart from the residual connection beside it. None is free on a
TPU, where 197 tokens fill no tiles of eight.
Parity: tests/pytorch/test_torch_fusions.py against the operators one by one.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.models.kernels import layers
from jaxrobust.models.kernels.primitives import matmul
from jaxrobust.pytorch.blocks import Part, needed
from jaxrobust.pytorch.networks import torch_attention
from jaxrobust.pytorch.networks.torch_attention import UNSCALED, VIEW, Steps, made_by
from jaxrobust.pytorch.program import (
    OWN,
    Ints,
    NumberType,
    Of,
    OperatorCall,
    OperatorRule,
    read_by,
)
from jaxrobust.types import Array

_NORM = "aten.native_layer_norm.default"
# What `KERNELS` computes in the place of PyTorch's operators, beside attention.
_LINEAR, _NORM_BESIDE = "jaxrobust.linear.default", "jaxrobust.norm_and_tokens.default"
_ROLL = "jaxrobust.roll.default"


def fused(part: Part, constants: Mapping[str, Any]) -> Sequence[OperatorCall]:
    """Return the steps of a part, with those that `KERNELS` computes in the place of PyTorch's."""
    steps = {step.name: step for step in part.steps}
    readers = collections.defaultdict(set, {name: {"what comes later"} for name in part.kept})
    for step in part.steps:
        for name in read_by(step):
            readers[name].add(step.operator)
    taken = []
    for step in part.steps:
        only_views = readers[step.name] == {VIEW}
        made = torch_attention.taken(step, steps, only_views=only_views)
        linear = _linear_of(step, steps) if only_views else None
        taken.append(made or linear or _roll_of(step, constants) or step)
    return needed([*_beside_norms(taken)], part.kept)


def _roll_of(step: OperatorCall, constants: Mapping[str, Any]) -> OperatorCall | None:
    """Take rolls, which PyTorch writes as a choice of rows: its gradient would add up in places."""
    if step.operator != "aten.index_select.default":
        return None
    x, axis, places = step.operands
    if places.name not in constants:
        return None
    rows = np.asarray(constants[places.name])
    shift = -int(rows[0]) if len(rows) else 0
    if not shift or not np.array_equal(rows, np.roll(np.arange(len(rows)), shift)):
        return None
    return OperatorCall(step.name, _ROLL, (x, axis, shift, len(rows)), {}, step.line)


def _beside_norms(steps: Sequence[OperatorCall]) -> Iterator[OperatorCall]:
    """Let what reads the tokens of a norm after it read them from the norm.

    Then the gradient's kernel adds up what comes back to the two.
    """
    last = {name: at for at, step in enumerate(steps) for name in read_by(step)}
    now: dict[str, str] = {}  # name of a value -> of the same one, as the last norm returns it
    for at, step in enumerate(steps):
        reading, tokens = _reading(step, now), _normed(step)
        if tokens is None or last[tokens] == at:
            yield reading
            continue
        yield reading._replace(operator=_NORM_BESIDE)
        now[tokens] = f"{step.name}.tokens"
        yield OperatorCall(now[tokens], "getitem", (Of(step.name), 3), {}, step.line)


def _normed(step: OperatorCall) -> str | None:
    """Name what a norm over the last axis, with scale and shift, is taken of; None: it is none."""
    if step.operator != _NORM:
        return None
    x, sizes, *weights, _ = step.operands
    return x.name if len(sizes) == 1 and None not in weights else None


def _reading(step: OperatorCall, names: Mapping[str, str]) -> OperatorCall:
    """Let a step read other values."""

    def renamed(operand: Any) -> Any:
        if isinstance(operand, Of):
            return Of(names.get(operand.name, operand.name))
        if isinstance(operand, tuple) and not isinstance(operand, NumberType):
            return tuple(map(renamed, operand))
        return operand

    if step.operator == OWN or not names.keys() & read_by(step):
        return step
    named = {name: renamed(operand) for name, operand in step.named.items()}
    return step._replace(operands=tuple(map(renamed, step.operands)), named=named)


def _linear_of(step: OperatorCall, steps: Steps) -> OperatorCall | None:
    """Take a linear map of rows that were tokens before, and become tokens again."""
    if step.operator == "aten.addmm.default":
        bias, x, weight = step.operands[:3]
    elif step.operator == "aten.mm.default":
        bias, (x, weight) = None, step.operands
    else:
        return None
    view = made_by(x, steps, VIEW)
    if view is None or not step.named.items() <= UNSCALED:
        return None
    tokens, sizes = view.operands
    return OperatorCall(step.name, _LINEAR, (tokens, sizes, bias, weight), {}, step.line)


def _linear(x: Array, sizes: Ints, bias: Array | None, weight: Array) -> Array:
    """Compute f[..,out] of f[..,in], or of whatever array has the rows that `sizes` says."""
    rows = x.reshape(sizes)
    if x.ndim < 3 or x.shape[-1] != rows.shape[1]:
        x = rows
    if bias is not None and bias.ndim != 1:
        return matmul(rows, weight) + bias
    return layers.linear(x, weight, bias)


def _roll(x: Array, axis: int, shift: int, count: int) -> Array:
    """Roll the first `count` places of an axis, and leave out others."""
    return jnp.roll(jax.lax.slice_in_dim(x, 0, count, axis=axis), shift, axis)


def _norm_and_tokens(x: Array, sizes: Ints, scale: Array, shift: Array, eps: float) -> list[Any]:
    """Compute PyTorch's norm over the last axis, without statistics, and return its operand too."""
    if x.ndim < 3:
        return [layers.layer_norm(x, scale, shift, eps), None, None, x]
    out, x = layers.norm_and_tokens(x, scale, shift, eps)
    return [out, None, None, x]


KERNELS = {
    _LINEAR: OperatorRule(_linear),
    _ROLL: OperatorRule(_roll),
    _NORM_BESIDE: OperatorRule(_norm_and_tokens),
    **torch_attention.KERNELS,
}
