"""BoTNet, CeiT, LeViT, MobileViT and ViTAE of Tang et al. 2022: golden logits of the public code.

And options of small ones. What every family must do (names, counts, the row of 224 px next to
PyTorch) is in tests/models/families/test_families.py.
"""

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

from jaxrobust import models
from jaxrobust.models import table
from jaxrobust.weights.naming import convert
from tests.support import cifar_study, golden32, parity, sweeps
from tests.support.cifar_study import weights

# listing of the public code's network -> ours
GOLDEN = {
    "botnet50_3x3stem_nopool": "cifar_botnet50",
    "ceit_t_32_4tokens": "cifar_ceit",
    "levit_128s_32_stem4": "cifar_levit",
    "mobilevit_s_32_s11": "cifar_mobilevit",
    "vitae_14_10c": "cifar_vitae",
}
# Parameters; multiply-adds of convolutions and linear maps at 32 px; those of attention's products:
# of a block (queries, keys, width of all heads' queries and of their values).
COUNTED = {
    "cifar_botnet50": (
        18_827_082,
        1_260_081_152,
        # Queries and positions meet keys and queries.
        [(64, 64, 1024, 512)] + [(16, 16, 1024, 512)] * 2,
    ),
    "cifar_ceit": (5_562_634, 25_089_504, [(5, 5, 192, 192)] * 12),
    "cifar_levit": (
        7_006_522,
        76_037_888,
        [(64, 64, 64, 128)] * 2
        + [(16, 64, 128, 512)]
        + [(16, 16, 96, 192)] * 3
        + [(4, 16, 256, 1024)]
        + [(4, 4, 128, 256)] * 4,
    ),
    "cifar_mobilevit": (
        5_003_120,
        405_264_640,
        # For each of the four pixels of a patch.
        [(256, 64, 32, 32)] * 2 + [(64, 16, 32, 32)] * 4 + [(16, 4, 32, 32)] * 3,
    ),
    "cifar_vitae": (22_806_282, 104_709_888, [(4, 4, 384, 384)] * 14),
}
# Of the rows for 224 px: another stem, and more positions.
STANDARD = {
    "cifar_botnet50_224": 18_827_082 + 64 * 3 * (49 - 9) + 2 * 4 * 128 * ((14 - 8) + 2 * (7 - 4)),
    "cifar_ceit_224": 5_562_634 + 192 * (196 - 4),
    "cifar_levit_224": 7_010_140,  # as the sheet has it
    "cifar_mobilevit_224": 5_003_120,
    "cifar_vitae_224": 22_806_282,
}
# Of the performers: features of keys and queries, values by key features, and by query features.
PERFORMERS = sum(tokens * (2 * 64 * 32 + 2 * 32 * 64) for tokens in (64, 16))
# The paper's millions, which it cuts; LeViT's is of an unknown network, ViTAE's of 1000 classes.
PAPER = {"cifar_botnet50": "18.82", "cifar_ceit": "5.56", "cifar_mobilevit": "5.00"}
OTHERS = {"cifar_levit": "6.67", "cifar_vitae": "23.18"}


class CountsTest(parameterized.TestCase):
    def test_the_papers_figures(self):
        for name, figure in (PAPER | OTHERS).items():
            paper = models.member(name).paper
            self.assertEqual(paper.parameters, figure)
            self.assertEqual(paper.other, name in OTHERS)
            if name in PAPER:
                self.assertEqual(figure, cifar_study.cut(COUNTED[name][0]))
            self.assertIsNone(models.member(f"{name}_224").paper)
            self.assertEqual(models.decay_mask(name), "all")

    def test_the_paper_counts_a_thousand_classes_of_vitae(self):
        found = parity.parameters("cifar_vitae", num_classes=1000, image_size=32)
        self.assertEqual(found, 23_187_432)

    @pytest.mark.slow
    def test_marks_of_other_networks(self):
        line = table.line(table.architecture("cifar_levit"))
        self.assertRegex(line, r"cifar_levit +7\.01 +6\.67\? +32 +0\.0\d\d +conv x4 +BN$")


