"""The convolutional networks of Tang et al. 2022: golden logits of the public code, and options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.models import table
from jaxrobust.weights import convert
from tests.support import golden32, parity, paths

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


def listing(golden: str):
    """Of ResNet-50 there is one more, under the names of timm."""
    name = "kuangliu_resnet50" if golden == "resnet50" else golden
    return paths.GOLDEN / "models" / f"{name}.tsv"


def golden_weights(golden: str):
    return golden32.weights(listing(golden))


class NamesTest(absltest.TestCase):
    def test_every_network_is_here(self):
        """With the paper's figures, which it cuts instead of rounding."""
        self.assertEqual(GOLDEN.keys(), dict.fromkeys(GOLDEN).keys())
        for name, (parameters, _) in COUNTED.items():
            printed = models.member(name).paper.parameters
            self.assertEqual(printed, f"{parameters // 10_000 / 100:.2f}", name)
            self.assertEqual(models.decay_mask(name), "all")

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
        found = table.architecture(name)
        self.assertEqual((found.parameters, found.multiply_adds), COUNTED[name])

    @parameterized.parameters(*STANDARD.items())
    def test_of_standard_networks(self, name, expected):
        self.assertEqual(parity.parameters(name, num_classes=1000), expected)

    @parameterized.parameters(*sorted(GOLDEN.keys() - {"resnet50"}))
    def test_both_ways(self, golden):
        name, weights = GOLDEN[golden], golden_weights(golden)
        params, stats = convert.from_torch(name, weights, num_classes=10, image_size=32)
        back = convert.to_torch(name, params, stats)
        self.assertEqual(list(back), list(weights))
        for key, array in back.items():
            np.testing.assert_array_equal(array, weights[key], key)


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


# Small networks with options beside our files in PyTorch.
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
    ("cifar_resnext29", {"depths": (2, 1), "width": 4, "image_size": 7, "activation": "gelu"}),
    ("cifar_resnext50_224", {"depths": (1, 1), "groups": 4, "width": 2, "image_size": 17}),
)


def check_options(test, name: str, options) -> None:
    """Logits, input gradient, and logits and statistics of training, in float64."""
    torch = parity.torch_or_skip(test)
    from jaxrobust.convert import torch_networks

    options, size = dict(options), options["image_size"]
    fields = models.computed(name, {k: v for k, v in options.items() if k != "image_size"})
    net = torch_networks.module(models.member(name).reference.base).model(**fields, num_classes=10)
    weights = {
        key: golden32.drawn(key, tuple(value.shape)).astype(np.float64)
        if value.is_floating_point()
        else value.numpy()
        for key, value in net.state_dict().items()
    }
    net.double().load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    x = np.random.default_rng(0).random((3, size, size, 3))
    theirs = parity.torch_logits_and_gradients(net, x, "float64")
    for module in net.train().modules():  # what is dropped cannot be compared
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trained = net(torch.from_numpy(x.transpose(0, 3, 1, 2))).detach().numpy()
    after = torch_networks.state_arrays(net)
    ours = parity.logits_and_gradients(name, weights, x, dtype="float64", num_classes=10, **options)
    test.assertLess(parity.relative(ours[0], theirs[0]), 1e-9)
    test.assertLess(parity.relative(ours[1], theirs[1]), 1e-7)
    if "dropout" in models.variant(name)._fields:
        options["dropout"] = 0.0
    with jax.enable_x64(True):
        own, params, stats = golden32.network(name, weights, "float64", **options)
        train = jax.jit(functools.partial(own.apply, train=True))
        logits, moved = jax.device_get(train(params, stats, x))
        _, expected = convert.from_torch(name, after, num_classes=10, **options)
    test.assertLess(parity.relative(logits, trained), 1e-9)
    for key, value in moved.items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-9, atol=1e-12, err_msg=key)


@pytest.mark.slow
class OptionsTest(parameterized.TestCase):
    @parameterized.parameters(*OPTIONS)
    def test_beside_pytorch(self, name, options):
        check_options(self, name, options)


SMALL = {
    "cifar_vgg16_224": {"widths": (4,), "hidden": (8,), "pool": 2, "image_size": 4},
    "cifar_wrn_40_10": {"depths": (2,), "width": 1, "image_size": 4},
    "cifar_densenet": {"depths": (2,), "growth": 4, "stem": 4, "image_size": 4},
    "cifar_preactresnet50": {"depths": (2,), "width": 4, "image_size": 4},
    "cifar_resnext29": {"depths": (2,), "width": 4, "image_size": 4},
}


