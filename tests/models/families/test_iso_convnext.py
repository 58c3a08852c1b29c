import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from jaxrobust import models
from jaxrobust.models.families import iso_convnext
from jaxrobust.models.modules.draws import Drop
from tests.support import behaviour
from tests.support.families import CASES

TINY = {"dim": 12, "depth": 3, "stem_strides": (4,), "image_size": 12}


class IsotropicConvNeXtTest(parameterized.TestCase):
    @pytest.mark.matrix
    def test_initialisation_is_the_references(self):
        nets = [models.create(name, depth=1) for name in CASES["iso_convnext"].listings]
        plain, stem = (jax.jit(net.init)(jax.random.key(0))[0] for net in nets)
        for name in ("stem.0.kernel", "blocks.0.conv_dw.kernel", "head.kernel"):
            self.assertAlmostEqual(float(plain[name].std()), 0.02, 3)
        np.testing.assert_array_equal(plain["stem.0.bias"], 0)
        bound = 1 / np.sqrt(384)  # torch's default for the stem, created after the initialization
        self.assertBetween(float(jnp.abs(stem["stem.12.bias"]).max()), 0.9 * bound, bound)
        self.assertFalse(any("gamma" in name for name in plain))
        self.assertFalse(any(p.weak_type for p in (*plain.values(), *stem.values())))

    def test_images_of_any_size(self):
        apply, params, stats, _ = behaviour.small("iso_convnext_s", dtype="float32", **TINY)
        logits, _ = jax.jit(apply)(params, stats, jnp.ones((1, 24, 8, 3)))
        self.assertTrue(np.isfinite(logits).all())

    @parameterized.parameters(
        ({"image_size": 8}, "smaller than the 16 px that become one feature"),
        ({"stem_strides": (2, 2)}, "needs 1 entries"),
        ({"depth": 0}, "must be positive"),
        ({"gamma_init": 1.0}, r"unknown option \['gamma_init'\] for iso_convnext_s"),
    )
    def test_errors(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            models.create("iso_convnext_s", **changes)


@pytest.mark.matrix
class SlowBehaviourTest(parameterized.TestCase):
    def test_drop_path_keeps_the_expectation(self):
        block = iso_convnext.Block(8, nnx.Rngs(params=0))
        x = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (1, 3, 3, 8)), (4096, 3, 3, 8))
        out = np.asarray(block(x, Drop(jax.random.key(2), 0.25), True))
        branch = np.asarray(block(x[:1], None, True) - x[:1])
        for share, factor in ((0.25, 0), (0.75, 1 / 0.75)):
            outcome = np.asarray(x[:1]) + factor * branch
            frequency = (np.abs(out - outcome).max((1, 2, 3)) < 1e-5).mean()
            self.assertAlmostEqual(frequency, share, delta=0.03)  # four deviations
