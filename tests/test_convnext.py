import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust import convert, models
from tests import paths, reference

# Counted by the reference networks; revisiting_at.md section 1.7.
PARAMETERS = {
    "convnext_t": 28_589_128,
    "convnext_t_cvst": 28_627_432,
    "convnext_s": 50_223_688,
    "convnext_s_cvst": 50_261_992,
    "convnext_b": 88_591_464,
    "convnext_b_cvst": 88_753_416,
    "convnext_l": 197_767_336,
    "convnext_l_cvst": 198_134_680,
}
GOLDEN = {
    "Singh2023Revisiting_ConvNeXt-T-ConvStem": "convnext_t_cvst",
    "timm_convnext_tiny": "convnext_t",
    "Liu2023Comprehensive_ConvNeXt-B": "convnext_b",
}


def relative(ours, theirs) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


class ConvNeXtTest(parameterized.TestCase):
    @parameterized.parameters(*PARAMETERS.items())
    def test_parameter_count(self, name, expected):
        params, _ = jax.eval_shape(models.create(name).init, jax.random.key(0))
        self.assertEqual(sum(p.size for p in params.values()), expected)

    @parameterized.parameters(*GOLDEN.items())
    def test_golden_logits(self, golden, name):
        weights = reference.seeded_weights(paths.GOLDEN / "models" / f"{golden}.tsv")
        params, stats = convert.from_torch(name, weights)
        net = models.create(name)
        logits = jax.jit(lambda p, s, x: net.apply(p, s, x)[0])(
            params, stats, reference.golden_images()
        )
        theirs = np.load(paths.GOLDEN / "models" / "convnext_logits.npz")[f"{golden}__f32"]
        # Two float32 networks: theirs is 3e-6 from its own float64, logits have deviation 1.
        self.assertLess(relative(logits, theirs), 1e-5)

    @parameterized.parameters("convnext_t", "convnext_t_cvst", "convnext_b_cvst")
    def test_logits_and_input_gradients_are_timms(self, name):
        try:
            import torch

            from tools import torch_reference
        except ImportError:
            self.skipTest(paths.PARITY)
        theirs = torch_reference.network(name)
        torch.manual_seed(0)
        with torch.no_grad():
            for key, p in theirs.named_parameters():
                p.copy_(torch.randn_like(p) * 0.3 + 0.5 if "gamma" in key else p)
        side = 64 if "_b_" in name else 128
        images = np.random.default_rng(1).random((2, side, side, 3), dtype=np.float32)
        x = torch.tensor(images.transpose(0, 3, 1, 2)).requires_grad_()
        logits = theirs(x)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([3, 7]), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)

        params, stats = convert.from_torch(name, torch_reference.state_arrays(theirs))
        net = models.create(name, image_size=side)

        @jax.jit
        def ours(params, x):
            def loss(x):
                logits = net.apply(params, stats, x)[0]
                return -jax.nn.log_softmax(logits)[jnp.arange(2), jnp.array([3, 7])].sum(), logits

            return jax.grad(loss, has_aux=True)(x)

        our_gradient, our_logits = ours(params, images)
        self.assertLess(relative(our_logits, logits.detach().numpy()), 1e-5)
        self.assertLess(relative(our_gradient, gradient.numpy().transpose(0, 2, 3, 1)), 1e-4)

    def test_remat_changes_nothing(self):
        kwargs = {"num_classes": 5, "image_size": 16, "depths": (1, 1), "dims": (8, 16)}
        nets = [models.create("convnext_n", remat=r, **kwargs) for r in (False, True)]
        params, stats = jax.jit(nets[0].init)(jax.random.key(0))
        images = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3))
        grads = [
            jax.jit(jax.grad(lambda p, net=net: net.apply(p, stats, images)[0].sum()))(params)
            for net in nets
        ]
        for name, plain in grads[0].items():
            np.testing.assert_allclose(grads[1][name], plain, rtol=1e-5, atol=1e-6)

    def test_bfloat16_computes_and_returns_float32(self):
        kwargs = {"num_classes": 5, "image_size": 16, "depths": (1, 1), "dims": (8, 16)}
        nets = [models.create("convnext_n", dtype=d, **kwargs) for d in ("float32", "bfloat16")]
        params, stats = jax.jit(nets[0].init)(jax.random.key(0))
        images = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3))
        single, half = (jax.jit(net.apply)(params, stats, images)[0] for net in nets)
        self.assertEqual(half.dtype, jnp.float32)
        self.assertGreater(relative(half, single), 0)  # it did compute in bfloat16
        # bfloat16 keeps 8 bits (4e-3 each rounding), through about 12 layers.
        self.assertLess(relative(half, single), 0.05)

    @parameterized.parameters((8, 1, (1,)), (28, 1, (2,)), (64, 3, (4,)), (32, 2, (2,)))
    def test_small_variant_takes_small_images(self, side, channels, strides):
        net = models.create(
            "convnext_n", num_classes=4, image_size=side, in_channels=channels, stem_strides=strides
        )
        params, stats = jax.jit(net.init)(jax.random.key(0))
        logits, _ = jax.jit(net.apply)(params, stats, jnp.ones((3, side, side, channels)))
        self.assertEqual(logits.shape, (3, 4))
        self.assertTrue(np.isfinite(logits).all())

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
        ({"depth": 3}, r"unknown option \['depth'\] for convnext_n; it takes \['depths'"),
        ({"num_classes": 1}, "at least 2 classes"),
        ({"image_size": 4}, "smaller than the 8 px"),
        ({"stem_strides": (2, 2)}, "needs 1 entries"),
        ({"depths": (1, 1)}, "must have the same length"),
        ({"stem_widths": (8,), "stem_strides": (1,)}, "must be dims"),
        ({"depths": 3}, "depths=3 must be a tuple of positive integers"),
        ({"stem_strides": (0,)}, r"stem_strides=\(0,\) must be a tuple of positive"),
        ({"in_channels": 0}, "in_channels=0 must not be"),
        ({"dtype": "bf16"}, "not a compute type; one of"),
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


class ConvertTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        listing = paths.GOLDEN / "models" / "timm_convnext_tiny.tsv"
        self.weights = reference.seeded_weights(listing)

    def test_all_problems_in_one_message(self):
        del self.weights["head.fc.bias"]
        self.weights["head.fc.weight"] = self.weights["head.fc.weight"][:10]
        self.weights["extra"] = np.zeros(3, np.float32)
        with self.assertRaises(ValueError) as caught:
            convert.from_torch("convnext_t", self.weights)
        message = str(caught.exception)
        self.assertIn("extra: 0 rows match", message)
        self.assertIn("head.fc.bias: not filled", message)
        self.assertIn("head.fc.weight: shape (768, 10) for head.fc.kernel (768, 1000)", message)

    def test_only_finite_float32_and_copies(self):
        self.weights["head.fc.bias"] = self.weights["head.fc.bias"].astype(np.float16)
        self.weights["head.norm.bias"][0] = np.nan
        with self.assertRaisesRegex(ValueError, "(?s)dtype float16, expected float32.*not finite"):
            convert.from_torch("convnext_t", self.weights)

    def test_half_a_normalisation_is_refused(self):
        self.weights["normalize.mean"] = np.zeros((1, 3, 1, 1), np.float32)
        with self.assertRaisesRegex(ValueError, "normalize.std: not filled"):
            convert.from_torch("convnext_t", self.weights)

    def test_wrapper_prefixes(self):
        wrapped = {f"module.base_model.{k}": v for k, v in self.weights.items()}
        params, stats = convert.from_torch("convnext_t", wrapped)
        np.testing.assert_array_equal(params["head.fc.bias"], self.weights["head.fc.bias"])
        np.testing.assert_array_equal(stats["normalize.mean"], 0)


if __name__ == "__main__":
    absltest.main()
