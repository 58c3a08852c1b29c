import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from jaxrobust import models
from jaxrobust.models.families import vit
from jaxrobust.models.modules.draws import Drop
from jaxrobust.models.modules.positions import resized
from jaxrobust.weights.naming import convert
from tests.support import behaviour, parity, reference, sweeps
from tests.support.families import CASES

TINY = {"dim": 12, "depth": 3, "heads": 2, "stem_strides": (4,), "image_size": 12}


class VisionTransformerTest(parameterized.TestCase):
    def test_both_listings_of_deit_are_one(self):
        self.assertEqual(models.torch_keys("deit_s"), parity.listing("deit_small_patch16_224"))

    @pytest.mark.slow
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
            self.assertRegex(name, rf"^{vit.NAMES.stem}$")
        for name, _ in plain.items() ^ shapes("vit_s", num_classes=10).items():
            self.assertRegex(name, rf"^{vit.NAMES.head}$")


@pytest.mark.computes
class ConversionTest(parameterized.TestCase):
    @sweeps.fast(0)
    @parameterized.parameters(("vit_s", 288, 325), ("vit_m", 64, 16))
    def test_positions_of_another_size(self, name, side, positions):
        weights = reference.seeded_weights(parity.MODELS / f"{CASES['vit'].listings[name]}.tsv")
        params, _ = convert.from_torch(name, weights, image_size=side)
        wanted = resized(weights["pos_embed"], (1, positions, params["norm.scale"].size))
        np.testing.assert_array_equal(params["pos_embed"], wanted)

    @pytest.mark.slow
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
        ({"heads": 5}, "heads must divide dim"),
        ({"depth": 0}, "must be positive"),
        ({"gamma_init": float("inf")}, "gamma_init=inf of vit_s must be a finite number or None"),
        ({"depths": 3}, r"unknown option \['depths'\] for vit_s; it accepts \['dim'"),
    )
    def test_message(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            models.create(**{"name": "vit_s"} | changes)

    @parameterized.parameters((16, 16), (24, 6))
    def test_images_of_another_size(self, height, width):
        apply, params, stats, _ = behaviour.small("vit_s", dtype="float32", **TINY)
        with self.assertRaisesRegex(ValueError, "has positions for 3x3; create it"):
            apply(params, stats, jnp.ones((1, height, width, 3)))


@pytest.mark.matrix
class SlowBehaviourTest(parameterized.TestCase):
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
