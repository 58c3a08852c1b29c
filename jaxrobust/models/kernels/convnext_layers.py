"""A block of ConvNeXt or its first half, and what is between stages: one kernel each on TPUs."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.models.kernels import layers, tpu
from jaxrobust.models.kernels.convolutions import conv
from jaxrobust.models.kernels.depthwise import depthwise_conv
from jaxrobust.models.kernels.primitives import add_bias, as_array, asked_for, rounded

Array = jax.Array
Path = Callable[[Array], Array]  # what stochastic depth makes of a branch f[B,..]


class BlockParameters(NamedTuple):
    """Parameters of a block."""

    taps: Array  # f[k,k,1,C]
    bias: Array  # f[C], of the convolution
    scale: Array  # f[C], of the norm
    shift: Array
    first: Array  # f[C,D]
    first_bias: Array  # f[D]
    second: Array  # f[D,C]
    second_bias: Array  # f[C]
    gamma: Any  # f[C]; None, which `convnext_block` alone takes: no scale


class HalvingParameters(NamedTuple):
    """Parameters of the norm and of the convolution."""

    scale: Array  # f[C]
    shift: Array
    kernel: Array  # f[2,2,C,D]
    bias: Array  # f[D]


# --------------------------------------------------------------------------------- the first half


def _plain_norm(x: Array, *parameters: Array, eps: float) -> list[Array]:
    taps, bias, scale, shift = parameters
    z = depthwise_conv(x, taps, bias)
    return [layers.layer_norm(z, scale, shift, eps=eps), z]


def _plain_norm_gradients(x, z, g, beside, *parameters, eps: float, needed: bool) -> list[Array]:
    taps, bias, scale, shift = parameters
    norm = functools.partial(layers.layer_norm, eps=eps)
    if not needed:
        (to_z,) = jax.vjp(lambda z: norm(z, scale, shift), z)[1](g)
        return [jax.vjp(lambda x: depthwise_conv(x, taps, bias), x)[1](to_z)[0] + beside]
    to_z, *of_norm = jax.vjp(norm, z, scale, shift)[1](g)
    to_x, *of_conv = jax.vjp(depthwise_conv, x, taps, bias)[1](to_z)
    return [to_x + beside, *of_conv, *of_norm]


def _norm_kernel_gradients(x, z, g, beside, *parameters, eps: float, needed: bool) -> list[Array]:
    to_x = tpu.depthwise_norm.backward(z, g, beside, parameters[0], parameters[2], eps=eps)
    if not needed:
        return [to_x]
    return [to_x, *_plain_norm_gradients(x, z, g, beside, *parameters, eps=eps, needed=True)[1:]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _depthwise_norm(eps: float, x: Array, *parameters: Array) -> tuple[Array, Array]:
    return _norm_rule(eps, x, *parameters)[0], x


def _norm_rule(eps, x, *parameters):
    return lax.platform_dependent(
        x,
        *parameters,
        tpu=functools.partial(tpu.depthwise_norm.forward, eps=eps),
        default=functools.partial(_plain_norm, eps=eps),
    )


def _norm_forward(eps, x, *parameters):
    perturbed = asked_for(parameters)
    x, *values = (operand.value for operand in (x, *parameters))
    out, z = _norm_rule(eps, x, *values)
    return (out, x), (x, z, values, perturbed)


def _norm_backward(eps, residuals, gradients):
    x, z, values, perturbed = residuals
    g, beside = map(as_array, gradients)
    how = {"eps": eps, "needed": perturbed is not None}
    to_x, *of_parameters = lax.platform_dependent(
        *(x, z, g, beside, *values),
        tpu=functools.partial(_norm_kernel_gradients, **how),
        default=functools.partial(_plain_norm_gradients, **how),
    )
    return to_x, *(of_parameters or (None for _ in values))


_depthwise_norm.defvjp(_norm_forward, _norm_backward, symbolic_zeros=True)


def depthwise_norm(
    x: Array, taps: Array, bias: Array, scale: Array, shift: Array, *, eps: float = 1e-6
) -> tuple[Array, Array]:
    """Convolve f[B,H,W,C] depthwise with f[k,k,1,C] and normalise over channels; also return `x`.

    Whoever adds the result's branch to the returned `x` has both gradients added on the chip.
    """
    if tpu.calls.plain(
        "a depthwise convolution with its norm", tpu.depthwise_norm.refused(x, taps)
    ):
        return _plain_norm(x, taps, bias, scale, shift, eps=eps)[0], x
    return _depthwise_norm(eps, x, taps, bias, scale, shift)


# -------------------------------------------------------------------------------------- the block


def _add_branch(x: Array, y: Array, p: BlockParameters, path: Path | None) -> Array:
    hidden = layers.gelu(layers.linear(y, p.first), p.first_bias)
    y = layers.linear(hidden, p.second)
    if p.gamma is None:
        y = add_bias(y, p.second_bias)
        return x + (y if path is None else path(y))
    if path is None:
        return layers.scaled_residual(x, y, p.second_bias, p.gamma)
    return x + path(layers.scaled_residual(jnp.zeros_like(x), y, p.second_bias, p.gamma))


def _plain_block(x: Array, share: Array | None, *parameters: Array, eps: float) -> Array:
    p = BlockParameters(*parameters)
    y = layers.layer_norm(depthwise_conv(x, p.taps, p.bias), p.scale, p.shift, eps=eps)
    if share is None:
        return _add_branch(x, y, p, None)
    return _add_branch(x, y, p, lambda y: y * share.astype(y.dtype)[:, None, None, None])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(eps: float, x: Array, share: Array | None, *parameters: Array) -> Array:
    p = BlockParameters(*parameters)
    return tpu.convnext_block.forward(x, share, p, eps=eps, keep=False)[0]


def _block_forward(eps, x, share, *parameters):
    perturbed = asked_for(parameters)
    share = None if share is None else share.value
    values = BlockParameters(*(p.value for p in parameters))
    out, z = tpu.convnext_block.forward(x.value, share, values, eps=eps)
    return out, (None if perturbed is None else x.value, z, share, values)


def _block_backward(eps, residuals, g):
    x, z, share, p = residuals
    g = as_array(g)
    to_share = None if share is None else jnp.zeros_like(share)  # a draw, which has no gradient
    if x is None:
        return tpu.convnext_block.backward(z, g, share, p, eps=eps), to_share, *(None for _ in p)
    to_x, sums = tpu.convnext_block.all_gradients(x, z, g, share, p, eps=eps)
    return to_x, to_share, *(rounded(s, a.dtype) for s, a in zip(sums, p, strict=True))


_block.defvjp(_block_forward, _block_backward, symbolic_zeros=True)


def convnext_block(
    x: Array, p: BlockParameters, path: Path | None = None, *, eps: float = 1e-6
) -> Array:
    """Compute `x + path(gamma * MLP(LN(depthwise(x))))` of f[B,H,W,C], with an exact GELU.

    Without `p.gamma` the branch is added as it is.
    """
    if tpu.calls.plain("a block of ConvNeXt", tpu.convnext_block.refused(x, p)):
        y, x = depthwise_norm(x, p.taps, p.bias, p.scale, p.shift, eps=eps)
        return _add_branch(x, y, p, path)
    share = None if path is None else path(jnp.ones(len(x), jnp.float32))
    if p.gamma is None:
        p = p._replace(gamma=jnp.ones(x.shape[3], x.dtype))
    return lax.platform_dependent(
        x,
        share,
        *p,
        tpu=functools.partial(_block, eps),
        default=functools.partial(_plain_block, eps=eps),
    )


# ------------------------------------------------------------------------------ between stages


def _plain_halving(x: Array, *parameters: Array, stride: int, eps: float) -> Array:
    p = HalvingParameters(*parameters)
    return conv(layers.layer_norm(x, p.scale, p.shift, eps=eps), p.kernel, p.bias, stride=stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _halving(eps: float, x: Array, *parameters: Array) -> Array:
    return tpu.norm_halving.forward(x, HalvingParameters(*parameters), eps=eps)


def _halving_forward(eps, x, *parameters):
    perturbed = asked_for(parameters)
    p = HalvingParameters(*(p.value for p in parameters))
    return tpu.norm_halving.forward(x.value, p, eps=eps), (x.value, p, perturbed)


def _halving_backward(eps, residuals, g):
    x, p, perturbed = residuals
    g = as_array(g)
    if perturbed is None:
        return tpu.norm_halving.backward(x, g, p, eps=eps), *(None for _ in p)
    to_x, sums = tpu.norm_halving.all_gradients(x, g, p, eps=eps)
    return to_x, *(rounded(s, a.dtype) for s, a in zip(sums, p, strict=True))


_halving.defvjp(_halving_forward, _halving_backward, symbolic_zeros=True)


def norm_halving(x: Array, p: HalvingParameters, *, stride: int, eps: float = 1e-6) -> Array:
    """Normalise f[B,H,W,C] over channels and convolve it without padding."""
    plain = functools.partial(_plain_halving, stride=stride, eps=eps)
    if tpu.calls.plain("what stands between stages", tpu.norm_halving.refused(x, p, stride)):
        return plain(x, *p)
    return lax.platform_dependent(x, *p, tpu=functools.partial(_halving, eps), default=plain)
