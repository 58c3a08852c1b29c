"""A ConvNeXt block or its first half, and the layers between stages: one TPU kernel each.

On request, the second half of a block is one kernel of Hopper GPUs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrobust.models.kernels import cuda, layers, tpu
from jaxrobust.models.kernels.convolutions import conv
from jaxrobust.models.kernels.depthwise import depthwise_conv
from jaxrobust.models.kernels.layers import Path
from jaxrobust.models.kernels.primitives import takes_xla, with_gradient

Array = jax.Array


class BlockParameters(NamedTuple):
    """Parameters and layers of a block."""

    taps: Any  # f[k,k,1,C]; None, as the bias: for the MLP alone
    bias: Any  # f[C], for the convolution
    scale: Array  # f[C], for the norm
    shift: Array
    first: Array  # f[C,D]
    first_bias: Array  # f[D]
    second: Array  # f[D,C]
    second_bias: Array  # f[C]
    gamma: Any  # f[C]; None: no scale, accepted only by `convnext_block`

    def conv_dw(self, x: Array) -> Array:
        """Apply the depthwise convolution."""
        return depthwise_conv(x, self.taps, self.bias)

    def norm(self, z: Array, eps: float) -> Array:
        """Normalize over channels."""
        return layers.layer_norm(z, self.scale, self.shift, eps=eps)

    def mlp(self, y: Array) -> Array:
        """Apply the MLP without its last bias, which `residual` adds."""
        hidden = layers.product_gelu(layers.linear(y, self.first), self.first_bias)
        return layers.linear(hidden, self.second)

    def residual(self, x: Array, y: Array, path: Path | None) -> Array:
        """Compute `x + path(gamma * (y + bias))`."""
        return layers.residual(x, y, self.second_bias, self.gamma, path)

    def of_branch(self, second: Array, to_branch: Array) -> dict[str, Array]:
        """Compute gradients of the branch's end in float32.

        `second` f[D,C] sums the hidden layer times the result's gradient, and `to_branch` f[C]
        that gradient alone.
        """
        return {
            "second": second * self.gamma[None],
            "second_bias": to_branch * self.gamma,
            "gamma": (second * self.second).sum(0) + to_branch * self.second_bias,
        }


class HalvingParameters(NamedTuple):
    """Parameters of the norm and the convolution."""

    scale: Array  # f[C]
    shift: Array
    kernel: Array  # f[2,2,C,D]
    bias: Array  # f[D]


# --------------------------------------------------------------------------------- the first half


def _plain_norm(x: Array, *parameters: Array, eps: float) -> list[Array]:
    taps, bias, scale, shift = parameters
    z = depthwise_conv(x, taps, bias)
    return [layers.layer_norm(z, scale, shift, eps=eps), z]


def _plain_norm_gradients(x, z, g, to_residual, *parameters, eps: float, needed: bool):
    taps, bias, scale, shift = parameters
    norm = functools.partial(layers.layer_norm, eps=eps)
    if not needed:
        (to_z,) = jax.vjp(lambda z: norm(z, scale, shift), z)[1](g)
        return [jax.vjp(lambda x: depthwise_conv(x, taps, bias), x)[1](to_z)[0] + to_residual]
    to_z, *of_norm = jax.vjp(norm, z, scale, shift)[1](g)
    to_x, *of_conv = jax.vjp(depthwise_conv, x, taps, bias)[1](to_z)
    return [to_x + to_residual, *of_conv, *of_norm]


def _norm_kernel_gradients(x, z, g, to_residual, *parameters, eps: float, needed: bool):
    to_x = tpu.depthwise_norm.backward(z, g, to_residual, parameters[0], parameters[2], eps=eps)
    if not needed:
        return [to_x]
    operands = x, z, g, to_residual, *parameters
    return [to_x, *_plain_norm_gradients(*operands, eps=eps, needed=True)[1:]]


def _norm_forward(eps, x, parameters, needed):
    kernel = functools.partial(tpu.depthwise_norm.forward, eps=eps)
    plain = functools.partial(_plain_norm, eps=eps)
    y, z = lax.platform_dependent(x, *parameters, tpu=kernel, default=plain)
    return (y, x), (x, z)


def _norm_backward(eps, residuals, parameters, gradients, needed):
    rules = {"tpu": _norm_kernel_gradients, "default": _plain_norm_gradients}
    rules = {k: functools.partial(rule, eps=eps, needed=needed) for k, rule in rules.items()}
    to_x, *sums = lax.platform_dependent(*residuals, *gradients, *parameters, **rules)
    return to_x, tuple(sums) if needed else None


_depthwise_norm = with_gradient(_norm_forward, _norm_backward)


def depthwise_norm(
    x: Array, taps: Array, bias: Array, scale: Array, shift: Array, *, eps: float = 1e-6
) -> tuple[Array, Array]:
    """Convolve f[B,H,W,C] depthwise with f[k,k,1,C] and normalize over channels; also return `x`.

    Use the returned `x` for the residual: TPUs then sum both gradients on the chip.
    """
    parameters = taps, bias, scale, shift
    refused = tpu.depthwise_norm.refused(x, taps)
    if takes_xla("a depthwise convolution with its norm", refused):
        return _plain_norm(x, *parameters, eps=eps)[0], x
    return _depthwise_norm(eps, x, parameters)


# -------------------------------------------------------------------------------------- the block


def _plain_block(x: Array, share: Array | None, *parameters: Array, eps: float) -> Array:
    p = BlockParameters(*parameters)
    path = None if share is None else lambda y: y * share.astype(y.dtype)[:, None, None, None]
    return p.residual(x, p.mlp(p.norm(p.conv_dw(x), eps)), path)


def _block_forward(eps, inputs, p, needed):
    x, share = inputs
    out, *z = tpu.convnext_block.forward(x, share, p, eps=eps, keep=needed is not None)
    return out, (x if needed else None, *z, share)


def _block_backward(eps, residuals, p, g, needed):
    x, z, share = residuals
    to_share = None if share is None else jnp.zeros_like(share)  # a draw, so without a gradient
    to_x, sums = tpu.convnext_block.backward(x, z, g, share, p, eps=eps)
    return (to_x, to_share), sums


_block = with_gradient(_block_forward, _block_backward)


def _mlp_forward(eps, inputs, p, needed):
    z, x, share = inputs
    return cuda.convnext_mlp.forward(z, x, share, p, eps=eps), (z, share)


def _mlp_backward(eps, residuals, p, g, needed):
    z, share = residuals
    to_z, sums = cuda.convnext_mlp.backward(z, g, share, p, eps=eps, needed=needed)
    return (to_z, g, None if share is None else jnp.zeros_like(share)), sums


_mlp = with_gradient(_mlp_forward, _mlp_backward)


def _with_gamma(x: Array, p: BlockParameters) -> BlockParameters:
    return p._replace(gamma=jnp.ones(x.shape[3], x.dtype)) if p.gamma is None else p


def _share(x: Array, path: Path | None) -> Array | None:
    return None if path is None else path(jnp.ones(len(x), jnp.float32))


def convnext_block(
    x: Array, p: BlockParameters, path: Path | None = None, *, eps: float = 1e-6
) -> Array:
    """Compute `x + path(gamma * MLP(LN(depthwise(x))))` of f[B,H,W,C], with an exact GELU.

    Without `p.gamma` the branch is not scaled.
    """
    elsewhere = functools.partial(_block_elsewhere, path=path, eps=eps)
    if not cuda.hopper.takes(x, *p.first.shape):
        return elsewhere(x, p)

    def on_cuda(x, *parameters):
        p = BlockParameters(*parameters)
        inputs = p.conv_dw(x), x, _share(x, path)
        return _mlp(eps, inputs, p._replace(taps=None, bias=None))

    def default(x, *parameters):
        return elsewhere(x, BlockParameters(*parameters))

    return lax.platform_dependent(x, *_with_gamma(x, p), cuda=on_cuda, default=default)


def _block_elsewhere(x: Array, p: BlockParameters, path: Path | None, eps: float) -> Array:
    if takes_xla("a ConvNeXt block", tpu.convnext_block.refused(x, p)):
        y, x = depthwise_norm(x, p.taps, p.bias, p.scale, p.shift, eps=eps)
        return p.residual(x, p.mlp(y), path)
    share, p = _share(x, path), _with_gamma(x, p)

    def kernel(x, share, *parameters):
        return _block(eps, (x, share), BlockParameters(*parameters))

    plain = functools.partial(_plain_block, eps=eps)
    return lax.platform_dependent(x, share, *p, tpu=kernel, default=plain)


# ------------------------------------------------------------------------------ between stages


def _plain_halving(x: Array, *parameters: Array, stride: int, eps: float) -> Array:
    p = HalvingParameters(*parameters)
    return conv(layers.layer_norm(x, p.scale, p.shift, eps=eps), p.kernel, p.bias, stride=stride)


def _halving_forward(eps, x, p, needed):
    return tpu.norm_halving.forward(x, p, eps=eps), x


def _halving_backward(eps, x, p, g, needed):
    return tpu.norm_halving.backward(x, g, p, eps=eps, needed=needed)


_halving = with_gradient(_halving_forward, _halving_backward)


def norm_halving(x: Array, p: HalvingParameters, *, stride: int, eps: float = 1e-6) -> Array:
    """Normalize f[B,H,W,C] over channels and convolve without padding."""
    plain = functools.partial(_plain_halving, stride=stride, eps=eps)
    refused = tpu.norm_halving.refused(x, p, stride)
    if takes_xla("the downsampling between stages", refused):
        return plain(x, *p)

    def kernel(x, *parameters):
        return _halving(eps, x, HalvingParameters(*parameters))

    return lax.platform_dependent(x, *p, tpu=kernel, default=plain)
