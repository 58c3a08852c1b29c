"""The convolutional networks of Tang et al. 2022: golden logits of the public code, and options."""

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.models import table
from jaxrobust.weights.naming import convert
from tests.support import cifar_study, golden32, parity, sweeps

# listing of the public code's network -> ours
GOLDEN = {
    "vgg16_bn": "cifar_vgg16",
    "wrn_40_10_biased": "cifar_wrn_40_10",
    "densenet_16x4_k12": "cifar_densenet",
    "preactresnet50": "cifar_preactresnet50",
    "resnext29_2x64d": "cifar_resnext29",
    "resnet50": "cifar_resnet50",
}
# Parameters, and multiply-adds of convolutions and the linear map at 32 px.
COUNTED = {
    "cifar_vgg16": (14_728_266, 313_201_664),
    "cifar_wrn_40_10": (55_856_330, 8_782_272_768),
    "cifar_densenet": (1_121_860, 296_207_022),
    "cifar_preactresnet50": (23_509_066, 1_297_829_888),
    "cifar_resnext29": (9_128_778, 1_409_492_992),
    "cifar_resnet50": (23_520_842, 1_297_829_888),
}
# With 1000 classes, as torchvision 0.28 and (preactivation) timm 1.0.9 have them.
STANDARD = {
    "cifar_vgg16_224": 138_365_992,
    "cifar_densenet_224": 7_978_856,
    "cifar_preactresnet50_224": 25_549_352,
    "cifar_resnext50_224": 25_028_904,
}


def golden_weights(golden: str):
    """Of ResNet-50 there is one more, under the names of timm."""
    return cifar_study.weights("kuangliu_resnet50" if golden == "resnet50" else golden)


class NamesTest(absltest.TestCase):
    def test_every_network_is_here(self):
        """With the paper's figures, which it cuts instead of rounding."""
        self.assertEqual(set(GOLDEN.values()), COUNTED.keys())
        for name, (parameters, _) in COUNTED.items():
            printed = models.member(name).paper.parameters
            self.assertEqual(printed, cifar_study.cut(parameters), name)
            self.assertEqual(models.decay_mask(name), "all")

    @pytest.mark.slow
    def test_resnet_under_the_names_of_the_public_code(self):
        weights = golden_weights("resnet50")
        sizes = {"num_classes": 10, "image_size": 32}
        params, stats = convert.from_torch("cifar_resnet50", weights, **sizes)
        shortcut = weights["layer2.0.shortcut.0.weight"].transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(params["layer2.0.downsample.0.kernel"], shortcut)
        mean = weights["layer4.0.shortcut.1.running_mean"]
        np.testing.assert_array_equal(stats["layer4.0.downsample.1.mean"], mean)
        np.testing.assert_array_equal(params["fc.bias"], weights["linear.bias"])
        renamed = convert.to_torch("cifar_resnet50", params, stats)
        self.assertEqual(len(renamed), len(weights))


@pytest.mark.slow
class CountsTest(parameterized.TestCase):
    @parameterized.parameters(*COUNTED)
    def test_is_the_sheets(self, name):
        found = table.counted(name)
        self.assertEqual((found.parameters, found.multiply_adds), COUNTED[name])

    @sweeps.rows(*STANDARD.items())
    def test_of_standard_networks(self, name, expected):
        self.assertEqual(parity.parameters(name, num_classes=1000), expected)

    @sweeps.rows(*sorted(GOLDEN.keys() - {"resnet50"}))
    def test_both_ways(self, golden):
        cifar_study.check_both_ways(self, GOLDEN[golden], golden_weights(golden))


@pytest.mark.slow
class GoldenTest(absltest.TestCase):
    def test_vgg(self):
        golden32.check(self, "vgg16_bn", "cifar_vgg16", golden_weights("vgg16_bn"))


@pytest.mark.matrix
class SlowGoldenTest(parameterized.TestCase):
    @parameterized.parameters(*sorted(GOLDEN.keys() - {"vgg16_bn"}))
    def test_logits_and_input_gradient(self, golden):
        golden32.check(self, golden, GOLDEN[golden], golden_weights(golden))

    @parameterized.parameters(*sorted(GOLDEN))
    def test_beside_pytorch(self, golden):
        golden32.check_pytorch(self, golden, GOLDEN[golden], golden_weights(golden))


