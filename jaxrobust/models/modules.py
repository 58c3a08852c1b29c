"""NNX modules that hold the parameters of the functions in `layers.py`, named as in timm."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrobust.models import layers

normal_02 = jax.nn.initializers.normal(0.02)  # timm cuts at +-2, a hundred deviations out


def torch_uniform(fan_in: int):
    """PyTorch's default for convolutions and their biases: U(+-1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


class Conv(nnx.Module):
    """Convolution with bias, symmetric zero padding; [kh, kw, in, out] kernel.

    `torch_init` draws PyTorch's default instead of timm's normal(0.02) and zero bias: the
    ConvStems are created after timm's own initialisation.
    """

    def __init__(self, ins, outs, kernel, *, stride, padding=0, torch_init=False, rngs):
        shape = (kernel, kernel, ins, outs)
        draw = torch_uniform(kernel * kernel * ins) if torch_init else None
        self.kernel = nnx.Param((draw or normal_02)(rngs.params(), shape))
        self.bias = nnx.Param(draw(rngs.params(), (outs,)) if draw else jnp.zeros(outs))
        self.stride, self.padding = stride, padding

    def __call__(self, x):
        return layers.conv(
            x, self.kernel[...], self.bias[...], stride=self.stride, padding=self.padding
        )


class DepthwiseConv(nnx.Module):
    """Depthwise convolution with bias, stride 1, size kept; [k, k, 1, C] kernel."""

    def __init__(self, channels, kernel, *, rngs):
        self.kernel = nnx.Param(normal_02(rngs.params(), (kernel, kernel, 1, channels)))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x):
        return layers.depthwise_conv(x, self.kernel[...], self.bias[...])


class Linear(nnx.Module):
    """Affine map of the last axis; [in, out] kernel."""

    def __init__(self, ins, outs, *, rngs):
        self.kernel = nnx.Param(normal_02(rngs.params(), (ins, outs)))
        self.bias = nnx.Param(jnp.zeros(outs))

    def __call__(self, x):
        return layers.linear(x, self.kernel[...], self.bias[...])


class LayerNorm(nnx.Module):
    """Normalisation over channels, biased variance, eps 1e-6 (not torch's default 1e-5)."""

    def __init__(self, channels):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x):
        return layers.layer_norm(x, self.scale[...], self.bias[...], eps=1e-6)


class Gelu(nnx.Module):
    """Exact (erf) GELU; a module so that it keeps its slot in a stem's numbering."""

    def __call__(self, x):
        return layers.gelu(x)


class Normalize(nnx.Module):
    """(images - mean) / std: the network's first layer; belongs to its weights."""

    def __init__(self, channels):
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.std = nnx.BatchStat(jnp.ones(channels))

    def __call__(self, images):
        mean, std = (v[...].astype(images.dtype)[None, None, None] for v in (self.mean, self.std))
        return (images - mean) / std
