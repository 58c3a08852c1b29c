"""ConvNeXt's depthwise convolution and LayerNorm, which TPUs compute as one kernel."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxrobust.models.kernels.depthwise import depthwise_conv
from jaxrobust.models.kernels.layers import layer_norm
from jaxrobust.models.kernels.tpu import calls
from jaxrobust.models.kernels.tpu import depthwise_norm as kernel

Array = jax.Array


def _plain_forward(x: Array, *parameters: Array, eps: float) -> list[Array]:
    taps, bias, scale, shift = parameters
    z = depthwise_conv(x, taps, bias)
    return [layer_norm(z, scale, shift, eps=eps), z]


def _plain_gradients(x, z, g, beside, *parameters, eps: float, needed: bool) -> list[Array]:
    """Compute the gradient for `x` and, where asked for, those of the parameters."""
    taps, bias, scale, shift = parameters
    norm = functools.partial(layer_norm, eps=eps)
    if not needed:
        (to_z,) = jax.vjp(lambda z: norm(z, scale, shift), z)[1](g)
        return [jax.vjp(lambda x: depthwise_conv(x, taps, bias), x)[1](to_z)[0] + beside]
    to_z, *of_norm = jax.vjp(norm, z, scale, shift)[1](g)
    to_x, *of_conv = jax.vjp(depthwise_conv, x, taps, bias)[1](to_z)
    return [to_x + beside, *of_conv, *of_norm]


def _kernel_gradients(x, z, g, beside, *parameters, eps: float, needed: bool) -> list[Array]:
    to_x = kernel.backward(z, g, beside, parameters[0], parameters[2], eps=eps)
    if not needed:
        return [to_x]
    return [to_x, *_plain_gradients(x, z, g, beside, *parameters, eps=eps, needed=True)[1:]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _depthwise_norm(eps: float, x: Array, *parameters: Array) -> tuple[Array, Array]:
    return _forward_rule(eps, x, *parameters)[0], x


def _forward_rule(eps, x, *parameters):
    return lax.platform_dependent(
        x,
        *parameters,
        tpu=functools.partial(kernel.forward, eps=eps),
        default=functools.partial(_plain_forward, eps=eps),
    )


def _forward(eps, x, *parameters):
    # Residuals hold arrays alone, so their structure tells the backward rule what is asked for.
    perturbed = () if any(p.perturbed for p in parameters) else None
    x, *values = (operand.value for operand in (x, *parameters))
    out, z = _forward_rule(eps, x, *values)
    return (out, x), (x, z, values, perturbed)


def _backward(eps, residuals, gradients):
    x, z, values, perturbed = residuals
    g, beside = (
        jnp.zeros(g.shape, g.dtype) if isinstance(g, SymbolicZero) else g for g in gradients
    )
    how = {"eps": eps, "needed": perturbed is not None}
    to_x, *of_parameters = lax.platform_dependent(
        *(x, z, g, beside, *values),
        tpu=functools.partial(_kernel_gradients, **how),
        default=functools.partial(_plain_gradients, **how),
    )
    return to_x, *(of_parameters or (None for _ in values))


_depthwise_norm.defvjp(_forward, _backward, symbolic_zeros=True)


def depthwise_norm(
    x: Array, taps: Array, bias: Array, scale: Array, shift: Array, *, eps: float = 1e-6
) -> tuple[Array, Array]:
    """Convolve f[B,H,W,C] depthwise with f[k,k,1,C] and normalise over channels; also return `x`.

    Whoever adds the result's branch to the returned `x` has both gradients added on the chip.
    """
    if calls.plain("a depthwise convolution with its norm", kernel.refused(x, taps)):
        return _plain_forward(x, taps, bias, scale, shift, eps=eps)[0], x
    return _depthwise_norm(eps, x, taps, bias, scale, shift)
