import pytest
from absl.testing import parameterized

from tests.support import cifar_study, golden32, parity, sweeps

LISTING = "poolformer_s12_k3s2p1"
SMALL = {"depths": (1, 2), "dims": (8, 12)}
# Windows of the first convolution that the sheet has counted.
PATCHES = {3: 11_399_626, 2: 11_398_666, 1: 11_398_090, 7: 11_407_306}


class PoolFormerTest(parameterized.TestCase):
    def test_counts(self):
        counted = (11_399_626, 145_937_408)
        cifar_study.check_counts(self, "cifar_poolformer", *counted, more=0)

    @sweeps.fast(3)
    @parameterized.parameters(*PATCHES.items())
    def test_patches(self, patch, expected):
        found = parity.parameters("cifar_poolformer", patch=patch, stride=1)
        self.assertEqual(found, expected)

    def test_224_is_s12(self):
        self.assertEqual(parity.parameters("cifar_poolformer_224"), PATCHES[7])

    def test_both_ways(self):
        weights = cifar_study.weights(LISTING)
        cifar_study.check_both_ways(self, "cifar_poolformer", weights)

    @pytest.mark.slow
    def test_golden(self):
        golden32.check(self, LISTING, "cifar_poolformer", cifar_study.weights(LISTING))

    @parameterized.parameters(
        {},
        {"patch": 7, "stride": 4, "activation": "relu"},
        {"patch": 2},
    )
    @pytest.mark.slow
    def test_small_beside_pytorch(self, **options):
        cifar_study.check_beside_pytorch(self, "cifar_poolformer", side=18, **SMALL, **options)

    @pytest.mark.matrix
    def test_224_beside_pytorch(self):
        cifar_study.check_beside_pytorch(self, "cifar_poolformer_224", side=224)

    @sweeps.rows(
        ({"patch": 35}, "patch=35 leaves no window in images of 32 px; take a smaller patch, or"),
        ({"patch": 2, "stride": 4}, "patch=2 leaves out pixels at stride=4; take a window at lea"),
        ({"depths": (2, 2)}, r"depths=\(2, 2\) and dims=\(64, .* one positive integer for each"),
        ({"activation": "elu"}, "activation='elu' is unknown"),
    )
    def test_message(self, changes, message):
        cifar_study.check_message(self, "cifar_poolformer", changes, message)
