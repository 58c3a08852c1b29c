"""ConvNeXt's LayerNorm and 2x2 convolution between stages, which TPUs compute as one kernel."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxrobust.models.kernels.convolutions import conv
from jaxrobust.models.kernels.layers import layer_norm
from jaxrobust.models.kernels.primitives import rounded
from jaxrobust.models.kernels.tpu import calls
from jaxrobust.models.kernels.tpu import norm_halving as kernel
from jaxrobust.models.kernels.tpu.norm_halving import HalvingParameters

Array = jax.Array


def _plain(x: Array, *parameters: Array, stride: int, eps: float) -> Array:
    p = HalvingParameters(*parameters)
    return conv(layer_norm(x, p.scale, p.shift, eps=eps), p.kernel, p.bias, stride=stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _halving(eps: float, x: Array, *parameters: Array) -> Array:
    return kernel.forward(x, HalvingParameters(*parameters), eps=eps)


def _forward(eps, x, *parameters):
    # Residuals hold arrays alone, so their structure tells the backward rule what is asked for.
    perturbed = () if any(p.perturbed for p in parameters) else None
    p = HalvingParameters(*(p.value for p in parameters))
    return kernel.forward(x.value, p, eps=eps), (x.value, p, perturbed)


def _backward(eps, residuals, g):
    x, p, perturbed = residuals
    if isinstance(g, SymbolicZero):
        g = jnp.zeros(g.shape, g.dtype)
    if perturbed is None:
        return kernel.backward(x, g, p, eps=eps), *(None for _ in p)
    to_x, sums = kernel.all_gradients(x, g, p, eps=eps)
    return to_x, *(rounded(s, a.dtype) for s, a in zip(sums, p, strict=True))


_halving.defvjp(_forward, _backward, symbolic_zeros=True)


def norm_halving(x: Array, p: HalvingParameters, *, stride: int, eps: float = 1e-6) -> Array:
    """Normalise f[B,H,W,C] over channels and convolve it without padding."""
    plain = functools.partial(_plain, stride=stride, eps=eps)
    if calls.plain("what stands between stages", kernel.refused(x, p, stride)):
        return plain(x, *p)
    return lax.platform_dependent(x, *p, tpu=functools.partial(_halving, eps), default=plain)
