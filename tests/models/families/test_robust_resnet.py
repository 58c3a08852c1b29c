import functools
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.models import table
from jaxrobust.models.families import residual
from jaxrobust.models.families.robust_resnets import robust_resnet
from jaxrobust.models.families.robust_resnets.robust_resnet import VARIANTS
from jaxrobust.weights.naming import convert
from tests.support import cifar_study, golden32, parity, paths, sweeps

FAST = ("wrn_28_10",)
# Table 1 of the paper at D = 11, W = 16, in millions.
_BOTTLENECK = {"block": "bottleneck"}
ABLATIONS = (
    (_BOTTLENECK, 265.26),
    ({"block": "aggregated"}, 264.81),
    ({"block": "hierarchical", "first_conv": "raw"}, 262.21),
    ({"block": "hierarchical", "se": "residual"}, 269.94),
    (_BOTTLENECK | {"se": "standard", "se_reduction": 16}, 295.54),
    (_BOTTLENECK | {"se": "conv3x3", "se_reduction": 16}, 272.83),
    (_BOTTLENECK | {"se": "identity", "se_reduction": 16}, 293.44),
    (_BOTTLENECK | {"se": "residual", "se_reduction": 16}, 295.70),
    (_BOTTLENECK | {"se": "residual"}, 272.99),
)
SMALLER = {"depths": (2, 2, 2)}
GOLDEN = {"wrn_D222_W573": "wrn_a1", "robustres_D222_W573": "robustresnet_a1"}
PREPROCESSED = "robustres_D222_W573_silu_preproc"
# Of the authors' models/resnet.py with other arguments than the paper's, run in PyTorch 2.13: the
# defaults of its constructor, and such as no two of the sizes that they make are alike.
RELEASED = {"scales": 4, "groups": 8, "base_width": 64, "se_reduction": 16}
OTHERS = {
    "robustres_released_D211": {"depths": (2, 1, 1), "planes": (32, 48, 64)} | RELEASED,
    "robustres_C2_W27_S3": {
        **{"depths": (1, 2, 1), "planes": (48, 80, 32)},
        **{"scales": 3, "groups": 2, "base_width": 27, "se_reduction": 20},
    },
}
A1 = "robustresnet_a1"


def check_counts(test, name: str) -> None:
    found = table.counted(name)
    parameters, multiply_adds = golden32.COUNTED[name]
    test.assertEqual(found.parameters, parameters)
    test.assertLess(abs(found.multiply_adds / 1e9 / multiply_adds - 1), 1e-3)


def millions(**options) -> float:
    options |= {"num_classes": 10, "image_size": 32}
    return parity.parameters("wrn_70_16", **options) / 1e6


class CountsTest(parameterized.TestCase):
    def test_every_row_is_counted(self):
        self.assertEqual(golden32.COUNTED.keys() | {"wrn_a4_silu", "wrn_34_10"}, VARIANTS.keys())

    @parameterized.parameters(*[(name,) for name in FAST])
    def test_is_the_sheets(self, name):
        check_counts(self, name)

    @pytest.mark.slow
    def test_small_robust_res_block_is_the_reference(self):
        """robustres_D222_W573: 4,021,378 parameters, 925,756,160 multiply-adds."""
        net = models.create("robustresnet_a1", num_classes=10, image_size=32, **SMALLER)
        params, stats = jax.eval_shape(net.init, jax.random.key(0))
        self.assertEqual(sum(p.size for p in params.values()), 4_021_378)
        found = table.multiply_adds(net, params, stats, image_size=32)
        self.assertEqual(found, 925_756_160)


@pytest.mark.slow
class SlowCountsTest(parameterized.TestCase):
    @parameterized.parameters(*sorted(golden32.COUNTED.keys() - set(FAST)))
    def test_is_the_sheets(self, name):
        check_counts(self, name)

    @parameterized.parameters(*ABLATIONS)
    def test_ablations(self, options, expected):
        self.assertAlmostEqual(millions(**options), expected, delta=0.005)


