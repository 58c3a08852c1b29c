"""Norms of convolutional networks, all called as `norm(x, train)`: a row chooses one."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxrobust.models.kernels import layers
from jaxrobust.models.kernels.primitives import add_bias, widened
from jaxrobust.models.modules.basic import BatchNorm, LayerNorm
from jaxrobust.types import Array

GROUP = 8  # number of channels that a group norm normalizes together


def _standardised(x: Array, axes: tuple[int, ...], eps: float = 1e-5) -> Array:
    (wide,) = widened(x)
    centred = wide - wide.mean(axes, keepdims=True)
    variance = (centred * centred).mean(axes, keepdims=True)
    return (centred * lax.rsqrt(variance + eps)).astype(x.dtype)


class GroupNorm(nnx.Module):
    """Normalizes each image over its pixels and 8 channels, eps 1e-5, with scale and bias.

    `groups` sets the number of groups instead.
    """

    def __init__(self, channels: int, *, groups: int = 0) -> None:
        groups = groups or channels // GROUP
        if not groups or channels % groups:
            raise ValueError(
                f"norm='group': {channels} channels cannot form {groups} equal groups, one for "
                f"each {GROUP}; choose widths that make the norms' channels multiples of {GROUP}"
            )
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.groups = groups

    def __call__(self, x: Array, train: bool = False) -> Array:
        batch, height, width, channels = x.shape
        grouped = x.reshape(batch, height * width, self.groups, channels // self.groups)
        normal = _standardised(grouped, (1, 3)).reshape(x.shape)
        return add_bias(layers.scale(normal, self.scale[...]), self.bias[...])


class PixelNorm(LayerNorm):
    """Layer norm over the channels of each pixel, eps 1e-5."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-5)

    def __call__(self, x: Array, train: bool = False) -> Array:
        return super().__call__(x)


class InstanceNorm(nnx.Module):
    """Normalizes each channel over the pixels of each image, eps 1e-5; has no parameters."""

    def __call__(self, x: Array, train: bool) -> Array:
        return _standardised(x, (1, 2))


# name -> (channels, images per group of batch statistics, momentum) -> module
NORMS: dict[str, Callable[[int, int, float], Any]] = {
    "batch": lambda channels, group, momentum: BatchNorm(channels, group=group, momentum=momentum),
    "group": lambda channels, *_: GroupNorm(channels),
    "layer": lambda channels, *_: PixelNorm(channels),
    "instance": lambda *_: InstanceNorm(),
}
