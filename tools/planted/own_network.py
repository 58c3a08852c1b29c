"""A user's own network, which normalizes its images itself."""

from typing import Any

import jax.numpy as jnp

from jaxrobust import models
from jaxrobust.types import Classifier

MEAN, STD = ([[[[0.485, 0.456, 0.406]]]], [[[[0.229, 0.224, 0.225]]]])  # of ImageNet


def make(num_classes: int, image_size: int, in_channels: int, **options: Any) -> Classifier:
    sizes = {"num_classes": num_classes, "image_size": image_size, "in_channels": in_channels}
    net = models.create("convnext_n", **sizes, depths=(1,), dims=(8,))

    def apply(params: Any, stats: Any, images: Any, **how: Any) -> Any:
        return net.apply(params, stats, (images - jnp.asarray(MEAN)) / jnp.asarray(STD), **how)

    return Classifier(net.init, apply)
