"""Activations, and NNX modules that hold the parameters of `layers.py`, named as in timm."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrobust.models.kernels import batch_norms, convolutions, layers
from jaxrobust.models.kernels.primitives import add_bias
from jaxrobust.models.modules.draws import (
    Draws,
    Initializer,
    normal_02,
    torch_default,
    torch_uniform,
)
from jaxrobust.types import Array


def silu(x: Array) -> Array:
    """Compute `x * sigmoid(x)`."""
    return x * jax.nn.sigmoid(x)


def softplus(x: Array) -> Array:
    """Compute `log(1 + exp(x))`, and `x` itself above 20, as PyTorch does."""
    below = jnp.where(x > 20, 20, x)  # the unused branch needs a finite gradient too
    return jnp.where(x > 20, x, jnp.log1p(jnp.exp(below)))


def hard_swish(x: Array) -> Array:
    """Compute `x * min(max(x + 3, 0), 6) / 6`: 0 up to -3, `x` itself from 3 on."""
    inside = x * (jnp.clip(x, -3, 3) + 3) / 6
    return jnp.where(x <= -3, jnp.zeros_like(x), jnp.where(x >= 3, x, inside))


ACTIVATIONS = {
    "relu": layers.relu,
    "silu": silu,
    "softplus": softplus,
    "gelu": layers.gelu,
    "hard_swish": hard_swish,
}  # by the names used in rows and configs


def _affine(shape: tuple[int, ...], bias: bool, init: Initializer, rngs: Draws) -> tuple[Any, Any]:
    """Return a kernel [..., in, out] and a bias [out] or None; PyTorch's default draws both."""
    kernel = nnx.Param(init(rngs.params(), shape))
    if init is torch_default:
        drawn = torch_uniform(math.prod(shape[:-1]))(rngs.params(), shape[-1:])
    else:
        drawn = jnp.zeros(shape[-1])
    return kernel, nnx.Param(drawn) if bias else None


def _bias(module: Any) -> Array | None:
    return None if module.bias is None else module.bias[...]


class Conv(nnx.Module):
    """Convolution with symmetric zero padding; [kh, kw, in // groups, out] kernel.

    If `init` is `torch_default` the bias is drawn too, otherwise it is 0, as in stems created after
    timm's own initialization.
    """

    def __init__(
        self,
        ins: int,
        outs: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        dilation: int = 1,
        alone: bool = False,
        bias: bool = True,
        init: Initializer = normal_02,
        rngs: Draws,
    ) -> None:
        shape = (kernel, kernel, ins // groups, outs)
        self.kernel, self.bias = _affine(shape, bias, init, rngs)
        self.stride, self.padding = stride, padding
        self.groups, self.dilation, self.alone = groups, dilation, alone

    def __call__(self, x: Array) -> Array:
        return convolutions.conv(
            *(x, self.kernel[...], _bias(self)),
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
            dilation=self.dilation,
            alone=self.alone,
        )


class DepthwiseConv(Conv):
    """Depthwise convolution with bias, stride 1, size kept; [k, k, 1, C] kernel."""

    def __init__(self, channels: int, kernel: int, **options: Any) -> None:
        super().__init__(
            channels, channels, kernel, padding=kernel // 2, groups=channels, **options
        )


class Linear(nnx.Module):
    """Affine map of the last axis; [in, out] kernel."""

    def __init__(
        self, ins: int, outs: int, *, bias: bool = True, init: Initializer = normal_02, rngs: Draws
    ) -> None:
        self.kernel, self.bias = _affine((ins, outs), bias, init, rngs)

    def __call__(self, x: Array) -> Array:
        return layers.linear(x, self.kernel[...], _bias(self))


class Mlp(nnx.Module):
    """Linear to four times the width, exact GELU, linear back."""

    def __init__(self, dim: int, rngs: Draws) -> None:
        self.fc1 = Linear(dim, 4 * dim, rngs=rngs)
        self.fc2 = Linear(4 * dim, dim, rngs=rngs)

    def inner(self, x: Array) -> Array:
        """Compute the input of the second linear map."""
        return layers.product_gelu(layers.linear(x, self.fc1.kernel[...]), self.fc1.bias[...])

    def hidden(self, x: Array) -> Array:
        """Return the output without its last bias, which is fused later to save a pass."""
        return layers.linear(self.inner(x), self.fc2.kernel[...])

    def __call__(self, x: Array) -> Array:
        return add_bias(self.hidden(x), self.fc2.bias[...])


class LayerNorm(nnx.Module):
    """Normalization over channels, biased variance, eps 1e-6 (not torch's default 1e-5)."""

    def __init__(self, channels: int, *, eps: float = 1e-6) -> None:
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return layers.layer_norm(x, self.scale[...], self.bias[...], eps=self.eps)

    def with_tokens(self, x: Array) -> tuple[Array, Array]:
        """Normalize tokens f[B,N,C]; also return the tokens for the residual that follows."""
        return layers.norm_and_tokens(x, self.scale[...], self.bias[...], eps=self.eps)


def residual(x: Array, norm: LayerNorm, branch: Callable[[Array], Array]) -> Array:
    """Compute `x + branch(norm(x))`; on TPUs the norm's kernel sums both gradients of `x`."""
    y, x = norm.with_tokens(x)
    return x + branch(y)


class BatchNorm(nnx.Module):
    """Normalizes each channel over images and pixels, eps 1e-5.

    In training it uses the statistics of `group` consecutive images (0: the whole batch), and the
    running ones move towards them by `momentum` (torch's definition); otherwise it uses the running
    ones. Without `affine` it has no scale and bias.
    """

    def __init__(
        self, channels: int, *, group: int = 0, momentum: float = 0.1, affine: bool = True
    ) -> None:
        self.scale = nnx.Param(jnp.ones(channels)) if affine else None
        self.bias = nnx.Param(jnp.zeros(channels)) if affine else None
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.var = nnx.BatchStat(jnp.ones(channels))
        self.group, self.momentum = group, momentum

    def __call__(self, x: Array, train: bool) -> Array:
        scale = jnp.ones(x.shape[-1], x.dtype) if self.scale is None else self.scale[...]
        bias = jnp.zeros(x.shape[-1], x.dtype) if self.bias is None else self.bias[...]
        if not train:
            return batch_norms.batch_norm(x, scale, bias, self.mean[...], self.var[...])
        out, mean, var = batch_norms.batch_norm_train(x, scale, bias, group=self.group)
        self.move(mean, var)
        return out

    def move(self, mean: Array, var: Array) -> None:
        """Move the running statistics towards the images' statistics f[C]."""
        for running, new in ((self.mean, mean), (self.var, var)):
            old = running[...]
            moved = self.momentum * jax.lax.stop_gradient(new).astype(old.dtype)
            # Avoids multiplying by zero, which would keep non-finite values.
            running[...] = moved if self.momentum == 1 else (1 - self.momentum) * old + moved


class Gelu(nnx.Module):
    """Exact (erf) GELU, as a module so that it keeps its number in a stem."""

    def __call__(self, x: Array) -> Array:
        return layers.gelu(x)


class Normalize(nnx.Module):
    """(images - mean) / std: the network's first layer, part of its weights."""

    def __init__(self, channels: int) -> None:
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.std = nnx.BatchStat(jnp.ones(channels))

    def __call__(self, images: Array) -> Array:
        mean, std = (v[...].astype(images.dtype)[None, None, None] for v in (self.mean, self.std))
        return (images - mean) / std
