"""Convolutions and products of matrices."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.pytorch.program import ChannelsLast, Ints, OperatorRule
from jaxrobust.types import Array


def _convolution(
    x: Array,
    weight: Array,
    bias: Array | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    transposed: bool,
    output_padding: Ints,
    groups: int,
) -> ChannelsLast:
    """Return the convolution of [B,sides...,in] with PyTorch's weight [out,in/groups,taps...]."""
    sides = x.ndim - 2
    taps = weight.shape[2:]
    steps, pads, holes, more = (
        tuple(value) * (sides if len(value) == 1 else 1)
        for value in (stride, padding, dilation, output_padding)
    )
    spread = (1,) * sides
    if transposed:  # the gradient of a convolution: its weight is [in,out/groups,taps...]
        weight = jnp.flip(weight, range(2, weight.ndim))
        weight = weight.reshape(groups, -1, *weight.shape[1:]).swapaxes(1, 2)
        weight = weight.reshape(-1, *weight.shape[2:])
        reach = [hole * (tap - 1) for hole, tap in zip(holes, taps, strict=True)]
        around = [(r - p, r - p + m) for r, p, m in zip(reach, pads, more, strict=True)]
        steps, spread = spread, steps
    else:
        around = [(pad, pad) for pad in pads]
    kernel = jnp.moveaxis(weight, (0, 1), (-1, -2))
    names = "DHW"[-sides:]
    out = lax.conv_general_dilated(
        x,
        kernel,
        window_strides=steps,
        padding=around,
        lhs_dilation=spread,
        rhs_dilation=holes,
        dimension_numbers=(f"N{names}C", f"{names}IO", f"N{names}C"),
        feature_group_count=groups,
    )
    return ChannelsLast(out if bias is None else out + bias)


def _addmm(bias: Array, x: Array, y: Array, beta: Any = 1, alpha: Any = 1) -> Array:
    product = x @ y
    return (bias if beta == 1 else beta * bias) + (product if alpha == 1 else alpha * product)


def _attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    """Return attention of [..., L, E] to [..., S, E]; a row that sees nothing is zero."""
    assert not dropout_p, "a module in eval mode"
    if enable_gqa:  # several queries share a key
        key, value = (jnp.repeat(a, query.shape[-3] // a.shape[-3], -3) for a in (key, value))
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
    if is_causal:
        mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    if mask is None:
        return jax.nn.softmax(scores, axis=-1) @ value
    if mask.dtype != bool:
        return jax.nn.softmax(scores + mask, axis=-1) @ value
    shares = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return jnp.where(mask, shares, 0) @ value


TABLE = {
    "aten.convolution.default": OperatorRule(None, _convolution),
    "aten.mm.default": OperatorRule(jnp.matmul),
    "aten.bmm.default": OperatorRule(jnp.matmul),
    "aten.addmm.default": OperatorRule(_addmm),
    "aten.scaled_dot_product_attention.default": OperatorRule(_attention),
}
