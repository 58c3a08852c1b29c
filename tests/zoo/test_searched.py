import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.models import table
from tests.support import cifar_study, golden32, parity, sweeps

COUNTED = {  # parameters, multiply-adds of convolutions and linear maps at 32 px
    "robnet_large_v2": (33_326_666, 5_094_615_040),
    "advrush_7_96": (32_575_018, 4_948_466_688),
    "racl_7_104": (32_509_682, 4_910_813_440),
}
SMALL = {"channels": 16, "cells": 5}
GOLDEN = {"robnet_large_v2_C16_L5": "robnet_large_v2", "racl_C16_L5": "racl_7_104"}
LISTINGS = GOLDEN | {"advrush_C16_L5": "advrush_7_96"}
PARAMETERS = {"robnet_large_v2": 408_474, "advrush_7_96": 199_930, "racl_7_104": 206_938}


class NamesTest(parameterized.TestCase):
    @sweeps.rows(*LISTINGS.items())
    def test_are_the_authors(self, listing, name):
        self.assertEqual(models.torch_keys(name, **SMALL), parity.listing(listing))


@pytest.mark.slow
class CountsTest(parameterized.TestCase):
    @parameterized.parameters(*COUNTED)
    def test_is_the_sheets(self, name):
        found = table.counted(name)
        self.assertEqual((found.parameters, found.multiply_adds), COUNTED[name])

    @sweeps.rows(*PARAMETERS.items())
    def test_small_networks(self, name, expected):
        self.assertEqual(parity.parameters(name, num_classes=10, image_size=32, **SMALL), expected)

    @sweeps.rows(*LISTINGS.items())
    def test_both_ways(self, listing, name):
        cifar_study.check_both_ways(self, name, cifar_study.weights(listing), **SMALL)


@pytest.mark.matrix
class GoldenTest(parameterized.TestCase):
    @parameterized.parameters(*GOLDEN.items())
    def test_logits_and_input_gradient(self, listing, name):
        golden32.check(self, listing, name, cifar_study.weights(listing), **SMALL)

    @parameterized.parameters(*LISTINGS.items())
    def test_beside_our_file_in_pytorch(self, listing, name):
        torch = parity.torch_or_skip(self)
        from tests.support import torch_modules

        row = models.variant(name, **SMALL)
        module = torch_modules.module("searched.py")
        net = module.model(row.cell, row.channels, row.cells).double()
        weights = {k: array.astype(np.float64) for k, array in cifar_study.weights(listing).items()}
        net.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
        x = golden32.images(3, (2, 3, 16, 16))
        theirs = parity.torch_logits_and_gradients(net, x, "float64")
        sizes = {"num_classes": 10, "image_size": 16}
        ours = parity.logits_and_gradients(name, weights, x, dtype="float64", **sizes, **SMALL)
        self.assertLess(parity.relative(ours[0], theirs[0]), 1e-9)
        self.assertLess(parity.relative(ours[1], theirs[1]), 1e-7)


class MessageTest(parameterized.TestCase):
    @sweeps.rows(
        ({"cell": "darts"}, "cell='darts' is unknown; choose one of robnet, advrush, racl"),
        ({"cells": 2}, "cells=2 must be at least 3"),
        ({"channels": 0}, "channels=0 must be at least 1"),
        ({"image_size": 30}, "image_size=30: two cells halve the map, so use a multiple of 4"),
        ({"bn_momentum": 2.0}, "bn_momentum=2.0 must be above 0 and at most 1"),
    )
    def test_message(self, changes, message):
        cifar_study.check_message(self, "racl_7_104", changes, message)


class OptionsTest(absltest.TestCase):
    @pytest.mark.slow
    def test_drop_path_leaves_edges_out(self):
        small = {"channels": 4, "cells": 3, "image_size": 8}
        cifar_study.check_draws(self, "racl_7_104", drop_path=0.9, **small)
