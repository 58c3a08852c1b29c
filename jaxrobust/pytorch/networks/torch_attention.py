"""Attention of PyTorch's modules as one kernel, however they write it.

Three forms are read: PyTorch's own function, `softmax(q @ k.T * scale + bias) @ v` written out as
in timm's Swin, and either with queries, keys and values cut out of one product. Parity:
tests/pytorch/test_torch_fusions.py against the operators one by one.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxrobust.models.kernels import attention
from jaxrobust.pytorch.networks.torch_kernels import attend
from jaxrobust.pytorch.operators import TABLE
from jaxrobust.pytorch.program import Ints, Of, OperatorCall, OperatorRule
from jaxrobust.types import Array

VIEW, _EXPAND, _CLONE = "aten.view.default", "aten.expand.default", "aten.clone.default"
_PERMUTE, _PRODUCT = "aten.permute.default", "aten.bmm.default"
_ATTENTION = "aten.scaled_dot_product_attention.default"
_FACTORS = {"aten.mul.Tensor": 1, "aten.mul.Scalar": 1, "aten.div.Tensor": -1}
_FACTORS |= {"aten.div.Scalar": -1}
UNSCALED = {"alpha": 1, "beta": 1}.items()
# What `KERNELS` computes in the place of PyTorch's operators.
_ATTEND, _ATTEND_PRODUCT = "jaxrobust.attention.default", "jaxrobust.self_attention.default"
Steps = Mapping[str, OperatorCall]
Biases = Sequence[tuple[Array, int | None]]  # see `_bias`


def taken(step: OperatorCall, steps: Steps, *, only_views: bool) -> OperatorCall | None:
    """Return attention as a step of `KERNELS`; None: it is no attention that they take.

    `only_views` says that whatever reads the step's value gives it another shape first.
    """
    made = _attention_of(step)
    if made is None and only_views:
        made = _written_out(step, steps)
    return None if made is None else _of_one_product(made, steps) or made


def _attention_of(step: OperatorCall) -> OperatorCall | None:
    """Take PyTorch's attention without dropout."""
    if step.operator != _ATTENTION:
        return None
    *parts, mask, dropout, causal = step.operands
    if dropout or causal or step.named.get("enable_gqa"):
        return None
    operands = (*parts, () if mask is None else ((mask, None),), None)
    named = {"scale": step.named.get("scale")}
    return OperatorCall(step.name, _ATTEND, operands, named, step.line)


class _Scores(NamedTuple):
    """What a softmax is taken of."""

    product: OperatorCall  # of queries and keys
    sizes: tuple[Any, ...]  # f[B,h,N,M]
    factor: float = 1.0
    biases: tuple[Any, ...] = ()  # each with the number of windows in the axes that it is added to
    windows: Any = None  # in [B/windows,windows,h,N,M]; None: the axes are `sizes`


def _scores(operand: Any, steps: Steps) -> _Scores | None:
    """Read back to the product of queries and keys: `view(product) * factor + bias + bias`."""
    step = steps.get(operand.name) if isinstance(operand, Of) else None
    if step is None:
        return None
    first, *rest = step.operands
    if step.operator == VIEW:
        product, (sizes,) = made_by(first, steps, _PRODUCT), rest
        if product is not None:
            return _Scores(product, sizes) if len(sizes) == 4 else None
        inner = _scores(first, steps)
        if inner is None or len(sizes) not in (4, 5) or sizes[-3:] != inner.sizes[-3:]:
            return None
        return inner._replace(windows=sizes[1] if len(sizes) == 5 else None)
    if step.operator == _CLONE:
        return _scores(first, steps)
    if (factor := _factor(step)) is not None:
        inner = _scores(first, steps)
        if inner is None or inner.biases:
            return None
        return inner._replace(factor=inner.factor * factor)
    if step.operator == "aten.add.Tensor" and step.named.items() <= UNSCALED:
        for x, bias in ((first, rest[0]), (rest[0], first)):
            inner = _scores(x, steps)
            if inner is not None and isinstance(bias, Of):
                return inner._replace(biases=(*inner.biases, (bias, inner.windows)))
    return None


def _factor(step: OperatorCall | None) -> float | None:
    """Return the number that a step multiplies its first operand by; None: by none, or by 0."""
    if step is None or step.operator not in _FACTORS:
        return None
    by = step.operands[1]
    return by ** _FACTORS[step.operator] if isinstance(by, int | float) and by else None


def _written_out(step: OperatorCall, steps: Steps) -> OperatorCall | None:
    """Take `softmax(q @ k.T * scale + bias) @ v` of arrays f[B,h,N,d], as timm's Swin has it."""
    if step.operator != _PRODUCT:
        return None
    (weights, weights_shape), (value, value_shape) = (
        _unfolded(each, steps) for each in step.operands
    )
    softmax = made_by(_copied(weights, steps), steps, "aten._softmax.default")
    scores = _scores(softmax.operands[0], steps) if softmax else None
    if softmax is None or scores is None or softmax.operands[1:] not in ((-1, False), (3, False)):
        return None
    (query, shape), (turned, turned_shape) = (
        _unfolded(each, steps) for each in scores.product.operands
    )
    key = made_by(turned, steps, _PERMUTE)
    shapes = shape, turned_shape, value_shape
    if key is None or key.operands[1] != (0, 1, 3, 2) or None in shapes:
        return None
    batch, heads, width, keys = turned_shape
    if len({(*each[:2],) for each in (*shapes, weights_shape, scores.sizes)}) > 1:
        return None
    tokens = (shape[2], keys)
    if not tokens == weights_shape[2:] == scores.sizes[2:] or value_shape[2] != keys:
        return None  # a bias has more rows or columns than the scores
    factor, scaled = scores.factor, steps.get(query.name)
    if (by := _factor(scaled)) is not None and scaled is not None:
        query, factor = scaled.operands[0], factor * by
    shapes = shape, (batch, heads, keys, width), value_shape
    operands = query, key.operands[0], value, scores.biases, shapes
    return OperatorCall(step.name, _ATTEND, operands, {"scale": factor}, step.line)


