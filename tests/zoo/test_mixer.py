import pytest
from absl.testing import parameterized

from tests.support import cifar_study, golden32, parity, sweeps

LISTING = "mlp_mixer_h128_s512_c64_L8_cls"
SMALL = {"dim": 16, "depth": 2, "token_hidden": 8, "hidden": 12}


class MixerTest(parameterized.TestCase):
    def test_counts(self):
        # The sheet leaves out the maps over tokens, which are convolutions along one axis there.
        over_tokens = 8 * 2 * 65 * 512 * 128
        cifar_study.check_counts(self, "cifar_mixer", 681_746, 8_914_176, more=over_tokens)

    def test_224_is_mixer_s_16(self):
        """timm's mixer_s16_224 has as many."""
        self.assertEqual(parity.parameters("cifar_mixer_224", num_classes=1000), 18_528_264)

    def test_golden_logits(self):
        cifar_study.check_logits(self, LISTING, "cifar_mixer", scan=True)

    def test_both_ways(self):
        weights = cifar_study.weights(LISTING)
        cifar_study.check_both_ways(self, "cifar_mixer", weights)

    @pytest.mark.slow
    def test_golden(self):
        golden32.check(self, LISTING, "cifar_mixer", cifar_study.weights(LISTING))

    @parameterized.parameters({}, {"class_token": False, "activation": "relu"})
    @pytest.mark.slow
    def test_small_beside_pytorch(self, **options):
        cifar_study.check_beside_pytorch(self, "cifar_mixer", side=16, **SMALL, **options)

    @pytest.mark.matrix
    def test_224_beside_pytorch(self):
        cifar_study.check_beside_pytorch(self, "cifar_mixer_224", side=224, scan=True)

    @sweeps.rows(
        ({"patch": 12}, "patch=12 does not divide images of 32 px .* take patch=8 or 16"),
        ({"token_hidden": 0}, "token_hidden=0 must be at least 1"),
    )
    def test_message(self, changes, message):
        cifar_study.check_message(self, "cifar_mixer", changes, message)
