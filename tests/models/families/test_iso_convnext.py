import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust import models
from tests.support import sweeps
from tests.support.families import CASES


class IsotropicConvNeXtTest(parameterized.TestCase):
    @pytest.mark.matrix
    def test_initialisation_is_the_references(self):
        nets = [models.create(name, depth=1) for name in CASES["iso_convnext"].listings]
        plain, stem = (jax.jit(net.init)(jax.random.key(0))[0] for net in nets)
        for name in ("stem.0.kernel", "blocks.0.conv_dw.kernel", "head.kernel"):
            self.assertAlmostEqual(float(plain[name].std()), 0.02, 3)
        np.testing.assert_array_equal(plain["stem.0.bias"], 0)
        bound = 1 / np.sqrt(384)  # torch's default for the stem, created after the initialisation
        self.assertBetween(float(jnp.abs(stem["stem.12.bias"]).max()), 0.9 * bound, bound)
        self.assertFalse(any("gamma" in name for name in plain))
        self.assertFalse(any(p.weak_type for p in (*plain.values(), *stem.values())))

    @sweeps.rows(
        ({"image_size": 8}, "smaller than the 16 px that become one feature"),
        ({"stem_strides": (2, 2)}, "needs 1 entries"),
        ({"depth": 0}, "must be positive"),
        ({"gamma_init": 1.0}, r"unknown option \['gamma_init'\] for iso_convnext_s"),
    )
    def test_errors(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            models.create("iso_convnext_s", **changes)