def _unfolded(operand: Any, steps: Steps) -> tuple[Any, Any]:
    """Find the array f[B,h,N,d] of a batch of matrices f[B*h,N,d], and its shape."""
    view = made_by(operand, steps, VIEW)
    expanded = made_by(_copied(view.operands[0], steps), steps, _EXPAND) if view else None
    if view is None or expanded is None:
        return None, None
    value, shape = expanded.operands[:2]
    return (value, shape) if len(shape) == 4 and view.operands[1][1:] == shape[2:] else (None, None)


def _copied(operand: Any, steps: Steps) -> Any:
    while (copy := made_by(operand, steps, _CLONE)) is not None:
        operand = copy.operands[0]
    return operand


def _of_one_product(step: OperatorCall, steps: Steps) -> OperatorCall | None:
    """Take attention whose queries, keys and values are parts of one product f[B,N,3,h,d]."""
    *parts, biases, shapes = step.operands
    whole = [_part_of(part, place, steps) for place, part in enumerate(parts)]
    turned = made_by(whole[0], steps, _PERMUTE)
    if len({*whole}) > 1 or turned is None or turned.operands[1] != (2, 0, 3, 1, 4):
        return None
    view = made_by(turned.operands[0], steps, VIEW)
    if view is None:
        return None
    return step._replace(operator=_ATTEND_PRODUCT, operands=(*view.operands, biases, shapes))


def _part_of(operand: Any, place: int, steps: Steps) -> Any:
    """Find the value that an operand is the row `place` of; None: of nothing."""
    squeezed = made_by(operand, steps, "aten.squeeze.dims")
    cut = made_by(squeezed.operands[0], steps, "aten.slice.Tensor") if squeezed else None
    if squeezed is None or cut is None or squeezed.operands[1] != (0,):
        return None
    return cut.operands[0] if cut.operands[1:] == (0, place, place + 1, 1) else None


def made_by(operand: Any, steps: Steps, operator: str) -> OperatorCall | None:
    """Return the step that makes a value, where its operator is this one."""
    step = steps.get(operand.name) if isinstance(operand, Of) else None
    return step if step is not None and step.operator == operator else None


def _bias(pairs: Biases) -> Array | None:
    """Add up biases of scores f[B,h,N,M], some of which come as [B/windows,windows,h,N,M]."""
    total: Array | None = None
    for bias, windows in pairs:
        axes = 4 if windows is None else 5
        bias = bias.reshape((1,) * (axes - bias.ndim) + bias.shape)
        if windows is not None and len(bias) == 1:
            bias = bias[0]
        elif windows is not None:
            bias = jnp.broadcast_to(bias, (len(bias), windows, *bias.shape[2:]))
            bias = bias.reshape(-1, *bias.shape[2:])
        total = bias if total is None else _sum(total, bias)
    return total


def _sum(a: Array, b: Array) -> Array:
    """Add up biases of which one may have fewer rows, that are those of each image's windows."""
    rows = max(len(a), len(b))
    a, b = (jnp.tile(x, (rows // len(x), 1, 1, 1)) if len(x) > 1 else x for x in (a, b))
    return a + b


def _attend(
    query: Array,
    key: Array,
    value: Array,
    biases: Biases,
    shapes: Sequence[Ints] | None,
    scale: float | None,
) -> Array:
    """Compute the attention of f[B,h,N,d], which may have to be repeated to have `shapes`."""
    parts = [query, key, value]
    if shapes is not None:
        parts = [jnp.broadcast_to(*each) for each in zip(parts, shapes, strict=True)]
    truths = [bias for bias, _ in biases if not jnp.issubdtype(bias.dtype, jnp.floating)]
    if truths or query.ndim != 4:
        plain = TABLE[_ATTENTION].plain
        assert plain is not None
        return plain(*parts, biases[0][0] if biases else None, 0.0, False, scale=scale)
    return attend(*parts, bias=_bias(biases), scale=scale)


def _attend_product(
    x: Array,
    sizes: Ints,
    biases: Biases,
    shapes: Sequence[Ints] | None,
    scale: float | None,
) -> Array:
    """Compute f[B,h,N,d] of the product f[B,N,3,h,d]."""
    parts = x.reshape(sizes)
    batch, tokens, _, heads, width = parts.shape
    product = parts.reshape(batch, tokens, -1)
    shape = batch, heads, tokens, width
    truths = [bias for bias, _ in biases if not jnp.issubdtype(bias.dtype, jnp.floating)]
    if truths or any(tuple(each) != shape for each in shapes or ()):
        query, key, value = attention.split(product, heads)
        return _attend(query, key, value, biases, shapes, scale)
    out = attention.self_attention(product, heads, bias=_bias(biases), scale=scale)
    return attention.swap(out.reshape(batch, tokens, heads, width))


KERNELS = {_ATTEND: OperatorRule(_attend), _ATTEND_PRODUCT: OperatorRule(_attend_product)}
