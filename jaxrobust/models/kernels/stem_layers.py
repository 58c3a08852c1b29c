"""A ConvStem's first two convolutions, norms and GELUs, which TPUs compute as one kernel."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxrobust.models.kernels.convolutions import conv
from jaxrobust.models.kernels.layers import gelu, layer_norm
from jaxrobust.models.kernels.primitives import rounded
from jaxrobust.models.kernels.tpu import calls
from jaxrobust.models.kernels.tpu import conv_stem as kernel

Array = jax.Array
LAYERS, EACH = 2, 4  # parameters: kernel and bias of the convolution, scale and shift of the norm


def _plain(x: Array, *parameters: Array, eps: float) -> Array:
    for i in range(0, LAYERS * EACH, EACH):
        taps, bias, scale, shift = parameters[i : i + EACH]
        x = conv(x, taps, bias, stride=2, padding=1)
        x = gelu(layer_norm(x, scale, shift, eps=eps))
    return x


def _planes(x: Array) -> Array:
    return x.transpose(0, 3, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stem_kernel(eps: float, x: Array, *parameters: Array) -> Array:
    return kernel.forward(_planes(x), *parameters, eps=eps)[0]


def _stem_kernel_forward(eps, x, *parameters):
    # Residuals hold arrays alone, so their structure tells the backward rule what is asked for.
    perturbed = () if any(p.perturbed for p in parameters) else None
    x, *values = (operand.value for operand in (x, *parameters))
    out, kept = kernel.forward(_planes(x), *values, eps=eps)
    return out, (x, kept, values, perturbed)


def _stem_kernel_backward(eps, residuals, g):
    x, kept, values, perturbed = residuals
    if isinstance(g, SymbolicZero):
        g = jnp.zeros(g.shape, g.dtype)
    to_planes = kernel.backward(_planes(x), kept, g, *values, eps=eps)
    of_parameters: tuple = (None,) * len(values)
    if perturbed is not None:
        sums = kernel.parameter_gradients(_planes(x), kept, g, *values, eps=eps)
        of_parameters = tuple(rounded(s, p.dtype) for s, p in zip(sums, values, strict=True))
    return to_planes.transpose(0, 2, 3, 1), *of_parameters


_stem_kernel.defvjp(_stem_kernel_forward, _stem_kernel_backward, symbolic_zeros=True)


def stem_layers(x: Array, *parameters: Array, eps: float = 1e-6) -> Array:
    """Compute two layers of a ConvStem: f[B,H,W,3] becomes f[B,H/4,W/4,D].

    Args:
      x: normalised images.
      *parameters: of each layer the kernel f[3,3,in,out] and the bias of the convolution, which
        has stride 2 and padding 1, and scale and shift of the norm; an exact GELU follows.
      eps: of the norms.
    """
    if calls.plain("a ConvStem", kernel.refused(x, *parameters)):
        return _plain(x, *parameters, eps=eps)
    return lax.platform_dependent(
        x,
        *parameters,
        tpu=functools.partial(_stem_kernel, eps),
        default=functools.partial(_plain, eps=eps),
    )
