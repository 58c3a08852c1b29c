"""How parameters are drawn: keys in a fixed order, and the distributions beside JAX's own."""

import math
from collections.abc import Callable

import jax

from jaxrobust.types import Array

# (key, shape) -> array
Initializer = Callable[[Array, tuple[int, ...]], Array]


class Draws:
    """Keys, one for each draw: what modules use of `nnx.Rngs`, whose tracing is quadratic."""

    def __init__(self, key: Array) -> None:
        self.key, self.drawn = key, 0

    def params(self) -> Array:
        self.drawn += 1
        return jax.random.fold_in(self.key, self.drawn - 1)


normal_02 = jax.nn.initializers.normal(0.02)  # timm cuts at +-2, a hundred deviations out


def torch_uniform(fan_in: int) -> Initializer:
    """Return PyTorch's default for linear maps, convolutions and biases: U(+-1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
