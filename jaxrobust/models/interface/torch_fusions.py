"""Operators of PyTorch that follow each other and that one kernel computes, wherever they stand.

PyTorch writes a linear map of tokens f[B,N,C] as one of rows f[B*N,C], attention as three arrays
cut out of one product, and a norm apart from the residual connection beside it. None is free on a
TPU, where 197 tokens fill no tiles of eight.
Parity: tests/models/interface/test_torch_fusions.py against the operators one by one.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxrobust.interop.blocks import Part
from jaxrobust.interop.operators import TABLE
from jaxrobust.interop.program import (
    OWN,
    Ints,
    NumberType,
    Of,
    OperatorCall,
    OperatorRule,
    read_by,
)
from jaxrobust.models.kernels import attention, layers
from jaxrobust.models.kernels.primitives import matmul
from jaxrobust.types import Array

_VIEW, _ATTENTION = "aten.view.default", "aten.scaled_dot_product_attention.default"
_LINEAR, _SELF_ATTENTION = "jaxrobust.linear.default", "jaxrobust.self_attention.default"
_NORM, _NORM_BESIDE = "aten.native_layer_norm.default", "jaxrobust.norm_and_tokens.default"
_UNSCALED = {"alpha": 1, "beta": 1}.items()
Steps = Mapping[str, OperatorCall]


def fused(part: Part) -> Sequence[OperatorCall]:
    """Return the steps of a part, with those that `KERNELS` computes in the place of PyTorch's."""
    steps = {step.name: step for step in part.steps}
    readers = collections.defaultdict(set, {name: {"what comes later"} for name in part.kept})
    for step in part.steps:
        for name in read_by(step):
            readers[name].add(step.operator)
    taken = [
        _self_attention_of(step, steps) or _linear_of(step, steps, readers[step.name]) or step
        for step in part.steps
    ]
    return [*_beside_norms(taken)]


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


def _linear_of(step: OperatorCall, steps: Steps, readers: set[str]) -> OperatorCall | None:
    """Take a linear map of rows that were tokens before, and become tokens again."""
    if step.operator == "aten.addmm.default":
        bias, x, weight = step.operands[:3]
    elif step.operator == "aten.mm.default":
        bias, (x, weight) = None, step.operands
    else:
        return None
    view = _made_by(x, steps, _VIEW)
    if view is None or readers != {_VIEW} or not step.named.items() <= _UNSCALED:
        return None
    tokens, sizes = view.operands
    return OperatorCall(step.name, _LINEAR, (tokens, sizes, bias, weight), {}, step.line)


def _self_attention_of(step: OperatorCall, steps: Steps) -> OperatorCall | None:
    """Take attention whose queries, keys and values are parts of one product f[B,N,3,h,d]."""
    if step.operator != _ATTENTION:
        return None
    *parts, mask, dropout, causal = step.operands
    whole = [_part_of(part, place, steps) for place, part in enumerate(parts)]
    turned = _made_by(whole[0], steps, "aten.permute.default")
    if len({*whole}) > 1 or turned is None or turned.operands[1] != (2, 0, 3, 1, 4):
        return None
    view = _made_by(turned.operands[0], steps, _VIEW)
    if view is None or dropout or causal or step.named.get("enable_gqa"):
        return None
    operands = (*view.operands, mask)
    named = {"scale": step.named.get("scale")}
    return OperatorCall(step.name, _SELF_ATTENTION, operands, named, step.line)


def _part_of(operand: Any, place: int, steps: Steps) -> Any:
    """Return what an operand is the row `place` of; None: of nothing."""
    squeezed = _made_by(operand, steps, "aten.squeeze.dims")
    cut = _made_by(squeezed.operands[0], steps, "aten.slice.Tensor") if squeezed else None
    if squeezed is None or cut is None or squeezed.operands[1] != (0,):
        return None
    return cut.operands[0] if cut.operands[1:] == (0, place, place + 1, 1) else None


def _made_by(operand: Any, steps: Steps, operator: str) -> OperatorCall | None:
    step = steps.get(operand.name) if isinstance(operand, Of) else None
    return step if step is not None and step.operator == operator else None


def _linear(x: Array, sizes: Ints, bias: Array | None, weight: Array) -> Array:
    """Compute f[..,out] of f[..,in], or of whatever array has the rows that `sizes` says."""
    rows = x.reshape(sizes)
    if x.ndim < 3 or x.shape[-1] != rows.shape[1]:
        x = rows
    if bias is not None and bias.ndim != 1:
        return matmul(rows, weight) + bias
    return layers.linear(x, weight, bias)


def _self_attention(x: Array, sizes: Ints, mask: Array | None, scale: float | None) -> Array:
    """Compute f[B,h,N,d] of the product f[B,N,3,h,d]."""
    parts = x.reshape(sizes)
    batch, tokens, _, heads, width = parts.shape
    product = parts.reshape(batch, tokens, -1)
    if mask is not None and not jnp.issubdtype(mask.dtype, jnp.floating):
        plain = TABLE[_ATTENTION].plain
        assert plain is not None
        return plain(*attention.split(product, heads), mask, 0.0, False, scale=scale)
    out = attention.self_attention(product, heads, bias=mask, scale=scale)
    return attention.swap(out.reshape(batch, tokens, heads, width))


def _norm_and_tokens(x: Array, sizes: Ints, scale: Array, shift: Array, eps: float) -> list[Any]:
    """Return what PyTorch's norm over the last axis does, without statistics, and its operand."""
    if x.ndim < 3:
        return [layers.layer_norm(x, scale, shift, eps), None, None, x]
    out, x = layers.norm_and_tokens(x, scale, shift, eps)
    return [out, None, None, x]


KERNELS = {
    _LINEAR: OperatorRule(_linear),
    _SELF_ATTENTION: OperatorRule(_self_attention),
    _NORM_BESIDE: OperatorRule(_norm_and_tokens),
}
