import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

from jaxrobust import models
from jaxrobust.models import vit
from jaxrobust.models.modules import Drop
from jaxrobust.models.positions import resized
from jaxrobust.weights import convert
from tests import behaviour, parity, reference

# name -> (listing of the reference's weights, its number of parameters: revisiting_at.md, 1.7)
NETWORKS = {
    "vit_s": ("timm_vit_small_patch16_224", 22_050_664),
    "vit_s_cvst": ("Singh2023Revisiting_ViT-S-ConvStem", 22_777_576),
    "vit_m": ("timm_deit3_medium_patch16_224", 38_849_512),
    "vit_m_cvst": ("paper_vit_m_cvst", 39_527_272),
    "vit_b": ("timm_vit_base_patch16_224", 86_567_656),
    "vit_b_cvst": ("Singh2023Revisiting_ViT-B-ConvStem", 87_147_112),
    "deit_s": ("timm_deit_small_patch16_224", 22_050_664),
}
GOLDEN = ("vit_s", "vit_s_cvst", "vit_m_cvst")
TINY = {"dim": 12, "depth": 3, "heads": 2, "stem_strides": (4,), "image_size": 12}
TINY_STEM = {"stem_widths": (4, 6), "stem_strides": (2, 2)}


class VisionTransformerTest(parameterized.TestCase):
    @parameterized.parameters(*NETWORKS)
    def test_parameters_and_names(self, name):
        listing, count = NETWORKS[name]
        self.assertEqual(parity.parameters(name), count)
        self.assertEqual(models.torch_keys(name), parity.listing(listing))

    def test_both_listings_of_deit_are_one(self):
        self.assertEqual(models.torch_keys("deit_s"), parity.listing("deit_small_patch16_224"))

    def test_golden_float32(self):
        parity.check_golden(self, "vit_m_cvst", NETWORKS["vit_m_cvst"][0], dtype="float32")

    def test_bfloat16_computes_and_returns_float32(self):
        behaviour.check_bfloat16(self, "vit_m", **TINY | TINY_STEM)

    def test_initialisation_is_the_references(self):
        params, stats = jax.jit(models.create("vit_m", depth=1).init)(jax.random.key(0))
        for name in ("blocks.0.attn.qkv.kernel", "head.kernel", "pos_embed"):
            self.assertAlmostEqual(float(params[name].std()), 0.02, 3)
        self.assertBetween(float(params["cls_token"].std()), 0.9e-6, 1.1e-6)
        bound = 1 / np.sqrt(3 * 16 * 16)  # torch's default for the convolution, bias too
        for name in ("patch_embed.proj.0.kernel", "patch_embed.proj.0.bias"):
            self.assertBetween(float(jnp.abs(params[name]).max()), 0.95 * bound, bound)
        np.testing.assert_array_equal(params["blocks.0.ls2.gamma"], np.float32(1e-6))
        np.testing.assert_array_equal(params["blocks.0.mlp.fc1.bias"], 0)
        np.testing.assert_array_equal(stats["normalize.std"], 1)
        self.assertFalse(any(p.weak_type for p in params.values()))

    def test_stem_and_head_are_all_that_the_other_stem_or_classes_change(self):
        def shapes(name, **options):
            net = models.create(name, **options)
            params, _ = jax.eval_shape(net.init, jax.random.key(0))
            return {k: p.shape for k, p in params.items()}

        plain, stem = shapes("vit_s"), shapes("vit_s_cvst")
        self.assertNotEmpty(plain.items() ^ stem.items())
        for name, _ in plain.items() ^ stem.items():
            self.assertRegex(name, rf"^{vit.FAMILY.stem}$")
        for name, _ in plain.items() ^ shapes("vit_s", num_classes=10).items():
            self.assertRegex(name, rf"^{vit.FAMILY.head}$")