@pytest.mark.slow
class MultiplyAddsTest(parameterized.TestCase):
    @parameterized.parameters(*COUNTED)
    def test_is_the_sheets(self, name):
        parameters, maps, products = COUNTED[name]
        expected = maps + sum(asked * keys * (a + b) for asked, keys, a, b in products)
        expected += PERFORMERS if name == "cifar_vitae" else 0
        found = table.counted(name)
        self.assertEqual((found.parameters, found.multiply_adds), (parameters, expected))

    @sweeps.rows(*STANDARD.items())
    def test_parameters_of_standard_networks(self, name, expected):
        self.assertEqual(parity.parameters(name), expected)


class NamesTest(parameterized.TestCase):
    @sweeps.rows(*GOLDEN)
    @pytest.mark.slow
    def test_both_ways(self, golden):
        cifar_study.check_both_ways(self, GOLDEN[golden], weights(golden))

    @sweeps.rows(
        (
            "cifar_botnet50",
            r"positions have shape \(1, 4, 128, 1, 8\), but this network needs \(1,",
        ),
        (
            "cifar_levit",
            r"position biases have shape \(4, 64\), but this network needs \(4, 256\); gi",
        ),
    )
    @pytest.mark.slow
    def test_positions_belong_to_one_size(self, name, message):
        golden = next(key for key, own in GOLDEN.items() if own == name)
        with self.assertRaisesRegex(ValueError, message):
            convert.from_torch(name, weights(golden), num_classes=10, image_size=64)

    @pytest.mark.slow
    def test_ceits_positions_are_interpolated(self):
        tiny = CEIT | {"num_classes": 3}
        net = models.create("cifar_ceit", image_size=16, **tiny)
        params, stats = jax.device_get(jax.jit(net.init)(jax.random.key(0)))
        theirs = convert.to_torch("cifar_ceit", params, stats, **CEIT)
        larger, _ = convert.from_torch("cifar_ceit", theirs, image_size=32, **tiny)
        self.assertEqual(larger["pos_embedding"].shape, (1, 17, 16))
        np.testing.assert_array_equal(larger["pos_embedding"][:, 0], params["pos_embedding"][:, 0])


@pytest.mark.slow
class GoldenTest(parameterized.TestCase):
    @parameterized.parameters(*GOLDEN)
    def test_logits_and_input_gradient(self, golden):
        golden32.check(self, golden, GOLDEN[golden], weights(golden))


@pytest.mark.matrix
class BesidePyTorchTest(parameterized.TestCase):
    @parameterized.parameters(*GOLDEN)
    def test_golden(self, golden):
        golden32.check_pytorch(self, golden, GOLDEN[golden], weights(golden))


# Small networks with options next to our files in PyTorch.
BOTNET = {"depths": (1, 2), "width": 4, "heads": 2}
CEIT = {"dim": 16, "depth": 2, "heads": 1, "patch": 2, "stem_width": 4}
LEVIT = {"dims": (16, 24), "depths": (1, 2), "heads": (2, 3), "key_width": 4}
MOBILEVIT = {
    **{"channels": (4, 6, 6, 8), "strides": (1, 1, 1, 2), "dims": (6, 10), "depths": (1, 2)},
    **{"ratios": (2, 3), "heads": 2, "head_width": 3, "expansion": 2},
}
VITAE = {
    **{"widths": (6, 6, 12), "dims": (6, 8, 24), "depth": 2, "heads": 3, "mlp_ratio": 2},
    **{"groups": 12, "dilations": (2, 3, 2)},
}
OPTIONS = (
    ("cifar_botnet50", BOTNET | {"image_size": 6}),
    ("cifar_botnet50_224", BOTNET | {"image_size": 16, "activation": "gelu"}),
    ("cifar_ceit", CEIT | {"image_size": 16}),
    ("cifar_ceit", CEIT | {"image_size": 15, "patch": 1, "activation": "relu", "heads": 2}),
    ("cifar_levit", LEVIT | {"image_size": 20}),  # maps of 5 and 3
    ("cifar_levit_224", LEVIT | {"image_size": 64, "activation": "gelu"}),
    ("cifar_mobilevit", MOBILEVIT | {"image_size": 12}),  # maps of 12 and 6
    ("cifar_mobilevit", MOBILEVIT | {"image_size": 15, "strides": (2, 1, 2, 2)}),  # of 4 and 2
    ("cifar_mobilevit", MOBILEVIT | {"image_size": 8, "activation": "relu", "bn_group": 3}),
    ("cifar_vitae", VITAE | {"image_size": 16}),
    ("cifar_vitae", VITAE | {"image_size": 32, "ratios": (2, 2, 4), "activation": "relu"}),
    ("cifar_vitae", VITAE | {"image_size": 16, "groups": 2, "kernels": (5, 5, 3)}),
)


