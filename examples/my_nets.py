"""Your own networks, for `jaxrobust train` and `jaxrobust evaluate`.

jaxrobust train --config examples/my_config.py
jaxrobust evaluate --workdir runs/my_config --n 100

The package calls the function with those of `num_classes`, `image_size`, `in_channels`, `dtype`,
`remat` and `rngs` that it accepts, and with the config's `model.options`.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import linen, nnx, traverse_util

from jaxrobust.types import Classifier


class Block(nnx.Module):
    """Convolution with stride 2, batch norm, GELU and dropout."""

    def __init__(self, ins: int, outs: int, dtype: str, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(ins, outs, (3, 3), strides=2, dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(outs, dtype=dtype, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return f[B,H/2,W/2,outs]."""
        return self.drop(nnx.gelu(self.norm(self.conv(x))))


class ConvNet(nnx.Module):
    """Maps images f32[B,H,W,C] in [0, 1] to logits; normalization is part of the network."""

    def __init__(self, num_classes: int, in_channels: int, width: int, dtype: str, rngs: nnx.Rngs):
        widths = (in_channels, width, 2 * width, 4 * width)
        self.blocks = nnx.List(
            [Block(ins, outs, dtype, rngs) for ins, outs in itertools.pairwise(widths)]
        )
        self.head = nnx.Linear(widths[-1], num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits f[B,num_classes]; the package sets the modes of dropout and batch norm."""
        x = 4 * x - 2
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def make(
    num_classes: int, in_channels: int, dtype: str, *, width: int = 32, rngs: nnx.Rngs
) -> nnx.Module:
    """Return the network; `rngs`, and thus the run's seed, determine its initial weights."""
    return ConvNet(num_classes, in_channels, width, dtype, rngs)


class Mlp(linen.Module):
    """An MLP in Linen, with two layers on all pixels."""

    num_classes: int
    width: int

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits f[B,num_classes]."""
        x = linen.gelu(linen.Dense(self.width)(4 * x.reshape(len(x), -1) - 2))
        return linen.Dense(self.num_classes)(x)


def make_linen(
    num_classes: int, image_size: int, in_channels: int, *, width: int = 256
) -> Classifier:
    """Return a network from another library as two functions of flat dicts of arrays."""
    net = Mlp(num_classes, width)
    image = jnp.zeros((1, image_size, image_size, in_channels))

    def init(key):
        return traverse_util.flatten_dict(net.init(key, image)["params"], sep="."), {}

    def apply(params, stats, images, *, train=False, key=None):
        # Batch norms would read `stats` and, with train=True, return new ones.
        return net.apply({"params": traverse_util.unflatten_dict(params, sep=".")}, images), stats

    return Classifier(init, apply)
