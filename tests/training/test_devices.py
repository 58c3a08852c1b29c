"""A run on one device and on eight: the same sums in another order."""

import jax
import numpy as np
import pytest
from absl.testing import absltest
from ml_collections import ConfigDict

from jaxrobust.runtime.devices import sharding
from jaxrobust.training import build
from jaxrobust.types import Batch
from tests.support.steps import batch_of, small_config, standard

IMAGES, SIDE, UPDATES = 64, 8, 12


def config_of(dtype):
    """Batch norms behind convolutions with biases, dropout, and images that are mixed."""
    options = {"widths": (8,), "hidden": (16,), "pool": 4, "dropout": 0.2, "bn_group": 8}
    config = small_config(train__batch_size=IMAGES, attack__steps=1).unlock()
    config.model.update(name="cifar_vgg16", image_size=SIDE, dtype=dtype)
    config.model.options = ConfigDict(options)
    config.train.update(epochs=2, warmup_epochs=0)
    config.mixup.update(mixup=0.8, cutmix=1.0)
    return config.lock()


def trained(config, devices):
    """Parameters and losses after some updates, the parameters in the network's own type."""
    phase, losses = build.phase(config, "train", 10 * IMAGES, devices=devices), []

    def in_type(leaf):
        if leaf.dtype != np.float32:
            return leaf
        return jax.device_put(np.asarray(leaf, config.model.dtype), leaf.sharding)

    with jax.set_mesh(phase.mesh), standard():
        state = jax.tree.map(in_type, phase.init(jax.random.key(0)))
        for number in range(UPDATES):
            arrays = map(np.asarray, batch_of(IMAGES, side=SIDE, seed=number))
            batch = Batch(*sharding.global_arrays(phase.mesh, tuple(arrays)))
            state, metrics = phase.step(state, batch, build.control(phase.mesh))
            losses.append(float(metrics["loss"]))
    return jax.device_get(state.params), losses


@pytest.mark.slow
class DevicesTest(absltest.TestCase):
    def test_one_device_is_eight_but_for_rounding(self):
        """Which float32 hides: there the losses part by 1e-3 in these updates.

        In exact arithmetic the bias of a convolution before a batch norm has no gradient. AdamW
        divides what rounding leaves of it by its own size, and takes a whole step in the direction
        of noise.
        """
        with jax.enable_x64(True):
            (one, expected), (eight, found) = (
                trained(config_of("float64"), jax.devices()[:count]) for count in (1, 8)
            )
        self.assertGreater(np.ptp(expected), 0.01)  # it does train
        # A thousand times what twelve updates were measured to make of 1e-16: 3e-16.
        np.testing.assert_allclose(found, expected, rtol=3e-13)
        biases = {f"features.{place}.bias" for place in (0, 3)}
        self.assertContainsSubset(biases, one)
        for name, value in one.items():
            self.assertEqual(value.dtype, np.float64)
            # Noise of 1e-16 next to AdamW's eps of 1e-8, in twelve steps of 5e-5: 1e-12.
            limit = 1e-9 if name in biases else 1e-13
            np.testing.assert_allclose(eight[name], value, rtol=0, atol=limit, err_msg=name)
