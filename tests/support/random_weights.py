"""Weights of networks without training: every part of the network shows in the logits."""

import jax
import numpy as np

from jaxrobust import models
from jaxrobust.models.published import IMAGENET_MEAN, IMAGENET_STD

IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)


def drawn(
    name: str,
    *,
    num_classes=1000,
    image_size=224,
    normalised=False,
    moments=IMAGENET,
    **options,
):
    """(params, stats) of a network, float32; with these mean and std, or raw images."""
    net = models.create(name, num_classes=num_classes, image_size=image_size, **options)
    draw = np.random.default_rng(0)

    def value(key, shape):
        last, z = key.split(".")[-1], draw.standard_normal(shape, np.float32)
        if key.startswith("normalize."):
            fixed = moments[last == "std"] if normalised else None
            return np.full(shape, last == "std" if fixed is None else fixed, np.float32)
        if last == "var":
            return np.float32(0.5) + np.abs(z)
        if last.startswith("gamma") or last == "temperature":
            return np.float32(0.5) + np.float32(0.1) * z
        if last == "kernel":
            return z / np.float32(np.sqrt(np.prod(shape[:-1])))
        return np.float32(0.5 if z.ndim > 1 else 0.1) * z + np.float32(last == "scale")

    shapes = jax.eval_shape(net.init, jax.random.key(0))
    return tuple({k: value(k, a.shape) for k, a in part.items()} for part in shapes)