class OthersTest(parameterized.TestCase):
    """RobustResBlocks of another cardinality and base width."""

    def test_the_released_defaults_are_counted(self):
        net = models.create(A1, num_classes=10, image_size=32, **RELEASED)
        params, _ = jax.eval_shape(net.init, jax.random.key(0))
        self.assertEqual(sum(p.size for p in params.values()), 144_344_330)  # of the sheet

    @parameterized.parameters(*OTHERS.items())
    def test_both_ways(self, listing, options):
        self.assertEqual(models.torch_keys(A1, **options), parity.listing(listing))
        cifar_study.check_both_ways(self, A1, cifar_study.weights(listing), **options)

    @sweeps.fast(1)
    @parameterized.parameters(*OTHERS.items())
    def test_the_pytorch_module_is_theirs(self, listing, options):
        torch = parity.torch_or_skip(self)
        from tests.support import torch_modules

        net = torch_modules.network(A1, img_size=32, num_classes=10, **options).eval()
        arrays = {k: torch.tensor(a) for k, a in cifar_study.weights(listing).items()}
        self.assertEqual(
            [(k, v.shape) for k, v in net.state_dict().items()],
            [(k, v.shape) for k, v in arrays.items()],
        )
        net.load_state_dict(arrays)
        images = torch.tensor(golden32.images().transpose(0, 3, 1, 2).astype(np.float32))
        logits = net.double()(images.double()).detach().numpy()
        theirs = golden32.stored(listing)[f"{listing}__f64"]
        self.assertLess(parity.relative(logits, theirs), 1e-9)

    def refused(self, arrays, **options) -> str:
        with self.assertRaises(ValueError) as caught:
            convert.from_torch(A1, arrays, **cifar_study.SIZES | options)
        self.assertNotIn("check the model name", str(caught.exception))
        return str(caught.exception)

    def test_shapes_say_which_options_to_give(self):
        (listing, options), (other, _) = OTHERS.items()
        arrays = cifar_study.weights(listing)
        said = self.refused(arrays, **options | {"groups": 4, "base_width": 0})
        self.assertRegex(
            said,
            r"their shapes match groups=8, base_width=64, but this robustresnet_a1 has "
            r"groups=4, base_width=0; set groups=8, base_width=64 in the options of the network:\n",
        )
        # Theirs and ours next to each other: floor(32 * 64 / 160) * 8 * 4, and 2 * 32.
        self.assertIn("bn2.bias: shape (384,), but blocks.0.layer.0.bn2.bias has shape (64,)", said)
        self.assertIn("set base_width=64 in", self.refused(arrays, **options | {"base_width": 9}))
        self.assertIn(
            "set se_reduction=16 in", self.refused(arrays, **options | {"se_reduction": 8})
        )
        self.assertIn("set num_classes=10 in", self.refused(arrays, **options, num_classes=200))
        for key in ("depths", "planes"):
            sizes = OTHERS[listing] | {key: OTHERS[other][key]}
            self.assertIn(f"set {key}={options[key]} in", self.refused(arrays, **sizes))
        found = self.refused(arrays, **options | {"scales": 8, "groups": 2, "base_width": 0})
        self.assertIn("set groups=8, scales=4, base_width=64 in", found)

    def test_weights_of_other_blocks(self):
        said = self.refused(cifar_study.weights("wrn_D222_W573"), **SMALLER)
        self.assertIn("has block='hierarchical', se='residual'; set block='basic', se='no", said)

    def test_weights_of_no_such_network_are_listed(self):
        for arrays in ({}, {"fc.weight": np.zeros((10, 7), np.float32)}):
            with self.assertRaisesRegex(ValueError, "check the model name, num_classes and image"):
                convert.from_torch(A1, arrays, **cifar_study.SIZES, **SMALLER)
        arrays = cifar_study.weights("robustres_C2_W27_S3")
        arrays["blocks.0.layer.0.conv1.weight"] = np.zeros(3, np.float32)
        with self.assertRaisesRegex(ValueError, "(?s)check the model name.* does not fit blocks.0"):
            convert.from_torch(A1, arrays, **cifar_study.SIZES, **OTHERS["robustres_C2_W27_S3"])

    def test_the_way_back_says_it_too(self):
        (listing, options), _ = OTHERS.items()
        weights = convert.from_torch(
            A1, cifar_study.weights(listing), **cifar_study.SIZES, **options
        )
        for key, said in (
            ("base_width", "set base_width=64 in the options"),
            ("scales", "set scales=4 in"),
            ("depths", r"set depths=\(2, 1, 1\) in"),
        ):
            other = {"base_width": 20, "scales": 8, "depths": (1, 1, 1)}[key]
            with self.assertRaisesRegex(ValueError, said):
                convert.to_torch(A1, *weights, **options | {key: other})

    @parameterized.parameters(
        ({"groups": 8, "base_width": 20}, "hierarchical"),
        ({"block": "aggregated", "groups": 8, "base_width": 30, "se_reduction": 16}, "aggregated"),
        ({"block": "bottleneck", "se": "conv3x3", "se_reduction": 16}, "bottleneck"),
        ({"block": "bottleneck", "se": "identity", "se_reduction": 16}, "bottleneck"),
        ({"block": "inverted", "se": "none"}, "inverted"),
        ({"scales": 5, "groups": 1, "se_reduction": 50, "in_channels": 1}, "hierarchical"),
        ({"block": "basic", "first_conv": "activated", "kernel_size": 7}, "basic"),
    )
    def test_what_shapes_tell_makes_the_same_network(self, options, block):
        sizes = {"depths": (1, 2, 1), "planes": (80, 160, 240), "first_conv": "raw"} | options
        net = models.create(A1, num_classes=7, image_size=32, **sizes)
        shapes = {
            key: array.shape
            for part in jax.eval_shape(net.init, jax.random.key(0))
            for key, array in part.items()
        }
        told = robust_resnet.options_of(shapes)
        self.assertEqual((told["block"], told["num_classes"]), (block, 7))
        kept = {key: sizes[key] for key in ("se", "first_conv") if key in sizes}
        again = models.create(A1, image_size=32, **kept | told)
        found = jax.eval_shape(again.init, jax.random.key(0))
        self.assertEqual({k: a.shape for part in found for k, a in part.items()}, shapes)


