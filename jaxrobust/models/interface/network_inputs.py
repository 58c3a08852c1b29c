"""What a network is given: parameters in the compute type, images in [0, 1]."""

import jax.numpy as jnp
from jaxtyping import Float, UInt8

from jaxrobust.types import Array, Params


def unit_range(
    images: Float[Array, "*pixels"] | UInt8[Array, "*pixels"],
) -> Float[Array, "*pixels"]:
    """Turn uint8 into f32 in [0, 1], to the bit what ToTensor gives; floats stay as they are."""
    if images.dtype != jnp.uint8:
        return images
    # XLA divides by a constant with its rounded reciprocal, which is off for 126 of 256 values.
    # 1/255 is 257/65536 plus the rest: the first product is exact, so only the sum rounds.
    wide = images.astype(jnp.float32)
    return wide * (257 / 65536) + wide * (1 / 255 / 65536)


def cast(params: Params, dtype: jnp.dtype) -> Params:
    """Return the parameters in the compute type: once, outside of an attack's loop."""
    return {name: array.astype(dtype) for name, array in params.items()}