class OptionsTest(parameterized.TestCase):
    @parameterized.parameters(*OPTIONS)
    @pytest.mark.slow
    def test_beside_pytorch(self, name, options):
        cifar_study.check_options(self, name, **options)


MESSAGES = (
    ("cifar_botnet50", {"image_size": 36}, "image_size=36 cannot be halved.*; use a multiple of 8"),
    ("cifar_botnet50_224", {"image_size": 16}, "image_size=16 .*; use a multiple of 32"),
    ("cifar_botnet50", {"heads": 3}, "heads=3 must divide the 512 channels of the last stage"),
    ("cifar_botnet50", {"depths": (3,)}, "depths=.* must be two or more positive integers"),
    ("cifar_botnet50", {"activation": "elu"}, "activation='elu' is unknown; choose one of relu"),
    ("cifar_botnet50", {"dropout": 1.0}, "dropout=1.0 must be a probability"),
    (
        "cifar_ceit",
        {"patch": 3},
        "image_size=32: the stem's map of 8x8 does not divide into patches of 3x3; use "
        "image_size=36, or "
        "another patch",
    ),
    (
        "cifar_ceit",
        {"image_size": 40},
        "map of 10x10 does not divide into patches .*; use image_size=32,",
    ),
    ("cifar_ceit", {"image_size": 2}, "image_size=2: the stem's map"),
    ("cifar_ceit", {"heads": 0}, "heads=0 must be at least 1"),
    (
        "cifar_levit",
        {"image_size": 30},
        "image_size=30 is not a whole number of patches of 4 px; use image_size=32, or other stem_",
    ),
    ("cifar_levit", {"stem_strides": (2, 2)}, "needs four entries, one per convolution"),
    ("cifar_levit", {"heads": (4, 6)}, "depths=.* and heads=.* must have the same length"),
    ("cifar_levit", {"dims": (128, 100, 384)}, "multiples of key_width=16, for the heads between"),
    ("cifar_levit", {"depths": (0, 3, 4)}, "depths=.* must be a tuple of positive integers"),
    (
        "cifar_mobilevit",
        {"image_size": 8},
        "image_size=8: transformer 3 of 3 has a map of 1x1, which does not divide into patches "
        "of 2x2; use "
        "an image_size that is a multiple of 16, or smaller strides",
    ),
    ("cifar_mobilevit", {"image_size": 20}, "transformer 2 of 3 has a map of 5x5"),
    ("cifar_mobilevit_224", {"strides": (2, 1, 2, 1, 1, 2, 2, 2)}, "3 has a map of 1x1, .* of 64"),
    ("cifar_mobilevit", {"strides": (1, 2)}, "channels=.*, strides=.* must have the same length"),
    (
        *("cifar_mobilevit", {"channels": (8, 8, 8), "strides": (1, 1, 2)}),
        r"channels=\(8, 8, 8\) needs more entries than dims=",
    ),
    ("cifar_mobilevit", {"dims": (8, 0, 8)}, "dims=.* must be a tuple of positive integers"),
    ("cifar_vitae", {"image_size": 40}, "image_size=40: .* use a square, a multiple of 16 px"),
    ("cifar_vitae", {"ratios": (3, 2, 2)}, "a cell shrinks the map by 2, 4 or 8"),
    ("cifar_vitae", {"dims": (64, 64, 256)}, "last cell, 2 times 192, .* must end with 384"),
    ("cifar_vitae", {"kernels": (7, 3)}, "must have the same length: one entry for each cell"),
    ("cifar_vitae", {"groups": 7}, "groups=7 must divide the last of dims="),
)


