"""A phase that compiles in a moment, and batches for it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxrobust.config import base
from jaxrobust.types import Batch

# optax mixes float and int32 in its bias correction; everything of ours is checked strictly.
standard = partial(jax.numpy_dtype_promotion, "standard")


def small_config(**changes) -> ConfigDict:
    config = base().unlock()
    config.model.update(name="convnext_n", num_classes=10, image_size=16)
    config.model.options = ConfigDict({"depths": (1,), "dims": (8,)})  # compiles in a moment
    config.train.update(batch_size=8, epochs=3, warmup_epochs=1, ema_decay=0.9)
    config.attack.update(epsilon=8 / 255, steps=3)
    for key, value in changes.items():
        target, _, name = key.rpartition("__")
        setattr(config[target] if target else config, name, value)
    return config.lock()


def batch_of(size=8, side=16, seed=0) -> Batch:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (size, side, side, 3), np.uint8)
    return Batch(jnp.asarray(images), jnp.asarray(rng.integers(0, 10, size), jnp.int32))