def small(name: str, **options):
    """(network, params, stats, images)."""
    net = models.create(name, num_classes=3, **SMALL[name], **options)
    params, stats = net.init(jax.random.key(0))
    return net, params, stats, jax.random.uniform(jax.random.key(1), (4, 4, 4, 3))


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
        net, params, stats, x = small(name, **options)
        train = jax.jit(lambda key: net.apply(params, stats, x, train=True, key=key)[0])
        first, again, second = (train(jax.random.key(seed)) for seed in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        self.assertGreater(parity.relative(first, second), 1e-3)
        with self.assertRaisesRegex(ValueError, "draws in training: call apply with a key"):
            net.apply(params, stats, x, train=True)
        plain = {
            key: 0.0 for key in ("dropout", "drop_path") if key in models.variant(name)._fields
        }
        without = small(name, **plain)[0]
        evaluated = [jax.jit(n.apply)(params, stats, x)[0] for n in (net, without)]
        np.testing.assert_array_equal(*evaluated)

    def test_a_draw_is_the_images_own(self):
        """Dropout of an image does not depend on its place in the batch."""
        net, params, stats, x = small("cifar_vgg16_224", bn_group=1)
        keys = jax.random.split(jax.random.key(3), 4)
        train = jax.jit(lambda x, keys: net.apply(params, stats, x, train=True, key=keys)[0])
        np.testing.assert_allclose(
            train(x[::-1], keys[::-1]), train(x, keys)[::-1], rtol=1e-5, atol=1e-6
        )


@pytest.mark.slow
class StoringTest(parameterized.TestCase):
    @parameterized.parameters(*SMALL)
    def test_remat_changes_nothing(self, name):
        rates = {} if name.startswith("cifar_vgg") else {"drop_path": 0.5}

        def trained(**how):
            net, params, stats, x = small(name, dtype="float64", **rates, **how)
            double = functools.partial(jax.tree.map, lambda array: array.astype(jnp.float64))

            def total(params):
                logits, moved = net.apply(
                    params, double(stats), double(x), train=True, key=jax.random.key(2)
                )
                return (logits**2).sum(), moved

            return jax.device_get(jax.jit(jax.value_and_grad(total, has_aux=True))(double(params)))

        with jax.enable_x64(True):
            (value, moved), gradient = trained()
            (again, moved_again), gradient_again = trained(remat=True)
            self.assertLess(abs(again / value - 1), 1e-11)  # sums in another order
            for ours, theirs in ((moved_again, moved), (gradient_again, gradient)):
                self.assertEqual(ours.keys(), theirs.keys())
                for key in ours:
                    largest = max(np.abs(theirs[key]).max(), 1e-3)
                    self.assertLess(np.abs(ours[key] - theirs[key]).max(), 1e-9 * largest, key)


class MessageTest(parameterized.TestCase):
    @parameterized.parameters(
        ("cifar_vgg16", {"image_size": 16}, "image_size=16: the map is halved 5 times, .* 32"),
        ("cifar_vgg16", {"widths": (8,) * 6}, "one for each of at most 5 stages"),
        ("cifar_vgg16", {"drop_path": 0.1}, "a VGG has no residual branches to leave out"),
        ("cifar_vgg16", {"hidden": (0,)}, "hidden=.* must be a tuple of positive integers"),
        ("cifar_vgg16", {"pool": 0}, "pool=0 must be at least 1"),
        ("cifar_vgg16_224", {"image_size": 32}, "read 7x7 pixels of a map .*, so take 224"),
        ("cifar_vgg16_224", {"dropout": 1.0}, "dropout=1.0 is a probability"),
        ("cifar_wrn_40_10", {"depths": ()}, "depths=.* must be a tuple of positive integers"),
        ("cifar_wrn_40_10", {"activation": "rely"}, "activation='rely' is unknown; one of relu"),
        ("cifar_wrn_40_10", {"image_size": 0}, "image_size=0 must be at least 1"),
        ("cifar_densenet", {"image_size": 4}, "image_size=4: the map is halved 3 times, .* 8"),
        ("cifar_densenet", {"growth": 0}, "growth=0 must be at least 1"),
        ("cifar_preactresnet50", {"width": 0}, "width=0 must be at least 1"),
        ("cifar_resnext29", {"groups": 0}, "groups=0 must be at least 1"),
    )
    def test_message(self, name, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            models.create(name, **{"num_classes": 10, "image_size": 32} | changes)


if __name__ == "__main__":
    absltest.main()