@pytest.mark.slow
class SlowOthersTest(parameterized.TestCase):
    @parameterized.parameters(*OTHERS.items())
    def test_logits_and_gradients(self, listing, options):
        golden32.check(self, listing, A1, cifar_study.weights(listing), **options)


class NamesTest(parameterized.TestCase):
    @parameterized.parameters(*GOLDEN.items())
    def test_are_the_authors(self, listing, name):
        self.assertEqual(models.torch_keys(name, **SMALLER), parity.listing(listing))

    @pytest.mark.slow
    def test_both_ways_of_the_authors_code(self):
        weights = cifar_study.weights("robustres_D222_W573")
        cifar_study.check_both_ways(self, "robustresnet_a1", weights, **SMALLER)


class GoldenTest(absltest.TestCase):
    @pytest.mark.slow
    def test_basic_blocks(self):
        weights = cifar_study.weights("wrn_D222_W573")
        golden32.check(self, "wrn_D222_W573", "wrn_a1", weights, **SMALLER)

    @pytest.mark.slow
    def test_training(self):
        weights = cifar_study.weights("wrn_D222_W573")
        golden32.check_training(self, "wrn_D222_W573", "wrn_a1", weights, **SMALLER)


@pytest.mark.matrix
class SlowGoldenTest(parameterized.TestCase):
    def test_robust_res_block(self):
        weights = cifar_study.weights("robustres_D222_W573")
        golden32.check(self, "robustres_D222_W573", "robustresnet_a1", weights, **SMALLER)

    def test_silu_and_normalisation(self):
        weights = cifar_study.weights("robustres_D222_W573")
        weights |= {key: np.array(value, np.float32) for key, value in golden32.CIFAR10.items()}
        options = SMALLER | {"activation": "silu"}
        golden32.check(self, PREPROCESSED, "robustresnet_a1", weights, **options)

    def test_training(self):
        weights = cifar_study.weights("robustres_D222_W573")
        golden = "robustres_D222_W573"
        golden32.check_training(self, golden, "robustresnet_a1", weights, **SMALLER)

    def shared(self, listing: str):
        """Weights of a listing that only shared/ has."""
        if not golden32.WHOLE.exists():
            self.skipTest(paths.NO_SHARED)
        return golden32.weights(golden32.LISTINGS / f"{listing}.tsv")

    def test_wide_resnet(self):
        weights = self.shared("wrn_28_10")
        golden32.check(self, "wrn_28_10", "wrn_28_10", weights, whole=True)

    def test_whole_a1(self):
        """With its last convolutions at a quarter: else PyTorch's float32 is 1e-4 from float64."""
        weights = self.shared("robustresnet_a1")
        quarter = {
            key: array / 4 if key.endswith("conv3.weight") else array
            for key, array in weights.items()
        }
        self.assertEqual(list(weights), models.torch_keys("robustresnet_a1"))
        golden32.check(self, "robustresnet_a1_quarter", "robustresnet_a1", quarter, whole=True)

    def test_64_pixels_and_200_classes(self):
        weights = self.shared("robustres_D222_W573")
        for key, shape in (("fc.weight", (200, 768)), ("fc.bias", (200,))):
            weights[key] = golden32.drawn(key, shape)
        golden = "robustres_D222_W573_tiny64_200"
        sizes = {"num_classes": 200, "image_size": 64, "seed": 1, "side": 64}
        golden32.check(self, golden, "robustresnet_a1", weights, whole=True, **sizes, **SMALLER)


