"""Sequences of PyTorch operators that one kernel computes, anywhere in a program.

PyTorch computes a linear map of tokens f[B,N,C] on rows f[B*N,C], slices the arrays of attention
out of one product, and separates a norm from the residual connection next to it. All of this costs
time on a TPU, because 197 tokens do not fill tiles of eight. Three forms of attention are
recognized: PyTorch's own function, `softmax(q @ k.T * scale + bias) @ v` written out as in timm's
Swin, and either with queries, keys and values sliced out of one product.
Parity: tests/pytorch/test_torch_fusions.py against the operators one by one.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.models.kernels import attention, layers
from jaxrobust.models.kernels.primitives import matmul
from jaxrobust.pytorch.blocks import Part
from jaxrobust.pytorch.networks.torch_kernels import attend
from jaxrobust.pytorch.operators import TABLE
from jaxrobust.pytorch.program import (
    OWN,
    Ints,
    NumberType,
    Of,
    OperatorCall,
    OperatorRule,
    needed,
    read_by,
)
from jaxrobust.types import Array

VIEW, CLONE, PERMUTE = "aten.view.default", "aten.clone.default", "aten.permute.default"
NORM = "aten.native_layer_norm.default"
_PRODUCT = "aten.bmm.default"
_ATTENTION = "aten.scaled_dot_product_attention.default"
_FACTORS = {
    **{f"aten.mul.{kind}": 1 for kind in ("Tensor", "Scalar")},
    **{f"aten.div.{kind}": -1 for kind in ("Tensor", "Scalar")},
}
# Keywords of sums, products, the GELU and repetitions that change nothing.
PLAIN = {"alpha": 1, "beta": 1, "approximate": "none", "implicit": False}.items()
# Operators of `KERNELS`, which replace PyTorch's.
_ATTEND, _ATTEND_PRODUCT = "jaxrobust.attention.default", "jaxrobust.self_attention.default"
_LINEAR, _NORM_AND_TOKENS = "jaxrobust.linear.default", "jaxrobust.norm_and_tokens.default"
_ROLL = "jaxrobust.roll.default"
Biases = Sequence[tuple[Array, int | None]]  # see `_bias`


class OtherPattern(Exception):
    """A step does not match the pattern."""


class Reader:
    """Follows steps backwards from a result; raises `OtherPattern` if they do not match."""

    def __init__(self, steps: Sequence[OperatorCall]) -> None:
        self.steps = {step.name: step for step in steps}
        self.views: list[tuple[Any, ...]] = []  # sizes of the views that were skipped

    def before(self, operand: Any) -> str:
        """Return the name of a value computed before these steps."""
        if not isinstance(operand, Of) or operand.name in self.steps:
            raise OtherPattern
        return operand.name

    def step(
        self, operand: Any, operator: str, *others: Any, skip: Sequence[str] = ()
    ) -> OperatorCall:
        """Return the step that computes a value, after skipping others.

        The operands after the first must begin with `others`.
        """
        while True:
            step = self.steps.get(operand.name) if isinstance(operand, Of) else None
            if step is None:
                raise OtherPattern
            if step.operator == operator:
                break
            if step.operator not in skip:
                raise OtherPattern
            if step.operator == VIEW:
                self.views.append(step.operands[1])
            operand = step.operands[0]
        if step.operands[1 : 1 + len(others)] != others or not step.keywords.items() <= PLAIN:
            raise OtherPattern
        return step


def fused(part: Part, constants: Mapping[str, Any]) -> Sequence[OperatorCall]:
    """Return the steps of a part, with operators of `KERNELS` instead of PyTorch's if possible."""
    read = Reader(part.steps)
    readers = collections.defaultdict(set, {name: {"what comes later"} for name in part.results})
    for step in part.steps:
        for name in read_by(step):
            readers[name].add(step.operator)
    steps = []
    for step in part.steps:
        only_views = readers[step.name] == {VIEW}
        call = attention_of(step, read, only_views=only_views)
        if call is None and only_views:
            call = _linear_of(step, read)
        steps.append(call or _roll_of(step, constants) or step)
    return needed([*_with_norms_tokens(steps)], part.results)