# Small networks with options next to our files in PyTorch.
OPTIONS = (
    ("cifar_vgg16", {"widths": (8, 6), "image_size": 9, "activation": "gelu"}),
    ("cifar_vgg16_224", {"widths": (4, 6), "hidden": (9, 7), "pool": 2, "image_size": 8}),
    ("cifar_wrn_40_10", {"depths": (2, 1), "width": 1, "image_size": 7, "activation": "gelu"}),
    ("cifar_densenet", {"depths": (2, 1), "growth": 3, "stem": 5, "image_size": 7}),
    (
        "cifar_densenet_224",
        {"depths": (1, 2), "growth": 4, "stem": 6, "image_size": 17, "activation": "gelu"},
    ),
    ("cifar_preactresnet50", {"depths": (2, 1), "width": 4, "image_size": 7}),
    ("cifar_preactresnet50_224", {"depths": (1, 1), "width": 4, "image_size": 17}),
    ("cifar_resnet50", {"depths": (2, 1), "width": 4, "base": 3, "image_size": 7}),
    ("cifar_resnext29", {"depths": (2, 1), "width": 4, "image_size": 7, "activation": "gelu"}),
    ("cifar_resnext50_224", {"depths": (1, 1), "groups": 4, "width": 2, "image_size": 17}),
)


@pytest.mark.slow
class OptionsTest(parameterized.TestCase):
    @parameterized.parameters(*OPTIONS)
    def test_beside_pytorch(self, name, options):
        cifar_study.check_options(self, name, **options)


SMALL = {
    "cifar_vgg16_224": {"widths": (4,), "hidden": (8,), "pool": 2, "image_size": 4},
    "cifar_wrn_40_10": {"depths": (2,), "width": 1, "image_size": 4},
    "cifar_densenet": {"depths": (2,), "growth": 4, "stem": 4, "image_size": 4},
    "cifar_preactresnet50": {"depths": (2,), "width": 4, "image_size": 4},
    "cifar_resnext29": {"depths": (2,), "width": 4, "image_size": 4},
}


class DrawsTest(parameterized.TestCase):
    @parameterized.parameters(
        ("cifar_vgg16_224", {}),
        ("cifar_wrn_40_10", {}),
        ("cifar_wrn_40_10", {"dropout": 0.0, "drop_path": 0.9}),
        ("cifar_densenet", {"drop_path": 0.9}),
        ("cifar_preactresnet50", {"drop_path": 0.9}),
        ("cifar_resnext29", {"drop_path": 0.9}),
    )
    @pytest.mark.slow
    def test_only_in_training_and_with_a_key(self, name, options):
        cifar_study.check_draws(self, name, **SMALL[name] | options)

    def test_a_draw_is_the_images_own(self):
        name = "cifar_vgg16_224"
        cifar_study.check_own_draws(self, name, bn_group=1, **SMALL[name])


@pytest.mark.slow
class StoringTest(parameterized.TestCase):
    @parameterized.parameters(*SMALL)
    def test_remat_changes_nothing(self, name):
        rates = {} if name.startswith("cifar_vgg") else {"drop_path": 0.5}
        cifar_study.check_storing(self, name, "remat", **SMALL[name], **rates)


class MessageTest(parameterized.TestCase):
    @sweeps.rows(
        ("cifar_vgg16", {"image_size": 16}, "image_size=16: the map is halved 5 times, .* 32"),
        ("cifar_vgg16", {"widths": (8,) * 6}, "one for each of at most 5 stages"),
        ("cifar_vgg16", {"drop_path": 0.1}, "a VGG has no residual branches to leave out"),
        ("cifar_vgg16", {"hidden": (0,)}, "hidden=.* must be a tuple of positive integers"),
        ("cifar_vgg16", {"pool": 0}, "pool=0 must be at least 1"),
        ("cifar_vgg16_224", {"image_size": 32}, "read 7x7 pixels of a map .*, so use 224"),
        ("cifar_vgg16_224", {"dropout": 1.0}, "dropout=1.0 must be a probability"),
        ("cifar_wrn_40_10", {"depths": ()}, "depths=.* must be a tuple of positive integers"),
        *(
            (name, {"depths": depths}, "depths=.* must be a tuple of positive integers")
            for name in ("cifar_resnext29", "cifar_preactresnet50", "cifar_densenet")
            for depths in ((), (2, 0))
        ),
        (
            "cifar_wrn_40_10",
            {"activation": "rely"},
            "activation='rely' is unknown; choose one of relu",
        ),
        ("cifar_wrn_40_10", {"image_size": 0}, "image_size=0 must be at least 1"),
        ("cifar_densenet", {"image_size": 4}, "image_size=4: the map is halved 3 times, .* 8"),
        ("cifar_densenet", {"growth": 0}, "growth=0 must be at least 1"),
        ("cifar_preactresnet50", {"width": 0}, "width=0 must be at least 1"),
        ("cifar_resnext29", {"groups": 0}, "groups=0 must be at least 1"),
    )
    def test_message(self, name, changes, message):
        cifar_study.check_message(self, name, changes, message)
