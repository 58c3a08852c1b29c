"""The inputs of a network: parameters in the compute type, images in [0, 1]."""

import jax.numpy as jnp
from jaxtyping import Float, UInt8

from jaxrobust.types import Array, Params


def unit_range(
    images: Float[Array, "*pixels"] | UInt8[Array, "*pixels"],
) -> Float[Array, "*pixels"]:
    """Turn uint8 into f32 in [0, 1], bit for bit as ToTensor does; floats are unchanged."""
    if images.dtype != jnp.uint8:
        return images
    # XLA divides by a constant by multiplying with its rounded reciprocal: wrong for 126 of 256
    # values. 1/255 is 257/65536 plus a rest. The first product is exact, so only the sum rounds.
    wide = images.astype(jnp.float32)
    return wide * (257 / 65536) + wide * (1 / 255 / 65536)


def cast(params: Params, dtype: jnp.dtype) -> Params:
    """Cast the parameters to the compute type; do this once, outside an attack's loop."""
    return {name: array.astype(dtype) for name, array in params.items()}
