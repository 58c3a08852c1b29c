from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.models.kernels import layers
from jaxrobust.models.modules.draws import Draws
from jaxrobust.zoo.shared.transformer import Attention
from tests.support import cifar_study, golden32, parity, sweeps

# listing -> patch; the reference counts convolutions and linear maps
GOLDEN = {"vit_p8": 8, "vit_p4_d512_L6_mlphead": 4}
PARAMETERS = {8: 9_835_530, 4: 9_786_378, 2: 9_866_250}
SMALL = {"dim": 16, "depth": 2, "heads": 2, "hidden": 8}


class CountsTest(parameterized.TestCase):
    def test_is_the_sheets(self):
        attention = 6 * 2 * 65 * 65 * 512
        cifar_study.check_counts(self, "cifar_vit", 9_786_378, 615_257_088, more=attention)

    @sweeps.rows(*PARAMETERS.items())
    def test_patches(self, patch, expected):
        self.assertEqual(parity.parameters("cifar_vit", patch=patch), expected)

    def test_golden_logits(self):
        cifar_study.check_logits(self, "vit_p8", "cifar_vit", scan=True, patch=8)

    def test_both_ways(self):
        weights = cifar_study.weights("vit_p8")
        cifar_study.check_both_ways(self, "cifar_vit", weights, patch=8)


class GoldenTest(parameterized.TestCase):
    @parameterized.parameters(*GOLDEN)
    @pytest.mark.slow
    def test_logits_and_input_gradient(self, listing):
        weights = cifar_study.weights(listing)
        golden32.check(self, listing, "cifar_vit", weights, patch=GOLDEN[listing])


class BesidePyTorchTest(absltest.TestCase):
    @pytest.mark.slow
    def test_small(self):
        small = SMALL | {"patch": 8, "activation": "relu"}
        cifar_study.check_beside_pytorch(self, "cifar_vit", side=16, **small)


@pytest.mark.matrix
class AllBesidePyTorchTest(absltest.TestCase):
    def test_patch_of_2(self):
        cifar_study.check_beside_pytorch(self, "cifar_vit", patch=2)

    def test_224(self):
        cifar_study.check_beside_pytorch(self, "cifar_vit_224", side=224, scan=True)


class OptionsTest(parameterized.TestCase):
    @pytest.mark.slow
    def test_dropout(self):
        tiny = SMALL | {"patch": 4, "image_size": 8, "depth": 1}
        cifar_study.check_draws(self, "cifar_vit", factor=8, **tiny)
        cifar_study.check_own_draws(self, "cifar_vit", factor=8, **tiny)

    def test_dropout_is_behind_positions_in_each_block_and_in_the_head(self):
        net = models.create("cifar_vit", num_classes=10, image_size=8, dropout=0.25, **SMALL)
        params, stats = jax.eval_shape(net.init, jax.random.key(0))
        images, seen = jax.ShapeDtypeStruct((3, 8, 8, 3), np.float32), []

        def dropout(x, key, rate):
            seen.append((x.shape, key is not None, rate))
            return x

        with mock.patch.object(layers, "dropout", dropout):
            for train in (True, False):
                how = {"train": train, "key": jax.random.key(1)}
                jax.eval_shape(lambda p, s, x: net.apply(p, s, x, **how), params, stats, images)  # noqa: B023
        drawn = [shape for shape, draws, rate in seen if draws and rate == 0.25]
        block = [(3, 5, 16), (3, 5, 8), (3, 5, 16)]  # attention, inside of the MLP, behind it
        self.assertEqual(drawn, [(3, 5, 16), *block, *block, (3, 8)])

    def test_initialisation_is_the_references(self):
        net = models.create("cifar_vit", num_classes=10, image_size=32, depth=1)
        params, _ = net.init(jax.random.key(0))
        self.assertAlmostEqual(float(params["pos_embed"].std()), 1, 1)  # not 0.02
        bound = 48**-0.5  # PyTorch's default for a linear map of 4 x 4 x 3 pixels
        largest = float(np.abs(params["patch_embed.proj.0.kernel"]).max())
        self.assertBetween(largest, 0.99 * bound, bound)

    def test_logits_are_scaled_by_all_heads(self):
        x = jax.random.uniform(jax.random.key(1), (2, 5, 16))
        full, own = (Attention(16, 4, how, Draws(jax.random.key(0))) for how in (True, False))
        # The root of 4 heads is 2: half the query next to the scale of a head's own width.
        own.to_qkv.kernel[...] = own.to_qkv.kernel[...] * np.repeat([0.5, 1, 1], 16)[None]
        np.testing.assert_allclose(full(x), own(x), rtol=1e-5, atol=1e-6)

    @sweeps.rows(
        (
            {"patch": 5},
            "patch=5 does not divide images of 32 px into whole patches; take patch=4 or 8, or",
        ),
        ({"patch": 64}, "patch=64 does not divide .* take patch=32, or another"),
        ({"patch": 0}, "patch=0 does not divide .* take patch=1, or another"),
        ({"image_size": 30}, "patch=4 does not divide images of 30 px .* take patch=3 or 5"),
        ({"heads": 3}, "heads=3 must divide dim=512"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"activation": "tanh"}, "activation='tanh' is unknown; one of relu, silu"),
        ({"dropout": 1.0}, "dropout=1.0 is a probability: at least 0 and below 1"),
    )
    def test_message(self, changes, message):
        cifar_study.check_message(self, "cifar_vit", changes, message)
