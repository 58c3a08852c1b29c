"""CCT, CPVT, MLP-Mixer, PoolFormer and ViT of Tang et al. 2022: golden logits of the public code.

And options of small ones next to our files in PyTorch.
"""

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust import models
from jaxrobust.models.modules.draws import Draws
from jaxrobust.zoo.shared import transformer
from jaxrobust.zoo.transformers import cct
from tests.support import cifar_study, golden32, parity, sweeps

# Parameters, the sheet's multiply-adds, and those of products that it leaves out: of attention, of
# the mean of CCT's tokens by their weights, and of Mixer's maps over tokens, which are convolutions
# along one axis there. It has none of CPVT: those of blocks, patches, convolution and head.
COUNTED = {
    "cifar_cct": (3_760_139, 946_670_080, 7 * 2 * 256 * 256 * 256 + 256 * 256),
    "cifar_cpvt": (
        *(9_495_562, 6 * 65 * 6 * 512 * 512 + 64 * 48 * 512 + 9 * 64 * 512 + 512 * 10),
        6 * 2 * 65 * 65 * 512,
    ),
    "cifar_mixer": (681_746, 8_914_176, 8 * 2 * 65 * 512 * 128),
    "cifar_poolformer": (11_399_626, 145_937_408, 0),
    "cifar_vit": (9_786_378, 615_257_088, 6 * 2 * 65 * 65 * 512),
}
# Of other patches, as the sheet has them, and of standard networks with 1000 classes: the paper of
# CCT has 22.36 million of its 14/7x2, and timm's mixer_s16_224 and poolformer_s12 have as many.
PARAMETERS = (
    *(("cifar_vit", {"patch": 8}, 9_835_530), ("cifar_vit", {"patch": 2}, 9_866_250)),
    ("cifar_poolformer", {"patch": 2, "stride": 1}, 11_398_666),
    ("cifar_poolformer", {"patch": 1, "stride": 1}, 11_398_090),
    ("cifar_poolformer_224", {}, 11_407_306),
    ("cifar_cct_224", {"num_classes": 1000}, 22_367_273),
    ("cifar_mixer_224", {"num_classes": 1000}, 18_528_264),
)
# The listing of the public code's network -> ours, and its options.
GOLDEN = {
    "cct_7_3x1_32": ("cifar_cct", {}),
    "mlp_mixer_h128_s512_c64_L8_cls": ("cifar_mixer", {}),
    "poolformer_s12_k3s2p1": ("cifar_poolformer", {}),
    "vit_p8": ("cifar_vit", {"patch": 8}),
    "vit_p4_d512_L6_mlphead": ("cifar_vit", {"patch": 4}),
}
SCANNED = ("cct_7_3x1_32", "mlp_mixer_h128_s512_c64_L8_cls", "vit_p8")
TOKENS = {"dim": 16, "depth": 2, "heads": 2, "hidden": 8}
MIXER = {"dim": 16, "depth": 2, "token_hidden": 8, "hidden": 12}
POOL = {"depths": (1, 2), "dims": (8, 12)}
# Small networks: name, side of the images, options.
SMALL = (
    ("cifar_cct", 18, TOKENS),
    (
        *("cifar_cct", 18),
        TOKENS | {"convolutions": 2, "kernel": 7, "stride": 2, "activation": "relu"},
    ),
    ("cifar_cpvt", 16, TOKENS),
    ("cifar_mixer", 16, MIXER),
    ("cifar_mixer", 16, MIXER | {"class_token": False, "activation": "relu"}),
    ("cifar_poolformer", 18, POOL),
    ("cifar_poolformer", 18, POOL | {"patch": 7, "stride": 4, "activation": "relu"}),
    ("cifar_poolformer", 18, POOL | {"patch": 2}),
    ("cifar_vit", 16, TOKENS | {"patch": 8, "activation": "relu"}),
)
LARGE = (
    *(("cifar_cpvt", 32, {}), ("cifar_vit", 32, {"patch": 2}), ("cifar_poolformer_224", 224, {})),
    *((f"cifar_{name}_224", 224, {"scan": True}) for name in ("cct", "cpvt", "mixer", "vit")),
)
MESSAGES = (
    ("cifar_cct", {"kernel": 4}, "kernel=4 must be odd"),
    ("cifar_cct", {"convolutions": 0}, "convolutions=0 must be at least 1"),
    ("cifar_cct", {"heads": 5}, "heads=5 must divide dim=256"),
    ("cifar_cct", {"image_size": 0}, "image_size=0 must be at least 1"),
    ("cifar_cct", {"attention_dropout": -0.1}, "attention_dropout=-0.1 must be a probability"),
    ("cifar_cpvt", {"patch": 3}, "patch=3 does not divide images of 32 px .* use patch=2 or 4"),
    ("cifar_cpvt", {"heads": 0}, "heads=0 must be at least 1"),
    ("cifar_mixer", {"patch": 12}, "patch=12 does not divide images of 32 px .* patch=8 or 16"),
    ("cifar_mixer", {"token_hidden": 0}, "token_hidden=0 must be at least 1"),
    ("cifar_poolformer", {"patch": 35}, "patch=35 does not fit into images .* smaller patch, or"),
    ("cifar_poolformer", {"patch": 35}, "patch=35 does not fit into images of 32 px; use a"),
    (
        "cifar_poolformer",
        {"patch": 2, "stride": 4},
        "patch=2 skips pixels at stride=4; use a",
    ),
    ("cifar_poolformer", {"depths": (2, 2)}, r"depths=\(2, 2\) and dims=\(64, .* integer for each"),
    ("cifar_poolformer", {"activation": "elu"}, "activation='elu' is unknown"),
    ("cifar_vit", {"patch": 5}, "divide images of 32 px into whole patches; use patch=4 or 8, or"),
    ("cifar_vit", {"patch": 64}, "patch=64 does not divide .* use patch=32, or another"),
    ("cifar_vit", {"patch": 0}, "patch=0 does not divide .* use patch=1, or another"),
    ("cifar_vit", {"image_size": 30}, "patch=4 does not divide images of 30 px .* patch=3 or 5"),
    ("cifar_vit", {"heads": 3}, "heads=3 must divide dim=512"),
    ("cifar_vit", {"depth": 0}, "depth=0 must be at least 1"),
    ("cifar_vit", {"activation": "tanh"}, "activation='tanh' is unknown; choose one of relu, silu"),
    ("cifar_vit", {"dropout": 1.0}, "dropout=1.0 must be a probability: at least 0 and below 1"),
)


