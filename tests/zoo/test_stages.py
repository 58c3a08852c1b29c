"""CoAtNet, PVTv2, Swin and CvT of Tang et al. 2022: golden logits, options, messages.

What every family must do (names, counts, drop path, the row of 224 px next to PyTorch) is in
tests/models/families/test_families.py.
"""

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust import models
from jaxrobust.models import table
from jaxrobust.weights.naming import convert
from tests.support import cifar_study, golden32, parity, paths, sweeps

# CoAtNet's parameters, and the paper's Table 2 in millions, which it cuts instead of rounding.
ORDERS = {
    "CCTT": (16_997_816, "16.99"),
    "CCTC": (16_656_808, "16.65"),
    "CTTT": (17_364_176, "17.36"),
    "CTTC": (17_023_168, "17.02"),
    "CCCC": (16_022_848, "16.02"),
    "CCCT": (16_363_856, "16.36"),
    "CTCC": (16_389_208, "16.38"),
    "CTCT": (16_730_216, "16.73"),
}
FAST_ORDERS = ("CCCC", "CTTT")
# Golden arrays -> our network and options. Those of CTCT are not in the archive.
GOLDEN = {
    **{f"coatnet0_{o}": ("cifar_coatnet", {"order": o}) for o in ORDERS if o != "CTCT"},
    "pvt_v2_b1_linear": ("cifar_pvt_v2", {}),
    "pvt_v2_b1_linear_s2": ("cifar_pvt_v2", {"patch": 2}),
    "pvt_v2_b1_linear_s1": ("cifar_pvt_v2", {"patch": 1}),
    "swin_t_ws4_ds2122": ("cifar_swin", {}),
    "cvt_s1k3_stride2": ("cifar_cvt", {}),
}
SLOW = ("coatnet0_CCTT", "pvt_v2_b1_linear", "swin_t_ws4_ds2122", "cvt_s1k3_stride2")
STORED = (*SLOW, "coatnet0_CTTT", "coatnet0_CCCC", "pvt_v2_b1_linear_s1")
# Multiply-adds of convolutions and linear maps at 32 px, and those of attention's two products:
# for each block its queries, its keys and the width of all heads.
MULTIPLY_ADDS = {
    "coatnet0_CCTT": (67_413_504, [(4, 4, 256)] * 5 + [(1, 1, 256)] * 2),
    "coatnet0_CCCC": (60_699_648, []),
    "coatnet0_CTTT": (75_818_496, [(16, 16, 256)] * 3 + [(4, 4, 256)] * 5 + [(1, 1, 256)] * 2),
    "pvt_v2_b1_linear": (
        151_256_064,
        [(64, 49, 64), (16, 49, 128), (4, 49, 320), (1, 49, 512)] * 2,
    ),
    "pvt_v2_b1_linear_s1": (
        722_064_384,
        [(1024, 49, 64), (256, 49, 128), (64, 49, 320), (16, 49, 512)] * 2,
    ),
    "swin_t_ws4_ds2122": (
        1_231_855_104,
        [(256, 16, 96), (256, 16, 192)] * 2 + [(64, 16, 384)] * 6 + [(16, 16, 768)] * 2,
    ),
    "cvt_s1k3_stride2": (327_574_272, [(256, 64, 64)] + [(64, 16, 192)] * 2 + [(16, 4, 384)] * 10),
}


def weights(golden: str) -> dict[str, np.ndarray]:
    name, options = GOLDEN[golden]
    return cifar_study.weights_of(name, **options)


def check_order(test, order: str) -> None:
    expected, printed = ORDERS[order]
    test.assertEqual(parity.parameters("cifar_coatnet", image_size=32, order=order), expected)
    test.assertEqual(cifar_study.cut(expected), printed)


