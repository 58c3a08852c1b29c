"""PyTorch operators that the package's own kernels compute in training.

A row returns None if its kernel does not support the operands; then the plain row computes them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.models.kernels import attention, batch_norms, convolutions, layers, pooling
from jaxrobust.models.kernels.primitives import add_bias, matmul, walled
from jaxrobust.pytorch.operators.products import ConvolutionSettings
from jaxrobust.pytorch.program import ChannelsLast, Ints, OperatorRule
from jaxrobust.types import Array


def _one(values: Ints, axes: int = 2) -> int | None:
    """Find the number shared by all axes, or None if they differ."""
    return values[0] if len(set(values)) == 1 and len(values) in (1, axes) else None


@jax.custom_vjp
def _taps_first(weight: Array) -> Array:
    """Transpose PyTorch's weights f[out,in,kh,kw] to f[kh,kw,in,out]."""
    # Two steps on CPU, each a fast loop in XLA, with barriers between them to prevent their fusion:
    # 2.2 ms for f[512,512,3,3] instead of 4.2 ms, and 2.7 ms backwards instead of 7.3 ms.
    return lax.platform_dependent(
        weight, cpu=_in_two_steps, default=lambda weight: jnp.transpose(weight, (2, 3, 1, 0))
    )


def _taps_last(kernel: Array) -> Array:
    return lax.platform_dependent(
        kernel, cpu=_back_in_two_steps, default=lambda kernel: jnp.transpose(kernel, (3, 2, 0, 1))
    )


def _in_two_steps(weight: Array) -> Array:
    outs, ins, *sides = weight.shape
    columns = _transposed(weight.reshape(outs, -1), axes=(1, 0)).reshape(ins, -1, outs)
    # One axis has only one layout. Otherwise XLA delays the move, and each reader of the result
    # makes its own copy.
    return _transposed(columns, axes=(1, 0, 2), flat=True).reshape(*sides, ins, outs)


def _back_in_two_steps(kernel: Array) -> Array:
    *sides, ins, outs = kernel.shape
    rows = _transposed(kernel.reshape(-1, outs), axes=(1, 0))
    return _transposed(rows.reshape(outs, -1, ins), axes=(0, 2, 1)).reshape(outs, ins, *sides)


@walled
def _transposed(x: Array, *, axes: tuple[int, ...], flat: bool = False) -> Array:
    turned = jnp.transpose(x, axes)
    return turned.reshape(-1) if flat else turned


_taps_first.defvjp(lambda weight: (_taps_first(weight), None), lambda _, g: (_taps_last(g),))


def _convolution(
    x: Array, weight: Array, bias: Array | None, *settings: Any
) -> ChannelsLast | None:
    stride, padding, dilation, transposed, _, groups = ConvolutionSettings(*settings)
    numbers = [_one(values) for values in (stride, padding, dilation)]
    square = x.ndim == 4 and weight.shape[2] == weight.shape[3]
    if transposed or not square or None in numbers or (groups > 1 and weight.shape[2] % 2 == 0):
        return None
    same: Any = dict(zip(("stride", "padding", "dilation"), numbers, strict=True))
    return ChannelsLast(convolutions.conv(x, _taps_first(weight), bias, **same, groups=groups))


def _layer_norm(x: Array, shape: Ints, weight: Any, bias: Any, eps: float) -> Any:
    if len(shape) != 1 or weight is None or bias is None:
        return None
    return layers.layer_norm(x, weight, bias, eps), None, None


def _batch_norm(
    x: Array, weight: Any, bias: Any, mean: Array, var: Array, momentum: float, eps: float
) -> Any:
    if weight is None or bias is None:
        return None
    return ChannelsLast(batch_norms.batch_norm(x, weight, bias, mean, var, eps=eps)), None, None


def _batch_norm_of_batch(
    x: Array,
    weight: Any,
    bias: Any,
    mean: Array,
    var: Array,
    train: bool,
    momentum: float,
    eps: float,
) -> Any:
    if weight is None or bias is None or x.size == x.shape[-1]:
        return None
    out, *statistics = batch_norms.batch_norm_train(x, weight, bias, eps=eps)
    moved = [
        (1 - momentum) * old + momentum * lax.stop_gradient(new).astype(old.dtype)
        for old, new in zip((mean, var), statistics, strict=True)
    ]
    return ChannelsLast(out), None, None, *moved


def _gelu(x: Array, approximate: str = "none") -> Array:
    return layers.gelu(x) if approximate == "none" else jax.nn.gelu(x, approximate=True)


def _addmm(bias: Array, x: Array, y: Array, beta: Any = 1, alpha: Any = 1) -> Array | None:
    return add_bias(matmul(x, y), bias) if beta == alpha == 1 and bias.ndim == 1 else None


def _max_pool(
    x: Array,
    kernel: Ints,
    stride: Ints = (),
    padding: Ints = (0,),
    dilation: Ints = (1,),
    ceil: bool = False,
) -> Any:
    side, step, pad, hole = (_one(n) if n else None for n in (kernel, stride, padding, dilation))
    if (side, step, hole) != (3, 2, 1) or pad not in (0, 1) or ceil or x.ndim != 4:
        return None
    return ChannelsLast(pooling.max_pool(x, pad)), None


def _attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array | None:
    """Compute the attention of f[B,h,N,d]; in bfloat16 the softmax is in float32."""
    if query.ndim != 4 or dropout_p or is_causal or enable_gqa:
        return None
    if mask is not None and not jnp.issubdtype(mask.dtype, jnp.floating):
        return None
    return attend(query, key, value, bias=mask, scale=scale)


def attend(query: Array, key: Array, value: Array, *, bias: Any, scale: Any) -> Array:
    """Compute the attention of f[B,h,N,d]; `bias` and `scale` as in `attention.attention`."""
    tokens = [*map(attention.swap, (query, key, value))]
    shape = tokens[0].shape
    if query.shape == key.shape == value.shape:
        product = jnp.stack(tokens, 2).reshape(*shape[:2], -1)
        out = attention.self_attention(product, shape[2], bias=bias, scale=scale)
    else:
        out = attention.attention(*tokens, bias=bias, scale=scale)
    return attention.swap(out.reshape(*shape[:3], -1))


KERNELS = {
    "aten.convolution.default": OperatorRule(None, _convolution),
    "aten.native_layer_norm.default": OperatorRule(_layer_norm),
    "aten._native_batch_norm_legit_no_training.default": OperatorRule(None, _batch_norm),
    "aten._native_batch_norm_legit_functional.default": OperatorRule(None, _batch_norm_of_batch),
    "aten.gelu.default": OperatorRule(_gelu, joins=True),
    "aten.addmm.default": OperatorRule(_addmm),
    "aten.mm.default": OperatorRule(matmul),
    "aten.scaled_dot_product_attention.default": OperatorRule(_attention),
    "aten.max_pool2d_with_indices.default": OperatorRule(None, _max_pool),
}