class NetworkTest(parameterized.TestCase):
    @sweeps.rows(*COUNTED)
    def test_counts(self, name):
        parameters, sheet, more = COUNTED[name]
        cifar_study.check_counts(self, name, parameters, sheet, more=more)

    @sweeps.rows(*PARAMETERS)
    def test_parameters(self, name, options, expected):
        self.assertEqual(parity.parameters(name, **options), expected)

    @parameterized.parameters(*SCANNED)
    @pytest.mark.slow
    def test_golden_logits(self, listing):
        name, options = GOLDEN[listing]
        cifar_study.check_logits(self, listing, name, scan=True, **options)

    @parameterized.parameters(*GOLDEN)
    @pytest.mark.slow
    def test_golden(self, listing):
        name, options = GOLDEN[listing]
        golden32.check(self, listing, name, cifar_study.weights(listing), **options)

    @sweeps.fast(0)
    @parameterized.parameters("", *list(GOLDEN)[:-1])
    def test_both_ways(self, listing):
        """Of CPVT there is no listing."""
        name, options = GOLDEN.get(listing, ("cifar_cpvt", {}))
        weights = cifar_study.weights(listing) if listing else cifar_study.weights_of(name)
        cifar_study.check_both_ways(self, name, weights, **options)

    @parameterized.parameters(*SMALL)
    @pytest.mark.slow
    def test_small_beside_pytorch(self, name, side, options):
        cifar_study.check_beside_pytorch(self, name, side=side, **options)

    @parameterized.parameters(*LARGE)
    @pytest.mark.matrix
    def test_beside_pytorch(self, name, side, options):
        cifar_study.check_beside_pytorch(self, name, side=side, **options)

    @parameterized.parameters(
        ("cifar_cct", {"depth": 1}),
        ("cifar_cpvt", {"patch": 4}),
        ("cifar_vit", {"patch": 4, "depth": 1}),
    )
    @pytest.mark.slow
    def test_dropout(self, name, options):
        tiny = TOKENS | {"image_size": 8} | options
        cifar_study.check_draws(self, name, factor=8, **tiny)
        cifar_study.check_own_draws(self, name, factor=8, **tiny)

    @sweeps.rows(*MESSAGES)
    def test_message(self, name, changes, message):
        cifar_study.check_message(self, name, changes, message)


class PartsTest(parameterized.TestCase):
    def test_images_of_another_size(self):
        message, tiny = (
            "20x20 px give 100 tokens, but this network has pos",
            TOKENS | {"image_size": 16},
        )
        cifar_study.check_images_message(self, "cifar_cct", (20, 20), message, **tiny)

    def test_attention_in_training_is_that_of_evaluation(self):
        """But for what is left out: written out twice, once with the draws."""
        x = np.random.default_rng(1).standard_normal((2, 5, 16)).astype(np.float32)
        module = cct.Attention(16, 2, Draws(jax.random.key(0)))
        both = jax.jit(lambda x: (module(x, None), module(x, lambda weights: weights)))(x)
        np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-6)
        qkv = (x @ np.asarray(module.qkv.kernel[...])).reshape(2, 5, 3, 2, 8)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        powers = np.exp(q @ k.swapaxes(-1, -2) / 8**0.5)
        mixed = powers / powers.sum(-1, keepdims=True) @ v
        proj = [np.asarray(part[...]) for part in (module.proj.kernel, module.proj.bias)]
        expected = mixed.swapaxes(1, 2).reshape(2, 5, 16) @ proj[0] + proj[1]
        np.testing.assert_allclose(both[0], expected, rtol=1e-5, atol=1e-6)

    def test_initialisation_is_the_references(self):
        net = models.create("cifar_vit", num_classes=10, image_size=32, depth=1)
        params, _ = net.init(jax.random.key(0))
        self.assertAlmostEqual(float(params["pos_embed"].std()), 1, 1)  # not 0.02
        bound = 48**-0.5  # PyTorch's default for a linear map of 4 x 4 x 3 pixels
        largest = float(np.abs(params["patch_embed.proj.0.kernel"]).max())
        self.assertBetween(largest, 0.99 * bound, bound)

    def test_logits_are_scaled_by_all_heads(self):
        x = jax.random.uniform(jax.random.key(1), (2, 5, 16))
        full, own = (
            transformer.Attention(16, 4, how, Draws(jax.random.key(0))) for how in (True, False)
        )
        # The root of 4 heads is 2: half the query next to the scale of a head's own width.
        own.to_qkv.kernel[...] = own.to_qkv.kernel[...] * np.repeat([0.5, 1, 1], 16)[None]
        np.testing.assert_allclose(full(x), own(x), rtol=1e-5, atol=1e-6)
