import jax
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust.models.modules.draws import Draws
from jaxrobust.zoo.transformers.cct import Attention
from tests.support import cifar_study, golden32, parity, sweeps

LISTING = "cct_7_3x1_32"
SMALL = {"dim": 16, "depth": 2, "heads": 2, "hidden": 8}


class CCTTest(parameterized.TestCase):
    def test_counts(self):
        # Attention's two products, and the mean of the tokens by their weights.
        more = 7 * 2 * 256 * 256 * 256 + 256 * 256
        cifar_study.check_counts(self, "cifar_cct", 3_760_139, 946_670_080, more)

    def test_224_is_14_7x2(self):
        """With 1000 classes: the 22.36 million of the paper of CCT."""
        found = parity.parameters("cifar_cct_224", num_classes=1000)
        self.assertAlmostEqual(found / 1e6, 22.36, delta=0.01)

    def test_golden_logits(self):
        cifar_study.check_logits(self, LISTING, "cifar_cct", scan=True)

    def test_both_ways(self):
        cifar_study.check_both_ways(self, "cifar_cct", cifar_study.weights(LISTING))

    @pytest.mark.slow
    def test_golden(self):
        golden32.check(self, LISTING, "cifar_cct", cifar_study.weights(LISTING))

    @parameterized.parameters(
        {}, {"convolutions": 2, "kernel": 7, "stride": 2, "activation": "relu"}
    )
    @pytest.mark.slow
    def test_small_beside_pytorch(self, **options):
        cifar_study.check_beside_pytorch(self, "cifar_cct", side=18, **SMALL, **options)

    @pytest.mark.matrix
    def test_224_beside_pytorch(self):
        cifar_study.check_beside_pytorch(self, "cifar_cct_224", side=224, scan=True)

    @pytest.mark.slow
    def test_dropout(self):
        tiny = SMALL | {"image_size": 8, "depth": 1}
        cifar_study.check_draws(self, "cifar_cct", factor=8, **tiny)
        cifar_study.check_own_draws(self, "cifar_cct", factor=8, **tiny)

    def test_images_of_another_size(self):
        message, tiny = "20x20 px give 100 tokens, this network has pos", SMALL | {"image_size": 16}
        cifar_study.check_images_message(self, "cifar_cct", (20, 20), message, **tiny)

    def test_attention_in_training_is_that_of_evaluation(self):
        """But for what is left out: written out twice, once with the draws."""
        x = np.random.default_rng(1).standard_normal((2, 5, 16)).astype(np.float32)
        module = Attention(16, 2, Draws(jax.random.key(0)))
        both = jax.jit(lambda x: (module(x, None), module(x, lambda weights: weights)))(x)
        np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-6)
        qkv = (x @ np.asarray(module.qkv.kernel[...])).reshape(2, 5, 3, 2, 8)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        powers = np.exp(q @ k.swapaxes(-1, -2) / 8**0.5)
        mixed = powers / powers.sum(-1, keepdims=True) @ v
        proj = [np.asarray(part[...]) for part in (module.proj.kernel, module.proj.bias)]
        expected = mixed.swapaxes(1, 2).reshape(2, 5, 16) @ proj[0] + proj[1]
        np.testing.assert_allclose(both[0], expected, rtol=1e-5, atol=1e-6)

    @sweeps.rows(
        ({"kernel": 4}, "kernel=4 must be odd"),
        ({"convolutions": 0}, "convolutions=0 must be at least 1"),
        ({"heads": 5}, "heads=5 must divide dim=256"),
        ({"image_size": 0}, "image_size=0 must be at least 1"),
        ({"attention_dropout": -0.1}, "attention_dropout=-0.1 is a probability"),
    )
    def test_message(self, changes, message):
        cifar_study.check_message(self, "cifar_cct", changes, message)