def _roll_of(step: OperatorCall, constants: Mapping[str, Any]) -> OperatorCall | None:
    """Recognize rolls, which PyTorch writes as indexing, whose gradient would be a scatter-add."""
    if step.operator != "aten.index_select.default" or step.operands[2].name not in constants:
        return None
    x, axis, places = step.operands
    rows = np.asarray(constants[places.name])
    shift = -int(rows[0]) if len(rows) else 0
    if not shift or not np.array_equal(rows, np.roll(np.arange(len(rows)), shift)):
        return None
    return OperatorCall(step.name, _ROLL, (x, axis, shift, len(rows)), {}, step.line)


def _with_norms_tokens(steps: Sequence[OperatorCall]) -> Iterator[OperatorCall]:
    """Make later readers of a norm's input read it from the norm."""
    # The gradient's kernel then adds up both gradients.
    last = {name: at for at, step in enumerate(steps) for name in read_by(step)}
    names: dict[str, str] = {}  # of a value -> of its copy that the last norm returns

    def renamed(operand: Any) -> Any:
        if isinstance(operand, Of):
            return Of(names.get(operand.name, operand.name))
        if isinstance(operand, tuple) and not isinstance(operand, NumberType):
            return tuple(map(renamed, operand))
        return operand

    for at, step in enumerate(steps):
        renamed_step = step
        if step.operator != OWN and not names.keys().isdisjoint(read_by(step)):
            keywords = {name: renamed(operand) for name, operand in step.keywords.items()}
            renamed_step = step._replace(operands=renamed(step.operands), keywords=keywords)
        if step.operator == NORM:  # over the last axis, with scale and shift
            x, sizes, *weights, _ = step.operands
            if len(sizes) == 1 and None not in weights and last[x.name] != at:
                yield renamed_step._replace(operator=_NORM_AND_TOKENS)
                names[x.name] = f"{step.name}.tokens"
                yield OperatorCall(names[x.name], "getitem", (Of(step.name), 3), {}, step.line)
                continue
        yield renamed_step


def _linear_of(step: OperatorCall, read: Reader) -> OperatorCall | None:
    """Recognize a linear map of rows that are tokens before and after it."""
    if step.operator == "aten.addmm.default":
        bias, x, weight = step.operands[:3]
    elif step.operator == "aten.mm.default":
        bias, (x, weight) = None, step.operands
    else:
        return None
    try:
        tokens, sizes = read.step(x, VIEW).operands
    except OtherPattern:
        return None
    if not step.keywords.items() <= PLAIN:
        return None
    return OperatorCall(step.name, _LINEAR, (tokens, sizes, bias, weight), {}, step.line)


# ----------------------------------------------------------------------------------- attention


def attention_of(step: OperatorCall, read: Reader, *, only_views: bool) -> OperatorCall | None:
    """Return attention as a step of `KERNELS`; None: they do not support it.

    `only_views`: all readers of the step's value reshape it first.
    """
    try:
        if step.operator == _ATTENTION:
            *parts, mask, dropout, causal = step.operands
            if dropout or causal or step.keywords.get("enable_gqa"):
                return None
            operands = (*parts, () if mask is None else ((mask, None),), None)
            keywords = {"scale": step.keywords.get("scale")}
            call = OperatorCall(step.name, _ATTEND, operands, keywords, step.line)
        elif step.operator == _PRODUCT and only_views:
            call = _attention_written_out(step, read)
        else:
            return None
    except OtherPattern:
        return None
    *parts, biases, shapes = call.operands
    try:  # queries, keys and values may be parts of one product f[B,N,3,h,d]
        sources = [_part_of(part, place, read) for place, part in enumerate(parts)]
        turned = read.step(sources[0], PERMUTE, (2, 0, 3, 1, 4))
        view = read.step(turned.operands[0], VIEW)
    except OtherPattern:
        return call
    if len({*sources}) > 1:
        return call
    return call._replace(operator=_ATTEND_PRODUCT, operands=(*view.operands, biases, shapes))


def _part_of(operand: Any, place: int, read: Reader) -> Any:
    """Find the value whose row `place` is the operand."""
    squeezed = read.step(operand, "aten.squeeze.dims", (0,))
    cut = read.step(squeezed.operands[0], "aten.slice.Tensor", 0, place, place + 1, 1)
    return cut.operands[0]


