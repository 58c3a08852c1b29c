"""The NNX modules themselves: they are the networks, and may be taken apart."""

import jax
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from jaxrobust import models
from tests.support import small_networks, sweeps
from tests.support.families import all_families

# The first small network of each family.
FIRST = {models.family(row[0]).file: label for label, row in reversed(small_networks.ROWS.items())}


class ModuleTest(parameterized.TestCase):
    @pytest.mark.slow
    @sweeps.rows(*FIRST.values())
    def test_is_the_network(self, label):
        name, options = small_networks.ROWS[label][0], small_networks.options(label)
        images = small_networks.images(label).astype("f")
        net = models.create(name, **options)
        params, stats = net.init(jax.random.key(0))
        expected = jax.jit(net.apply)(params, stats, images)[0]
        drawn = models.module(name, rngs=nnx.Rngs(0), **options)
        np.testing.assert_allclose(nnx.jit(drawn)(images), expected, rtol=1e-5, atol=1e-6)
        other, stats = net.init(jax.random.key(1))
        given = models.module(name, rngs=nnx.Rngs(0), weights=(other, stats), **options)
        expected = jax.jit(net.apply)(other, stats, images)[0]
        np.testing.assert_allclose(nnx.jit(given)(images), expected, rtol=1e-5, atol=1e-6)

    def test_all_families_are_here(self):
        self.assertEqual(FIRST.keys(), {family.file for family in all_families()})

    def test_refusals(self):
        with self.assertRaisesRegex(ValueError, "unknown model 'convnet'; did you mean"):
            models.module("convnet", rngs=nnx.Rngs(0))
        with self.assertRaisesRegex(ValueError, "nets.py:make is your own function, but this"):
            models.module("nets.py:make", rngs=nnx.Rngs(0))
        small = small_networks.options("convnext")
        with self.assertRaisesRegex(ValueError, "these weights do not belong to this network"):
            models.module("convnext_n", rngs=nnx.Rngs(0), weights=({}, {}), **small)