class CountsTest(parameterized.TestCase):
    @sweeps.rows(*FAST_ORDERS)
    def test_orders(self, order):
        check_order(self, order)

    def test_the_papers_figures(self):
        for name, count in {
            "cifar_coatnet": 16_997_816,
            "cifar_pvt_v2": 12_406_474,
            "cifar_swin": 27_428_086,
            "cifar_cvt": 19_547_466,
        }.items():
            self.assertEqual(models.member(name).paper.parameters, cifar_study.cut(count))
            self.assertIsNone(models.member(f"{name}_224").paper)
            self.assertEqual(models.decay_mask(name), "all")


@pytest.mark.slow
class SlowCountsTest(parameterized.TestCase):
    @sweeps.rows(*sorted(ORDERS.keys() - set(FAST_ORDERS)))
    def test_orders(self, order):
        check_order(self, order)

    @parameterized.parameters(*sorted(MULTIPLY_ADDS))
    def test_multiply_adds(self, golden):
        name, options = GOLDEN[golden]
        net = models.create(name, num_classes=10, image_size=32, **options)
        params, stats = jax.eval_shape(net.init, jax.random.key(0))
        maps, products = MULTIPLY_ADDS[golden]
        expected = maps + sum(2 * queries * keys * width for queries, keys, width in products)
        self.assertEqual(table.multiply_adds(net, params, stats, image_size=32), expected)


class NamesTest(parameterized.TestCase):
    @sweeps.rows(*sorted(ORDERS))
    def test_of_every_order(self, order):
        listing = golden32.LISTINGS / f"coatnet0_{order}.tsv"
        if not listing.exists():
            self.skipTest(paths.NO_SHARED)
        names = [line.split("\t")[0] for line in listing.read_text().splitlines()]
        self.assertEqual(models.torch_keys("cifar_coatnet", order=order), names[1:])

    @sweeps.rows(*SLOW)
    @pytest.mark.slow
    def test_both_ways(self, golden):
        name, options = GOLDEN[golden]
        cifar_study.check_both_ways(self, name, weights(golden), **options)

    def test_tables_of_a_larger_map_are_cut(self):
        row = {"dims": (4, 4, 4), "depths": (1, 1, 1), "order": "CT"}
        net = models.create("cifar_coatnet", image_size=32, num_classes=3, **row)
        params, stats = (
            {key: np.ones(array.shape, np.float32) for key, array in part.items()}
            for part in jax.eval_shape(net.init, jax.random.key(0))
        )
        stats["normalize.mean"] *= 0
        biases, key = np.arange(49 * 8, dtype=np.float32), "stages.2.0.attn.relative_bias_table"
        params[key] = biases.reshape(49, 8)
        theirs = convert.to_torch("cifar_coatnet", params, stats, **row)
        cut, _ = convert.from_torch("cifar_coatnet", theirs, image_size=16, num_classes=3, **row)
        inner = biases.reshape(7, 7, 8)[2:5, 2:5]
        np.testing.assert_array_equal(cut[key], inner.reshape(9, 8))
        with self.assertRaisesRegex(ValueError, "a map of side 4 do not cover side 8; keep"):
            convert.from_torch("cifar_coatnet", theirs, image_size=64, num_classes=3, **row)


@pytest.mark.slow
class GoldenTest(parameterized.TestCase):
    @parameterized.parameters(*SLOW)
    def test_logits_and_input_gradient(self, golden):
        name, options = GOLDEN[golden]
        golden32.check(self, golden, name, weights(golden), **options)


@pytest.mark.matrix
class SlowGoldenTest(parameterized.TestCase):
    @parameterized.parameters(*sorted(GOLDEN.keys() - set(SLOW)))
    def test_logits_and_input_gradient(self, golden):
        whole = golden not in STORED
        if whole and not golden32.WHOLE.exists():
            self.skipTest(paths.NO_SHARED)
        name, options = GOLDEN[golden]
        golden32.check(self, golden, name, weights(golden), whole=whole, **options)

    @parameterized.parameters(*sorted(STORED))
    def test_beside_pytorch(self, golden):
        name, options = GOLDEN[golden]
        golden32.check_pytorch(self, golden, name, weights(golden), **options)