class _Scores(NamedTuple):
    """The input of a softmax."""

    product: OperatorCall  # of queries and keys
    sizes: tuple[Any, ...]  # f[B,h,N,M]
    factor: float = 1.0
    biases: tuple[Any, ...] = ()  # each with the number of windows in the axes that it is added to
    windows: Any = None  # in [B/windows,windows,h,N,M]; None: the axes are `sizes`


def _scores(operand: Any, read: Reader) -> _Scores:
    """Trace scores back to the product: `view(product) * factor + bias + bias`."""
    step = read.steps.get(operand.name) if isinstance(operand, Of) else None
    if step is None:
        raise OtherPattern
    first, *others = step.operands
    if step.operator == VIEW:
        return _viewed_scores(first, others[0], read)
    if step.operator == CLONE:
        return _scores(first, read)
    if (factor := _factor(step)) is not None:
        inner = _scores(first, read)
        if not inner.biases:
            return inner._replace(factor=inner.factor * factor)
    if step.operator == "aten.add.Tensor" and step.keywords.items() <= PLAIN:
        for x, bias in ((first, others[0]), (others[0], first)):
            try:
                inner = _scores(x, read)
            except OtherPattern:
                continue
            if isinstance(bias, Of):
                return inner._replace(biases=(*inner.biases, (bias, inner.windows)))
    raise OtherPattern


def _viewed_scores(operand: Any, sizes: tuple[Any, ...], read: Reader) -> _Scores:
    try:
        product = read.step(operand, _PRODUCT)
    except OtherPattern:
        inner = _scores(operand, read)
        if len(sizes) not in (4, 5) or sizes[-3:] != inner.sizes[-3:]:
            raise
        return inner._replace(windows=sizes[1] if len(sizes) == 5 else None)
    if len(sizes) != 4:
        raise OtherPattern
    return _Scores(product, sizes)


def _factor(step: OperatorCall | None) -> float | None:
    """Return the number that a step multiplies its first operand by; None: no number, or 0."""
    if step is None or step.operator not in _FACTORS:
        return None
    by = step.operands[1]
    return by ** _FACTORS[step.operator] if isinstance(by, int | float) and by else None


def _attention_written_out(step: OperatorCall, read: Reader) -> OperatorCall:
    """Recognize `softmax(q @ k.T * scale + bias) @ v` of arrays f[B,h,N,d], as in timm's Swin."""
    (weights, weights_shape), (value, value_shape) = (_unfolded(x, read) for x in step.operands)
    softmax = read.step(weights, "aten._softmax.default", skip=(CLONE,))
    scores = _scores(softmax.operands[0], read)
    (query, shape), (turned, turned_shape) = (_unfolded(x, read) for x in scores.product.operands)
    key = read.step(turned, PERMUTE, (0, 1, 3, 2))
    shapes = shape, turned_shape, value_shape
    batch, heads, width, keys = turned_shape
    tokens = (shape[2], keys)
    if (
        softmax.operands[1:] not in ((-1, False), (3, False))
        or len({(*sizes[:2],) for sizes in (*shapes, weights_shape, scores.sizes)}) > 1
        # A bias has more rows or columns than the scores.
        or not tokens == weights_shape[2:] == scores.sizes[2:]
        or value_shape[2] != keys
    ):
        raise OtherPattern
    factor, scaled = scores.factor, read.steps.get(query.name)
    if scaled is not None and (by := _factor(scaled)) is not None:
        query, factor = scaled.operands[0], factor * by
    shapes = shape, (batch, heads, keys, width), value_shape
    operands = query, key.operands[0], value, scores.biases, shapes
    return OperatorCall(step.name, _ATTEND, operands, {"scale": factor}, step.line)


def _unfolded(operand: Any, read: Reader) -> tuple[Any, Any]:
    """Find the array f[B,h,N,d] behind a batch of matrices f[B*h,N,d], and its shape."""
    view = read.step(operand, VIEW)
    value, shape = read.step(view.operands[0], "aten.expand.default", skip=(CLONE,)).operands[:2]
    if len(shape) != 4 or view.operands[1][1:] != shape[2:]:
        raise OtherPattern
    return value, shape


