"""Norms of a row's choice, against their formulas."""

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.models.modules import norms

# of the images f[B,H,W,C]: the axes that a norm averages over, channels in groups of 8
AXES = {"group": (1, 2, 4), "layer": (3, 4), "instance": (1, 2)}


class NormsTest(parameterized.TestCase):
    @parameterized.parameters(*AXES)
    def test_mean_and_variance(self, name):
        """Far from a mean of zero, where the variance is not the mean square."""
        images = 3 + 2 * np.random.default_rng(0).normal(size=(2, 4, 5, 16)).astype(np.float32)
        found = norms.NORMS[name](16, 2, 0.1)(jnp.asarray(images), True)
        wide = images.astype(np.float64).reshape(2, 4, 5, 2, 8)
        axes = {"keepdims": True, "axis": AXES[name]}
        expected = (wide - wide.mean(**axes)) / np.sqrt(wide.var(**axes) + 1e-5)
        np.testing.assert_allclose(found, expected.reshape(images.shape), atol=3e-6)  # float32

    def test_groups_of_another_number(self):
        with self.assertRaisesRegex(ValueError, "12 channels are not 5 groups of equal size"):
            norms.GroupNorm(12, groups=5)


if __name__ == "__main__":
    absltest.main()
