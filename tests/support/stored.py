"""Weights as they are stored."""

import functools

import jax
import numpy as np

from jaxrobust import models


@functools.cache
def weights(name="convnext_n", *, image_size=16, **overrides) -> dict[str, np.ndarray]:
    """Random numbers for all weights, without compiling; raw [0, 1] input."""
    net = models.create(name, num_classes=10, image_size=image_size, **overrides)
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    draw = np.random.default_rng(0).standard_normal
    fixed = {"normalize.mean": 0, "normalize.std": 1}
    return {
        key: np.full(array.shape, fixed[key], np.float32)
        if key in fixed
        else draw(array.shape, np.float32)
        for key, array in (params | stats).items()
    }


def as_timm(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same under timm's names, without normalization."""
    order = {4: (3, 2, 0, 1), 2: (1, 0)}
    return {
        key.replace(".kernel", ".weight").replace(".scale", ".weight"): np.ascontiguousarray(
            array.transpose(order[array.ndim]) if key.endswith(".kernel") else array
        )
        for key, array in arrays.items()
        if not key.startswith("normalize.")
    }
