"""A block of ConvNeXt, and what stands between stages, which TPUs compute as one kernel each."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxrobust.models.kernels import layers
from jaxrobust.models.kernels.convolutions import conv
from jaxrobust.models.kernels.depthwise import depthwise_conv
from jaxrobust.models.kernels.normed_depthwise import depthwise_norm
from jaxrobust.models.kernels.primitives import add_bias, rounded
from jaxrobust.models.kernels.tpu import calls
from jaxrobust.models.kernels.tpu import convnext_block as block_kernel
from jaxrobust.models.kernels.tpu import norm_halving as halving_kernel
from jaxrobust.models.kernels.tpu.convnext_block import BlockParameters
from jaxrobust.models.kernels.tpu.norm_halving import HalvingParameters

Array = jax.Array
Path = Callable[[Array], Array]  # what stochastic depth makes of a branch f[B,..]


def _add_branch(x: Array, y: Array, p: BlockParameters, path: Path | None) -> Array:
    """Compute `x + gamma * MLP(y)`."""
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
    return block_kernel.forward(x, share, BlockParameters(*parameters), eps=eps, keep=False)[0]


def _block_forward(eps, x, share, *parameters):
    # Residuals hold arrays alone, so their structure tells the backward rule what is asked for.
    perturbed = () if any(p.perturbed for p in parameters) else None
    share = None if share is None else share.value
    values = BlockParameters(*(p.value for p in parameters))
    out, z = block_kernel.forward(x.value, share, values, eps=eps)
    return out, (None if perturbed is None else x.value, z, share, values)


def _block_backward(eps, residuals, g):
    x, z, share, p = residuals
    if isinstance(g, SymbolicZero):
        g = jnp.zeros(g.shape, g.dtype)
    to_share = None if share is None else jnp.zeros_like(share)  # a draw, which has no gradient
    if x is None:
        return block_kernel.backward(z, g, share, p, eps=eps), to_share, *(None for _ in p)
    to_x, sums = block_kernel.all_gradients(x, z, g, share, p, eps=eps)
    return to_x, to_share, *(rounded(s, a.dtype) for s, a in zip(sums, p, strict=True))


_block.defvjp(_block_forward, _block_backward, symbolic_zeros=True)


def convnext_block(
    x: Array, p: BlockParameters, path: Path | None = None, *, eps: float = 1e-6
) -> Array:
    """Compute `x + path(gamma * MLP(LN(depthwise(x))))` of f[B,H,W,C], with an exact GELU.

    Without `p.gamma` the branch is added as it is.
    """
    if calls.plain("a block of ConvNeXt", block_kernel.refused(x, p)):
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
    return halving_kernel.forward(x, HalvingParameters(*parameters), eps=eps)


def _halving_forward(eps, x, *parameters):
    # Residuals hold arrays alone, so their structure tells the backward rule what is asked for.
    perturbed = () if any(p.perturbed for p in parameters) else None
    p = HalvingParameters(*(p.value for p in parameters))
    return halving_kernel.forward(x.value, p, eps=eps), (x.value, p, perturbed)


def _halving_backward(eps, residuals, g):
    x, p, perturbed = residuals
    if isinstance(g, SymbolicZero):
        g = jnp.zeros(g.shape, g.dtype)
    if perturbed is None:
        return halving_kernel.backward(x, g, p, eps=eps), *(None for _ in p)
    to_x, sums = halving_kernel.all_gradients(x, g, p, eps=eps)
    return to_x, *(rounded(s, a.dtype) for s, a in zip(sums, p, strict=True))


_halving.defvjp(_halving_forward, _halving_backward, symbolic_zeros=True)


def norm_halving(x: Array, p: HalvingParameters, *, stride: int, eps: float = 1e-6) -> Array:
    """Normalise f[B,H,W,C] over channels and convolve it without padding."""
    plain = functools.partial(_plain_halving, stride=stride, eps=eps)
    if calls.plain("what stands between stages", halving_kernel.refused(x, p, stride)):
        return plain(x, *p)
    return lax.platform_dependent(x, *p, tpu=functools.partial(_halving, eps), default=plain)