# Small networks with options next to our files in PyTorch.
COATNET = {"dims": (6, 8, 10), "depths": (2, 1, 2), "heads": 2, "head_dim": 3, "image_size": 16}
PVT = {"dims": (6, 8), "depths": (1, 2), "heads": (2, 1), "ratios": (3, 2)}
SWIN = {"dim": 6, "depths": (2, 2), "heads": (2, 3), "merges": (2,)}
CVT = {"dims": (6, 8), "depths": (1, 2), "heads": (1, 2), "head_dim": 3}
OPTIONS = (
    ("cifar_coatnet", COATNET | {"order": "CT"}),
    ("cifar_coatnet", COATNET | {"order": "CC", "activation": "relu"}),
    ("cifar_coatnet", COATNET | {"order": "CT", "activation": "relu", "image_size": 24}),
    ("cifar_pvt_v2", PVT | {"image_size": 20}),  # maps of 5 and 3, both below 7 x 7
    ("cifar_pvt_v2", PVT | {"image_size": 18, "patch": 2, "activation": "relu"}),  # 9 and 5
    ("cifar_pvt_v2", PVT | {"image_size": 14, "patch": 1}),  # 14 and 7
    ("cifar_swin", SWIN | {"image_size": 16}),
    ("cifar_swin", SWIN | {"image_size": 12, "patch": 2, "window": 3, "activation": "relu"}),
    ("cifar_cvt", CVT | {"image_size": 14}),  # maps of 7 and 4, keys of 4 and 2
    ("cifar_cvt", CVT | {"image_size": 20, "window": 5, "patch": 4, "activation": "relu"}),
)


class OptionsTest(parameterized.TestCase):
    @parameterized.parameters(*OPTIONS)
    @pytest.mark.slow
    def test_beside_pytorch(self, name, options):
        cifar_study.check_options(self, name, **options)