class ConversionTest(parameterized.TestCase):
    @parameterized.parameters(("vit_s", 288, 325), ("vit_m", 64, 16))
    def test_positions_of_another_size(self, name, side, positions):
        weights = reference.seeded_weights(parity.MODELS / f"{NETWORKS[name][0]}.tsv")
        params, _ = convert.from_torch(name, weights, image_size=side)
        wanted = resized(weights["pos_embed"], (1, positions, params["norm.scale"].size))
        np.testing.assert_array_equal(params["pos_embed"], wanted)

    def test_facebooks_names(self):
        weights = reference.seeded_weights(parity.MODELS / "timm_deit3_medium_patch16_224.tsv")
        theirs = {k.replace("ls1.gamma", "gamma_1"): v for k, v in weights.items()}
        theirs = {k.replace("ls2.gamma", "gamma_2"): v for k, v in theirs.items()}
        self.assertIn("blocks.3.gamma_2", theirs)
        ours, expected = (convert.from_torch("vit_m", w)[0] for w in (theirs, weights))
        for name, array in expected.items():
            np.testing.assert_array_equal(ours[name], array)


class ErrorsTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"image_size": 100}, "image_size=100 is not a whole number of patches of 16 px; use "),
        ({"image_size": 8}, "use image_size=16, or other stem_strides"),
        ({"stem_strides": (2, 2)}, "needs 1 entries"),
        ({"heads": 5}, "heads a divisor of dim"),
        ({"depth": 0}, "must be positive"),
        ({"gamma_init": float("inf")}, "gamma_init=inf of vit_s must be a finite number or None"),
        ({"depths": 3}, r"unknown option \['depths'\] for vit_s; it takes \['dim'"),
    )
    def test_message(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            models.create(**{"name": "vit_s"} | changes)

    @parameterized.parameters((16, 16), (24, 6))
    def test_images_of_another_size(self, height, width):
        apply, params, stats, _ = behaviour.small("vit_s", dtype="float32", **TINY)
        with self.assertRaisesRegex(ValueError, "has positions for 3x3: create it"):
            apply(params, stats, jnp.ones((1, height, width, 3)))


@pytest.mark.matrix
class SlowVisionTransformerTest(parameterized.TestCase):
    @parameterized.parameters(*GOLDEN)
    def test_golden_float64(self, name):
        parity.check_golden(self, name, NETWORKS[name][0], dtype="float64")

    @parameterized.parameters("vit_s", "vit_s_cvst")
    def test_golden_float32(self, name):
        parity.check_golden(self, name, NETWORKS[name][0], dtype="float32")

    @parameterized.parameters(*NETWORKS)
    def test_reference(self, name):
        parity.check_reference(self, name, image_size=96 if name == "deit_s" else 64)


@pytest.mark.matrix
class SlowBehaviourTest(parameterized.TestCase):
    def test_forward_of_the_thesis(self):
        parity.check_forward(self, "deit_s", "deit_small_patch16_224")

    def test_remat_and_scan_change_nothing(self):
        behaviour.check_remat_and_scan(self, "vit_m", **TINY | {"depth": 2})

    def test_drop_path(self):
        # Rates 0, 0.3 and 0.6: two blocks of two branches.
        behaviour.check_drop_path(self, "vit_m", outcomes=2**4, **TINY)

    def test_drop_path_keeps_the_expectation_of_each_branch(self):
        block = vit.Block(vit.Variant(8, 1, 2, gamma_init=1.0), nnx.Rngs(params=0))
        one = jax.random.normal(jax.random.key(1), (1, 3, 8))
        x = jnp.broadcast_to(one, (4096, 3, 8))
        out = np.asarray(block(x, Drop(jax.random.key(2), 0.25), True))

        def attended(x):
            return x + block.ls1(block.attn(block.norm1(x))) / 0.75

        def mapped(x):
            return x + block.ls2(block.mlp(block.norm2(x))) / 0.75

        seen = 0.0
        outcomes = ((1, one), (3, attended(one)), (3, mapped(one)), (9, mapped(attended(one))))
        for share, outcome in outcomes:
            frequency = (np.abs(out - np.asarray(outcome)).max((1, 2)) < 1e-5).mean()
            self.assertAlmostEqual(frequency, share / 16, delta=0.03)  # four deviations
            seen += frequency
        self.assertEqual(seen, 1)


if __name__ == "__main__":
    absltest.main()
