import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust import models
from jaxrobust.models.modules.positions import resized
from jaxrobust.weights.naming import convert
from tests.support import behaviour, parity, reference, sweeps

TINY = {"dim": 12, "depth": 2, "heads": 2, "stem_strides": (4,), "image_size": 12}


class CaiTTest(parameterized.TestCase):
    @pytest.mark.matrix
    def test_initialisation_is_the_references(self):
        net = models.create("cait_s24", depth=1)
        params, _ = jax.jit(net.init)(jax.random.key(0))
        for name in ("pos_embed", "cls_token"):
            self.assertAlmostEqual(float(params[name].std()), 0.02, 2)
        np.testing.assert_array_equal(params["blocks.0.gamma_1"], np.float32(1e-5))
        np.testing.assert_array_equal(params["blocks_token_only.0.gamma_2"], np.float32(1e-5))
        self.assertEqual(models.variant("cait_s12").gamma_init, 1.0)
        self.assertFalse(any(p.weak_type for p in params.values()))

    @pytest.mark.slow
    def test_positions_of_another_size(self):
        weights = reference.seeded_weights(parity.MODELS / "cait_xxs24_224.tsv")
        params, _ = convert.from_torch("cait_xxs24", weights, image_size=384)
        wanted = resized(weights["pos_embed"], (1, 24 * 24, 192))
        np.testing.assert_array_equal(params["pos_embed"], wanted)

    @sweeps.rows(
        ({"image_size": 100}, "image_size=100 is not a whole number of patches of 16 px; use "),
        ({"stem_strides": (2, 2)}, "needs 1 entries"),
        ({"heads": 5}, "heads must divide dim"),
        ({"class_depth": 0}, "needs at least one layer"),
        ({"stem_widths": (8,)}, r"unknown option \['stem_widths'\] for cait_s12"),
    )
    def test_errors(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            models.create("cait_s12", **changes)

    def test_images_of_another_size(self):
        apply, params, stats, _ = behaviour.small("cait_s12", dtype="float32", **TINY)
        with self.assertRaisesRegex(ValueError, "has positions for 3x3; create it"):
            apply(params, stats, jnp.ones((1, 16, 16, 3)))
