import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.weights.naming import convert
from tests.support import paths, reference, sweeps


class ConvNeXtTest(parameterized.TestCase):
    def test_strides_for_small_images(self):
        """ConvStem and first downsampling at stride 1: 32 px stay 32, then 31, 15, 7."""
        name, options = "convnext_t_cvst", {"num_classes": 10, "image_size": 32}
        net = models.create(name, **options, stem_strides=(1, 1), downsample_strides=(1, 2, 2))
        shapes = jax.eval_shape(net.init, jax.random.key(0))
        self.assertEqual(
            shapes, jax.eval_shape(models.create(name, **options).init, jax.random.key(0))
        )
        images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        jaxpr = str(jax.make_jaxpr(net.apply)(*shapes, images))
        for side, width in ((32, 96), (31, 192), (15, 384), (7, 768)):
            self.assertIn(f"f32[2,{side},{side},{width}]", jaxpr)

    @pytest.mark.matrix
    def test_initialisation_is_the_references(self):
        params, _ = jax.jit(models.create("convnext_t_cvst").init)(jax.random.key(0))
        np.testing.assert_array_equal(params["stages.0.blocks.0.gamma"], np.float32(1e-6))
        # A weak type becomes a strong one after the first update: a second compilation.
        self.assertFalse(any(p.weak_type for p in params.values()))


class CreateErrorsTest(parameterized.TestCase):
    @sweeps.rows(
        ({"name": "convnext_x"}, r"unknown model 'convnext_x'; did you mean convnext_"),
        ({"depth": 3}, r"unknown option \['depth'\] for convnext_n; it takes \['depths'"),
        ({"num_classes": 1}, "at least 2 classes"),
        ({"image_size": 4}, "smaller than the 8 px"),
        ({"stem_strides": (2, 2)}, "needs 1 entries"),
        ({"depths": (1, 1)}, "must have the same length"),
        ({"stem_widths": (8,), "stem_strides": (1,)}, "must be dims"),
        ({"depths": 3}, "depths=3 of convnext_n must be a tuple of integers"),
        ({"stem_strides": (0,)}, r"stem_strides=\(0,\) must be a tuple of positive"),
        ({"in_channels": 0}, "in_channels=0 must not be"),
        ({"dtype": "bf16"}, "not a compute type; one of"),
    )
    def test_message(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            models.create(**{"name": "convnext_n", "image_size": 32} | changes)


class ConvertTest(absltest.TestCase):
    def test_only_finite_float32(self):
        weights = reference.seeded_weights(paths.GOLDEN / "models" / "timm_convnext_tiny.tsv")
        weights["head.fc.bias"] = weights["head.fc.bias"].astype(np.float16)
        weights["head.norm.bias"][0] = np.nan
        with self.assertRaisesRegex(ValueError, "(?s)dtype float16, expected float32.*not finite"):
            convert.from_torch("convnext_t", weights)
