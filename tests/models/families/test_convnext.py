import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust import models

TINY = {"depths": (2, 2), "dims": (6, 8), "image_size": 8, "gamma_init": 0.1}


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

    @parameterized.parameters((8, 1, (1,)), (28, 1, (2,)), (64, 3, (4,)), (32, 2, (2,)))
    @pytest.mark.matrix
    def test_small_variant_takes_small_images(self, side, channels, strides):
        options = {"num_classes": 4, "image_size": side, "in_channels": channels}
        net = models.create("convnext_n", **TINY | options, stem_strides=strides)
        params, stats = jax.jit(net.init)(jax.random.key(0))
        logits, _ = jax.jit(net.apply)(params, stats, jnp.ones((3, side, side, channels)))
        self.assertEqual(logits.shape, (3, 4))
        self.assertTrue(np.isfinite(logits).all())

    @pytest.mark.matrix
    def test_initialisation_is_the_references(self):
        params, stats = jax.jit(models.create("convnext_t_cvst").init)(jax.random.key(0))
        self.assertAlmostEqual(float(params["stages.3.blocks.0.mlp.fc1.kernel"].std()), 0.02, 3)
        bound = 1 / np.sqrt(27)  # torch's default for the stem
        self.assertAlmostEqual(float(jnp.abs(params["stem.0.kernel"]).max()), bound, 2)
        self.assertGreater(float(jnp.abs(params["stem.0.bias"]).max()), 0)
        np.testing.assert_array_equal(params["stages.0.blocks.0.gamma"], np.float32(1e-6))
        np.testing.assert_array_equal(stats["normalize.std"], 1)
        # A weak type becomes a strong one after the first update: a second compilation.
        self.assertFalse(any(p.weak_type for p in params.values()))


class CreateErrorsTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"name": "convnext_x"}, r"unknown model 'convnext_x'; did you mean convnext_"),
        ({"depth": 3}, r"unknown option \['depth'\] for convnext_n; it accepts \['depths'"),
        ({"num_classes": 1}, "at least 2 classes"),
        ({"image_size": 4}, "smaller than the 8 px"),
        ({"stem_strides": (2, 2)}, "needs 1 entries"),
        ({"depths": (1, 1)}, "must have the same length"),
        ({"stem_widths": (8,), "stem_strides": (1,)}, "must be dims"),
        ({"depths": 3}, "depths=3 of convnext_n must be a tuple of integers"),
        ({"stem_strides": (0,)}, r"stem_strides=\(0,\) must be a tuple of positive"),
        ({"in_channels": 0}, "in_channels=0 must not be"),
        ({"dtype": "bf16"}, "not a compute type; use one of"),
    )
    def test_message(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            models.create(**{"name": "convnext_n", "image_size": 32} | changes)


class InputErrorsTest(parameterized.TestCase):
    @parameterized.parameters(
        (np.zeros((2, 16, 16, 3), np.uint8), "images are uint8; divide by 255"),
        (np.zeros((2, 16, 16, 1), np.float32), r"shape \(2, 16, 16, 1\), expected \[B, H, W, 3\]"),
        (np.zeros((16, 16, 3), np.float32), r"expected \[B, H, W, 3\]"),
    )
    def test_message(self, images, message):
        net = models.create("convnext_n", image_size=16, depths=(1,), dims=(8,))
        params, stats = jax.jit(net.init)(jax.random.key(0))
        with self.assertRaisesRegex(ValueError, message):
            net.apply(params, stats, images)
