import pytest
from absl.testing import parameterized

from tests.support import cifar_study, sweeps

SMALL = {"dim": 16, "depth": 2, "heads": 2, "hidden": 8}


class CPVTTest(parameterized.TestCase):
    def test_counts(self):
        # The sheet has no multiply-adds of it: those of blocks, patches, convolution and head.
        blocks = 6 * 65 * (4 * 512 * 512 + 2 * 512 * 512)
        others = 64 * 48 * 512 + 9 * 64 * 512 + 512 * 10
        attention = 6 * 2 * 65 * 65 * 512
        cifar_study.check_counts(self, "cifar_cpvt", 9_495_562, blocks + others, more=attention)

    def test_both_ways(self):
        cifar_study.check_both_ways(self, "cifar_cpvt", cifar_study.weights_of("cifar_cpvt"))

    @pytest.mark.slow
    def test_small_beside_pytorch(self):
        cifar_study.check_beside_pytorch(self, "cifar_cpvt", side=16, **SMALL)

    @parameterized.parameters(("cifar_cpvt", 32), ("cifar_cpvt_224", 224))
    @pytest.mark.matrix
    def test_beside_pytorch(self, name, side):
        cifar_study.check_beside_pytorch(self, name, side=side, scan=side == 224)

    @pytest.mark.slow
    def test_dropout(self):
        tiny = SMALL | {"patch": 4, "image_size": 8}
        cifar_study.check_draws(self, "cifar_cpvt", factor=8, **tiny)
        cifar_study.check_own_draws(self, "cifar_cpvt", factor=8, **tiny)

    @sweeps.rows(
        ({"patch": 3}, "patch=3 does not divide images of 32 px .* take patch=2 or 4"),
        ({"heads": 0}, "heads=0 must be at least 1"),
    )
    def test_message(self, changes, message):
        cifar_study.check_message(self, "cifar_cpvt", changes, message)