# Options next to our file in PyTorch, on maps of 6 and 3 pixels.
TINY = {
    **{"block": "basic", "depths": (1, 2), "planes": (16, 32), "se_reduction": 16},
    "image_size": 6,
}
OPTIONS = (
    {"block": "hierarchical", "se": "residual", "first_conv": "raw"},
    {"block": "hierarchical", "activation": "softplus", "norm": "layer"},
    {"block": "hierarchical", "preact": False, "scales": 4, "groups": 2, "kernel_size": 5},
    {"block": "bottleneck", "se": "standard", "norm": "group"},
    {"block": "bottleneck", "se": "conv3x3", "activation": "gelu"},
    {"block": "bottleneck", "se": "identity", "norm": "instance"},
    {"block": "aggregated", "preact": False, "se": "residual"},
    {"block": "aggregated", "groups": 2, "base_width": 60, "first_conv": "raw"},
    {"block": "inverted", "activation": "silu"},
    {"preact": False, "kernel_size": 5},
    {"residual": False, "se": "standard"},
    {"se": "identity"},
)


class OptionsTest(parameterized.TestCase):
    @pytest.mark.slow
    def test_beside_pytorch(self):
        cifar_study.check_options(self, "wrn_28_10", **TINY | OPTIONS[0])

    @pytest.mark.slow
    def test_momentum_of_the_running_statistics(self):
        net = functools.partial(models.create, "wrn_28_10", num_classes=3, image_size=4)
        tiny = {"depths": (1,), "planes": (4,)}
        params, stats = net(**tiny).init(jax.random.key(0))
        x = jax.random.uniform(jax.random.key(1), (4, 4, 4, 3))
        moved = {
            momentum: net(bn_momentum=momentum, **tiny).apply(params, stats, x, train=True)[1]
            for momentum in (1.0, 0.25)
        }
        for key, value in moved[1.0].items():
            mixed = 0.75 * stats[key] + 0.25 * value
            np.testing.assert_allclose(moved[0.25][key], mixed, rtol=1e-6, err_msg=key)

    def test_initialisation_is_the_authors(self):
        small = {"depths": (1,), "planes": (64,), "se_reduction": 16, "image_size": 8}
        net = models.create("robustresnet_a1", num_classes=10, **small)
        params, _ = net.init(jax.random.key(0))
        # The outputs of a grouped convolution count whole: 3 * 3 * 16.
        kernel = np.concatenate([params[f"blocks.0.layer.0.conv2.{i}.kernel"] for i in range(7)])
        self.assertEqual(kernel.shape, (21, 3, 4, 16))
        self.assertAlmostEqual(float(kernel.std() / (2 / 144) ** 0.5), 1, delta=0.05)
        np.testing.assert_array_equal(params["fc.bias"], 0)
        bound = 256**-0.5
        for name in ("fc.kernel", "blocks.0.layer.0.se.fc1.kernel"):
            largest = float(np.abs(params[name]).max())
            self.assertLess(largest, bound)
            self.assertGreater(largest, 0.9 * bound)

    def test_blocks_of_a_stage_run_in_order_with_their_own_draws(self):
        def block(number, seen):
            def run(x, drop, train):
                seen.append((drop and (drop.rate, *jax.random.key_data(drop.key).tolist()), train))
                return (*x, number)

            return run

        for count in (1, 3):
            rates, seen = [0.1, 0.2, 0.3][:count], []
            blocks = [block(number, seen) for number in range(count)]
            how = {"train": True, "key": jax.random.key(0), "rates": rates}
            self.assertEqual(residual.run_stage(blocks, (), **how), tuple(range(count)))
            self.assertEqual([drop[0] for drop, _ in seen], rates)
            self.assertLen({drop[1:] for drop, _ in seen}, count)
            self.assertEqual([train for _, train in seen], [True] * count)
            seen.clear()
            residual.run_stage(blocks, (), train=False, key=None, rates=rates)
            self.assertEqual(seen, [(None, False)] * count)

    def test_the_first_block_of_a_stage_is_in_no_scan(self):
        calls = []

        def run_blocks(blocks, x, **how):
            calls.append((blocks, how))
            return x

        with mock.patch.object(residual, "run_blocks", run_blocks):
            how = {"rates": [0.0, 0.5], "scan": True, "remat": True, "train": True, "key": None}
            residual.run_stage(["a", "b"], 1, **how)
        first, rest = (how | {"rates": [0.0], "scan": False}), how | {"rates": [0.5]}
        self.assertEqual(calls, [(["a"], first), (["b"], rest)])

    @pytest.mark.slow
    def test_an_unread_norm_is_kept_and_moves(self):
        """As in the authors' code, where nothing but a projected shortcut reads `bn1`."""
        tiny = {"depths": (2,), "planes": (16,), "image_size": 4}
        net = models.create("robustresnet_a1", num_classes=3, **tiny)
        params, stats = net.init(jax.random.key(0))
        x = jax.random.uniform(jax.random.key(1), (2, 4, 4, 3))
        key = "blocks.0.layer.1.bn1"
        changed = params | {f"{key}.scale": params[f"{key}.scale"] + 3}
        plain, other = (jax.jit(net.apply)(p, stats, x)[0] for p in (params, changed))
        np.testing.assert_array_equal(plain, other)
        moved = jax.jit(functools.partial(net.apply, train=True))(params, stats, x)[1]
        self.assertGreater(parity.relative(moved[f"{key}.mean"], stats[f"{key}.var"]), 1e-3)

    @parameterized.parameters(
        ("robustresnet_a1", {"planes": (80, 8, 192)}, "planes=8: .* multiples of 16"),
        ("robustresnet_a1", {"planes": (80, 232, 192)}, "8 parts of 4 groups; .*multiples of 16"),
        ("wrn_28_10", {"block": "aggregated", "planes": (12, 16, 8)}, "4 groups; .*multiples of 8"),
        ("robustresnet_a1", {"scales": 1}, "scales=1 does not .* or block='aggregated'"),
        (
            "robustresnet_a1",
            {"scales": 4, "groups": 8, "se_reduction": 16},
            "defaults of the authors' code, .* 144,344,330 .* set base_width=64 too, or",
        ),
        ("robustresnet_a1", {"base_width": 1}, "base_width=1 leaves .* 80 planes .* at least 2"),
        ("robustresnet_a1", {"base_width": -1}, "base_width=-1 must be at least 0"),
        ("wrn_a1", {"base_width": 10}, "not to block='basic'; leave it out, or use block='aggr"),
        (
            "robustresnet_a1",
            {"cardinality": 8},
            "unknown option .'cardinality'.* 'groups', 'base_w",
        ),
        ("robustresnet_a1", {"se_reduction": 512}, "se_reduction=512 exceeds the 320 channels"),
        ("wrn_a1", {"se": "residual", "se_reduction": 100}, "exceeds the 80 channels"),
        ("wrn_a1", {"se": "residual", "se_reduction": 0}, "se_reduction=0 must be at least 1"),
        ("wrn_a1", {"kernel_size": 4}, "kernel_size=4 has no center pixel; give an odd number"),
        ("wrn_a1", {"first_conv": "raw"}, "give first_conv='activated'"),
        ("wrn_a1", {"first_conv": "rar"}, "first_conv='rar' is unknown; choose one of activated"),
        ("wrn_a1", {"block": "robust"}, "block='robust' is unknown; choose one of basic, bott"),
        ("wrn_a1", {"se": "conv3x3"}, "lacks; use block='bottleneck', or se='residual'"),
        ("wrn_a1", {"se": "identity", "residual": False}, "leave residual=False out"),
        (
            "wrn_a1",
            {"norm": "group", "planes": (44, 64, 64)},
            "44 channels cannot form 5 equal groups",
        ),
        ("wrn_a1", {"depths": (1, 2)}, "need one entry for each stage"),
        ("wrn_a1", {"depths": (1, 2, 0)}, "must be a tuple of positive integers"),
        ("wrn_a1", {"widths": (0, 1, 1)}, "must be a tuple of positive integers"),
        ("wrn_a1", {"bn_momentum": 0.0}, "bn_momentum=0.0 must be above 0"),
        ("wrn_a1", {"image_size": 0}, "image_size=0 must be at least 1"),
    )
    def test_message(self, name, changes, message):
        cifar_study.check_message(self, name, changes, message)

    def test_two_of_the_three_released_defaults_are_no_mistake(self):
        for left_out in RELEASED.keys() - {"base_width"}:
            given = {k: v for k, v in RELEASED.items() if k not in (left_out, "base_width")}
            models.create(A1, image_size=8, depths=(1,), planes=(32,), **given)  # is not refused


@pytest.mark.slow
class StoringTest(absltest.TestCase):
    def test_remat_and_scan_change_nothing(self):
        tiny = {"depths": (3, 1), "planes": (16, 16), "se_reduction": 16, "image_size": 4}
        name, hows = "robustresnet_a1", ("remat", "scan")
        cifar_study.check_storing(self, name, *hows, drop_path=0.5, **tiny)


@pytest.mark.matrix
class SlowOptionsTest(parameterized.TestCase):
    @parameterized.parameters(*OPTIONS[1:])
    def test_beside_pytorch(self, **options):
        cifar_study.check_options(self, "wrn_28_10", **TINY | options)
