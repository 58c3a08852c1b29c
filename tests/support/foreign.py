"""Networks that are not the package's, in a file of a user's."""

from pathlib import Path

# Batch norm, dropout, a plain array and a setting: what a module may have.
NETS = '''
import jax
import jax.numpy as jnp
from flax import nnx

from jaxrobust.types import Classifier


class Block(nnx.Module):
    def __init__(self, ins, outs, rate, rngs):
        self.conv = nnx.Conv(ins, outs, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(outs, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.drop(nnx.gelu(self.norm(self.conv(x))))


class Net(nnx.Module):
    def __init__(self, num_classes, in_channels, *, width=16, rate=0.1, rngs):
        self.mean = jnp.full((1, 1, 1, in_channels), 0.5)
        self.blocks = nnx.List(
            [Block(in_channels, width, rate, rngs), Block(width, width, rate, rngs)]
        )
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, x):
        x = x - self.mean
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def make(num_classes, in_channels, *, width=16, rate=0.1, rngs):
    return Net(num_classes, in_channels, width=width, rate=rate, rngs=rngs)


def linear(num_classes, image_size, in_channels):
    """A pair of functions."""
    width = image_size * image_size * in_channels

    def init(key):
        return {"kernel": 0.1 * jax.random.normal(key, (width, num_classes))}, {}

    def apply(params, stats, images, *, train=False, key=None):
        return images.reshape(images.shape[0], -1) @ params["kernel"], stats

    return Classifier(init, apply)
'''


def written(folder: Path) -> Path:
    path = folder / "my_nets.py"
    path.write_text(NETS)
    return path