class MessageTest(parameterized.TestCase):
    @sweeps.rows(*MESSAGES)
    def test_message(self, name, changes, message):
        cifar_study.check_message(self, name, changes, message)

    @sweeps.fast(1)
    @parameterized.parameters(
        ("cifar_botnet50", BOTNET, (8, 8), "a map of 8x8, .* positions for 16x16; create it"),
        ("cifar_ceit", CEIT, (32, 32), "a map of 8x8, .* positions for 2x2 patches of 2; create"),
        ("cifar_levit", LEVIT, (32, 32), "give 8x8 tokens, this network has biases for 4x4"),
        ("cifar_vitae", VITAE, (16, 32), r"shape \(1, 16, 32, 3\); three cells shrink the map"),
    )
    def test_images_of_another_size(self, name, options, size, message):
        cifar_study.check_images_message(self, name, size, message, image_size=16, **options)


SMALL = {
    "cifar_botnet50": BOTNET | {"image_size": 4},
    "cifar_ceit": CEIT | {"image_size": 16},
    "cifar_levit": LEVIT | {"image_size": 8},
    "cifar_mobilevit": MOBILEVIT | {"image_size": 4},
    "cifar_vitae": VITAE | {"image_size": 16},
}


class DrawsTest(parameterized.TestCase):
    @parameterized.parameters(
        ("cifar_botnet50", {}),
        ("cifar_botnet50", {"dropout": 0.0, "drop_path": 0.9}),
        ("cifar_ceit", {"drop_path": 0.9}),
        ("cifar_levit", {"drop_path": 0.9}),
        ("cifar_mobilevit", {"drop_path": 0.9}),
        ("cifar_vitae", {}),
        ("cifar_vitae", {"dropout": 0.0, "drop_path": 0.9}),
    )
    @pytest.mark.slow
    def test_only_in_training_and_with_a_key(self, name, options):
        cifar_study.check_draws(self, name, **SMALL[name] | options)

    # ViTAE of 16 px has one value for each channel and image, which has no variance.
    @parameterized.parameters(("cifar_mobilevit", 4), ("cifar_vitae", 32))
    @pytest.mark.slow
    def test_a_draw_is_the_images_own(self, name, side):
        own = SMALL[name] | {"image_size": side, "bn_group": 1, "drop_path": 0.5}
        cifar_study.check_own_draws(self, name, rtol=1e-4, **own)


@pytest.mark.slow
class StoringTest(parameterized.TestCase):
    @parameterized.parameters(
        *((name, "remat") for name in SMALL), ("cifar_ceit", "scan"), ("cifar_vitae", "scan")
    )
    def test_remat_and_scan_change_nothing(self, name, how):
        cifar_study.check_storing(self, name, how, **SMALL[name], drop_path=0.5)


class QuirksTest(absltest.TestCase):
    def test_botnets_logits_are_not_scaled(self):
        """With unit queries and keys a softmax of d = 8 differs from that of d / sqrt(d)."""
        from jaxrobust.models.modules.draws import Draws
        from jaxrobust.zoo.transformers.botnet import Attention

        module = Attention(8, 1, 2, Draws(jax.random.key(0)))
        x = np.random.default_rng(0).standard_normal((1, 2, 2, 8)).astype(np.float32)
        ask, key, value = (
            x.reshape(4, 8) @ np.asarray(part.kernel[0, 0]) + np.asarray(part.bias)
            for part in (module.query, module.key, module.value)
        )
        columns, rows = (np.asarray(part)[0, 0] for part in (module.rel_h[...], module.rel_w[...]))
        r = (columns + rows).reshape(8, 4).T
        logits = ask @ key.T + r @ ask.T
        shares = np.exp(logits - logits.max(1, keepdims=True))
        expected = shares / shares.sum(1, keepdims=True) @ value
        np.testing.assert_allclose(module(x).reshape(4, 8), expected, rtol=1e-4, atol=1e-5)
        for height, width in ((1, 2), (2, 1), (4, 4)):
            said = f"^the map is {height}x{width}, but this network has positions for 2x2; create"
            with self.assertRaisesRegex(ValueError, said):
                module(np.zeros((1, height, width, 8), np.float32))

    def test_vitaes_features_are_not_trained(self):
        from jaxrobust.models.modules.draws import Draws
        from jaxrobust.zoo.transformers.vitae import Performer

        module = Performer(4, 6, Draws(jax.random.key(0)))
        self.assertIsInstance(module.w, nnx.BatchStat)
        w = np.asarray(module.w[...])
        np.testing.assert_allclose(w @ w.T, 3 * np.eye(3), atol=1e-5)  # orthogonal, times sqrt(m)
