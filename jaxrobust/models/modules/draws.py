"""Random draws: of parameters, in a fixed order, and for training: stochastic depth (Huang et al.
2016, arXiv 1603.09382), which drops branches for single images, and dropout.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax

from jaxrobust.models.kernels import layers
from jaxrobust.types import Array

# (key, shape) -> array
Initializer = Callable[[Array, tuple[int, ...]], Array]


class Draws:
    """One key per draw: the part of `nnx.Rngs` that modules use; tracing that is quadratic."""

    def __init__(self, key: Array) -> None:
        self.key, self.drawn = key, 0

    def params(self) -> Array:
        self.drawn += 1
        return jax.random.fold_in(self.key, self.drawn - 1)


normal_02 = jax.nn.initializers.normal(0.02)  # timm truncates at +-2, a hundred standard deviations

fan_out = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He initialization


def torch_uniform(fan_in: int) -> Initializer:
    """Return PyTorch's default for linear maps, convolutions and biases: U(+-1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def torch_default(key: Array, shape: tuple[int, ...]) -> Array:
    """Draw a kernel [..., in, out] as PyTorch does by default."""
    return torch_uniform(math.prod(shape[:-1]))(key, shape)


def split(key: Array, number: int) -> Array:
    """Split into `number` keys; keys [B] of images become [number, B]."""
    if key.ndim:
        return jax.vmap(partial(jax.random.split, num=number), out_axes=1)(key)
    return jax.random.split(key, number)


class Drop(NamedTuple):
    """Stochastic depth of a block: its key, or keys [B], and the rate of dropped branches."""

    key: Array
    rate: Array | float


def branches(drop: Drop | None, number: int) -> Sequence[Callable[[Array], Array]]:
    """Build the stochastic depth for each branch of a block; draws are independent per image."""
    if drop is None:
        return (lambda y: y,) * number
    keys = split(drop.key, number)
    return [partial(layers.drop_path, key=key, rate=drop.rate) for key in keys]


def dropouts(
    drop: Drop | None, number: int, rate: float, *, paths: int
) -> Sequence[Callable[[Array], Array]]:
    """Build the dropout for each place in a block; draws differ between places.

    `paths`: number of branches, whose keys come first.
    """
    if drop is None or rate == 0:
        return (lambda x: x,) * number
    keys = split(drop.key, paths + number)[paths:]
    return [partial(layers.dropout, key=key, rate=rate) for key in keys]
