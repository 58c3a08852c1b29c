"""Configs and chips that tests of the estimate share."""

import jax

from jaxrobust import models
from jaxrobust.config import Config, base
from jaxrobust.doctor.estimate.devices import Target
from jaxrobust.runtime.devices import hardware

# Of eight chips that are nowhere here.
H100 = Target("h100:8", "NVIDIA H100 SXM", 8, hardware.chip("NVIDIA H100 SXM"), False, False)
NET = models.create("convnext_n", image_size=224, depths=(1,), dims=(32,))
SHAPES = jax.eval_shape(NET.init, jax.random.key(0))


def imagenet() -> Config:
    """Return the paper's config in two phases, with a network that is quickly traced."""
    config = base().unlock()
    config.model.update(name="convnext_n", options={"depths": (1,), "dims": (32,)})
    config.pretrain.epochs = 100
    config.data.dir = "/nowhere"
    return config


def digits() -> Config:
    """Return a config of the digits that ship, with a tiny network."""
    config = base().unlock()
    config.model.update(name="convnext_n", num_classes=10, image_size=8, in_channels=1)
    config.model.options = {"stem_strides": (1,), "depths": (1,), "dims": (8,)}
    config.data.update(name="digits", selection_split="test[:50]", test_split="test")
    config.train.update(epochs=11, batch_size=32)
    return config