MESSAGES = (
    (
        "cifar_coatnet",
        {"order": "TCTT"},
        r"T \(attention\) for the others; write 'CCTT', for example",
    ),
    ("cifar_coatnet", {"order": "CCT"}, "order='CCT' must name the 4 stages after the stem: C "),
    ("cifar_coatnet", {"order": "CCTTT"}, "order='CCTTT' must name the 4 stages"),
    ("cifar_coatnet", {"order": "CXTT"}, r"C \(convolutions\) for the first, C or T"),
    ("cifar_coatnet", {"order": ""}, "order='' must name the 4 stages"),
    ("cifar_coatnet", {"image_size": 48}, "the 5 stages halves the map, so use a multiple of 32"),
    ("cifar_coatnet", {"image_size": 0}, "image_size=0 must be at least 1"),
    ("cifar_coatnet", {"depths": (2, 2)}, "depths=.* and dims=.* must have the same length"),
    ("cifar_coatnet", {"dims": ()}, r"dims=\(\) must be a tuple of positive integers"),
    ("cifar_coatnet", {"dims": (3, 4, 4, 4, 4)}, "at least 4, because squeeze layers have a quart"),
    ("cifar_coatnet", {"heads": 0}, "heads=0 must be at least 1"),
    (
        "cifar_coatnet",
        {"activation": "elu"},
        "activation='elu' is unknown; choose one of relu, silu",
    ),
    ("cifar_pvt_v2", {"patch": 3}, "patch=3 must divide image_size=32 .*; use one of 1, 2, 4$"),
    ("cifar_pvt_v2", {"patch": 8}, "patch=8 .* be below the 7 pixels of the first window"),
    ("cifar_pvt_v2", {"patch": 0}, "patch=0 must divide image_size=32"),
    ("cifar_pvt_v2", {"image_size": 0}, "image_size=0 must be at least 1"),
    ("cifar_pvt_v2", {"heads": (3, 2, 5, 8)}, "must divide dims=.*, stage by stage"),
    ("cifar_pvt_v2", {"ratios": (8, 8)}, "ratios=.* and dims=.* must have the same length"),
    ("cifar_pvt_v2", {"depths": (0, 2, 2, 2)}, "must be a tuple of positive integers"),
    (
        "cifar_pvt_v2",
        {"activation": "elu"},
        "activation='elu' is unknown; choose one of relu, silu",
    ),
    (
        "cifar_swin",
        {"patch": 3},
        r"patch=3 and merges=\(1, 2, 2\) do not divide image_size=32: stage 1 joins 3 pixels per "
        "side; choose another patch",
    ),
    (
        "cifar_swin",
        {"patch": 4},
        "leave a map of side 2 in stage 4, which is not a whole number of windows of 4; "
        "choose another patch, other merges or a window other than 4",
    ),
    ("cifar_swin", {"patch": 16}, "leave a map of side 2 in stage 1"),
    ("cifar_swin", {"depths": (2, 2, 5, 2)}, "must be even: every second block is shifted"),
    ("cifar_swin", {"merges": (1, 2)}, "merges=.* one for each stage but the first"),
    ("cifar_swin", {"merges": (1, 2, 0)}, "must be a tuple of positive integers"),
    ("cifar_swin", {"heads": (5, 6, 12, 24)}, "must divide dim=96, which doubles at every stage"),
    ("cifar_swin", {"window": 1}, "window=1: attention needs windows of at least 2"),
    ("cifar_swin", {"image_size": 0}, "image_size=0 must be at least 1"),
    ("cifar_swin", {"activation": "elu"}, "activation='elu' is unknown; choose one of relu, silu"),
    (
        "cifar_cvt",
        {"patch": 4},
        "patch=4 must divide image_size=32 and be at most the window of 3; use one of 1, 2$",
    ),
    ("cifar_cvt", {"patch": 3, "window": 7}, "patch=3 must divide .*; use one of 1, 2, 4$"),
    ("cifar_cvt", {"window": 4}, "window=4 must be odd, such as 3 or 7"),
    ("cifar_cvt", {"heads": (1, 3)}, "heads=.* and dims=.* must have the same length"),
    ("cifar_cvt", {"head_dim": 0}, "head_dim=0 must be at least 1"),
    ("cifar_cvt", {"activation": "elu"}, "activation='elu' is unknown; choose one of relu, silu"),
)


class MessageTest(parameterized.TestCase):
    @sweeps.rows(*MESSAGES)
    def test_message(self, name, changes, message):
        cifar_study.check_message(self, name, changes, message)

    def test_images_of_another_size(self):
        for name, options, size, message in (
            ("cifar_coatnet", COATNET | {"order": "CT"}, (8, 8), "biases of image_size=16; create"),
            ("cifar_swin", SWIN | {"image_size": 16}, (8, 8), "a map of side 2 in stage 2"),
            ("cifar_swin", SWIN | {"image_size": 16}, (16, 24), "16 x 24 pixels: the windows need"),
        ):
            cifar_study.check_images_message(self, name, size, message, **options)


@pytest.mark.slow
class DropPathTest(parameterized.TestCase):
    """Of those with batch norms; of the others: tests/models/families/test_families.py."""

    @parameterized.parameters(
        ("cifar_coatnet", COATNET | {"order": "CT"}), ("cifar_cvt", CVT | {"image_size": 8})
    )
    def test_leaves_branches_out(self, name, options):
        cifar_study.check_draws(self, name, drop_path=0.9, **options)


@pytest.mark.slow
class StoringTest(parameterized.TestCase):
    @parameterized.parameters(
        ("cifar_coatnet", COATNET | {"order": "CT"}),
        ("cifar_pvt_v2", PVT | {"image_size": 8}),
        ("cifar_swin", SWIN | {"image_size": 16}),
        ("cifar_cvt", CVT | {"image_size": 8}),
    )
    def test_remat_changes_nothing(self, name, options):
        cifar_study.check_storing(self, name, "remat", drop_path=0.5, **options)