# ------------------------------------------------------------------------------------- kernels


def _bias(pairs: Biases) -> Array | None:
    """Add up biases of scores f[B,h,N,M]; some have the shape [B/windows,windows,h,N,M]."""
    total: Array | None = None
    for bias, windows in pairs:
        axes = 4 if windows is None else 5
        bias = bias.reshape((1,) * (axes - bias.ndim) + bias.shape)
        if windows is not None and len(bias) == 1:
            bias = bias[0]
        elif windows is not None:
            bias = jnp.broadcast_to(bias, (len(bias), windows, *bias.shape[2:]))
            bias = bias.reshape(-1, *bias.shape[2:])
        if total is None:
            total = bias
            continue
        rows = max(len(total), len(bias))  # fewer rows belong to each image's windows
        total, bias = (
            jnp.tile(x, (rows // len(x), 1, 1, 1)) if len(x) > 1 else x for x in (total, bias)
        )
        total = total + bias
    return total


def _has_mask(biases: Biases) -> bool:
    return any(not jnp.issubdtype(bias.dtype, jnp.floating) for bias, _ in biases)


def _attend(
    query: Array,
    key: Array,
    value: Array,
    biases: Biases,
    shapes: Sequence[Ints] | None,
    scale: float | None,
) -> Array:
    """Compute the attention of f[B,h,N,d], broadcast to `shapes` if necessary."""
    parts = [query, key, value]
    if shapes is not None:
        parts = [*map(jnp.broadcast_to, parts, shapes)]
    if _has_mask(biases) or query.ndim != 4:
        plain = TABLE[_ATTENTION].plain
        assert plain is not None
        return plain(*parts, biases[0][0] if biases else None, 0.0, False, scale=scale)
    return attend(*parts, bias=_bias(biases), scale=scale)


def _attend_product(
    x: Array, sizes: Ints, biases: Biases, shapes: Sequence[Ints] | None, scale: float | None
) -> Array:
    """Compute attention f[B,h,N,d] from the product f[B,N,3,h,d]."""
    parts = x.reshape(sizes)
    batch, tokens, _, heads, width = parts.shape
    product = parts.reshape(batch, tokens, -1)
    shape = batch, heads, tokens, width
    if _has_mask(biases) or any(tuple(other) != shape for other in shapes or ()):
        query, key, value = attention.split(product, heads)
        return _attend(query, key, value, biases, shapes, scale)
    out = attention.self_attention(product, heads, bias=_bias(biases), scale=scale)
    return attention.swap(out.reshape(batch, tokens, heads, width))


def _linear(x: Array, sizes: Ints, bias: Array | None, weight: Array) -> Array:
    """Compute f[..,out] from f[..,in], or from any array whose rows have the shape `sizes`."""
    rows = x.reshape(sizes)
    if x.ndim < 3 or x.shape[-1] != rows.shape[1]:
        x = rows
    if bias is not None and bias.ndim != 1:
        return matmul(rows, weight) + bias
    return layers.linear(x, weight, bias)


def _roll(x: Array, axis: int, shift: int, count: int) -> Array:
    """Roll the first `count` positions of an axis, and drop the rest."""
    return jnp.roll(jax.lax.slice_in_dim(x, 0, count, axis=axis), shift, axis)


def _norm_and_tokens(x: Array, sizes: Ints, scale: Array, shift: Array, eps: float) -> list[Any]:
    """Compute PyTorch's norm over the last axis, without statistics, and also return its input."""
    if x.ndim < 3:
        return [layers.layer_norm(x, scale, shift, eps), None, None, x]
    out, x = layers.norm_and_tokens(x, scale, shift, eps)
    return [out, None, None, x]


KERNELS = {
    _LINEAR: OperatorRule(_linear),
    _ROLL: OperatorRule(_roll),
    _NORM_AND_TOKENS: OperatorRule(_norm_and_tokens),
    _ATTEND: OperatorRule(_attend),
    _ATTEND_PRODUCT: OperatorRule(_attend_product),
}
