import copy
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.models.families import residual, resnet
from jaxrobust.models.modules.draws import Draws
from jaxrobust.weights.naming import convert
from tests.support import parity, paths, reference, sweeps
from tests.support.families import CASES

SMALL = {"depths": (1, 1), "num_classes": 5, "image_size": 16, "small_stem": True}


def torch_network(name: str, num_classes: int = 10):
    """The reference network in float64, or a skip."""
    try:
        import torch  # noqa: F401

        from tools.bench import torch_reference  # noqa: F401
    except ImportError as error:
        raise absltest.SkipTest(paths.PARITY) from error
    return parity.torch_network(name, num_classes, 64).double()


def ours_of(name, net, **overrides):
    """Our network with the weights of a torch one, in float64; to be called in x64."""
    from jaxrobust.publish.torch_networks import state_arrays

    ours = models.create(name, num_classes=10, image_size=64, dtype="float64", **overrides)
    params, stats = jax.eval_shape(ours.init, jax.random.key(0))
    shapes = {k: v.shape for k, v in (params | stats).items() if not k.startswith("normalize.")}
    arrays = convert.rename(models.torch_names(name), state_arrays(net), shapes)
    filled = arrays | {"normalize.mean": np.zeros(3), "normalize.std": np.ones(3)}
    filled = jax.tree.map(jnp.asarray, filled)
    return ours, {k: filled[k] for k in params}, {k: filled[k] for k in stats}


class ShortcutTest(parameterized.TestCase):
    @parameterized.parameters((1, 8, 8, 0), (2, 8, 8, 2), (1, 8, 16, 2), (2, 8, 16, 2))
    def test_projects_where_the_shape_changes(self, stride, ins, outs, layers):
        row, rngs = SimpleNamespace(bn_group=0), Draws(jax.random.key(0))
        shortcut = residual.shortcut(ins, outs, stride, row, rngs)
        self.assertLen(shortcut, layers)
        x = jnp.ones((1, 4, 4, ins))
        side = 4 // stride
        self.assertEqual(residual.through(shortcut, x, False).shape, (1, side, side, outs))


class NamesTest(parameterized.TestCase):
    def test_parameter_count_of_the_small_stem(self):
        count = parity.parameters("resnet50", num_classes=10, image_size=32, small_stem=True)
        self.assertEqual(count, 23_520_842)  # `resnet50_32` of dedeswim/vits-robustness-torch

    @pytest.mark.slow
    def test_eight_way_batch_norm(self):
        theirs = paths.GOLDEN / "models" / "advres50_gelu_bai_eightbn.tsv"
        weights = reference.seeded_weights(theirs)  # what is not used is random too
        params, stats = convert.from_torch("resnet50_gelu", weights)
        plain = {}
        for key in parity.listing("resnet50_gelu"):
            module, _, part = key.rpartition(".")
            if key in weights:
                plain[key] = weights[key]
            elif part.startswith("running"):
                whole = weights[f"{module}.bn0.proxy_bn.{part}"]
                plain[key] = whole[: len(whole) // 2]
            elif part != "num_batches_tracked":
                plain[key] = weights[f"{module}.aff.bnconv.{part}"].reshape(-1)
        same_params, same_stats = convert.from_torch("resnet50_gelu", plain)
        same_stats |= {f"normalize.{k}": np.full(3, 0.5, np.float32) for k in ("mean", "std")}
        for ours, expected in ((params, same_params), (stats, same_stats)):
            self.assertEqual(ours.keys(), expected.keys())
            for key in ours:
                np.testing.assert_array_equal(ours[key], expected[key], key)

    def test_eight_way_batch_norm_is_of_networks_with_gelu(self):
        other, _ = models.other_names("resnet50")
        self.assertEqual(other.of, "resnet50_gelu")
        fitting = [name for name in CASES["resnet"].counts if other.fits(models.variant(name))]
        self.assertEqual(fitting, [other.of])
        theirs = paths.GOLDEN / "models" / "advres50_gelu_bai_eightbn.tsv"
        message = "weights of resnet50_gelu .*eight-way.*, not of (a )?resnet50"
        with self.assertRaisesRegex(ValueError, message):
            convert.from_torch("resnet50", reference.seeded_weights(theirs))

    @parameterized.parameters(((),), ((3,),), ((4, 2),))
    def test_statistics_that_are_not_of_two_groups(self, shape):
        with self.assertRaisesRegex(ValueError, "does not match the statistics of two groups"):
            resnet._first_half(np.zeros(shape, np.float32))

    def test_message_on_statistics_that_are_not_of_two_groups(self):
        theirs = paths.GOLDEN / "models" / "advres50_gelu_bai_eightbn.tsv"
        weights = reference.seeded_weights(theirs)
        weights["bn1.bn0.proxy_bn.running_mean"] = np.zeros((), np.float32)
        message = r"bn1\.bn0\.proxy_bn\.running_mean: shape \(\) does not fit"
        with self.assertRaisesRegex(ValueError, message):
            convert.from_torch("resnet50_gelu", weights)


class GoldenTest(parameterized.TestCase):
    def test_resnet18_in_float32(self):
        """In the second image units are near 0, where ReLU's derivative jumps.

        The gradients of PyTorch in float32 and float64 differ there by 3e-4 of the largest entry on
        one CPU and 2.4e-3 on another; float64 agrees below, on both images.
        """
        first = slice(1)
        parity.check_golden(self, "resnet18", "Salman2020Do_R18", dtype="float32", smooth=first)


@pytest.mark.matrix
class SlowGoldenTest(parameterized.TestCase):
    def test_wide_resnet_in_float32(self):
        """Its stored float32 gradient is one of two: they differ by 5e-4 of the largest entry.

        One unit of the third stage is 1e-7 from 0, where ReLU's derivative jumps, and lies on one
        side or the other as sums are rounded. The reference's own error is therefore taken from a
        reference that runs here, over the whole gradient.
        """
        listing = "Salman2020Do_50_2"
        weights = reference.seeded_weights(paths.GOLDEN / "models" / f"{listing}.tsv")
        images, stored = reference.golden_images(), parity.golden_logits(listing)
        logits, gradient = parity.logits_and_gradients("wide_resnet50_2", weights, images)
        self.assertLess(parity.relative(logits, stored["f32"]), 1e-5)
        net = torch_network("wide_resnet50_2", num_classes=1000)
        import torch

        bare = {k.removeprefix("model."): torch.tensor(v) for k, v in weights.items()}
        net = copy.deepcopy(net).float()
        net.load_state_dict({k: bare[k] for k in net.state_dict()})
        # The derivative of the normalization is a factor for each channel.
        mean, std = (weights[f"normalize.{k}"].reshape(3) for k in ("mean", "std"))
        theirs = {
            dtype: parity.torch_logits_and_gradients(
                net, (images.astype(dtype) - mean) / std, dtype
            )
            for dtype in ("float32", "float64")
        }
        single, double = (theirs[dtype][1] / std for dtype in ("float32", "float64"))
        own = parity.relative(single, double)
        self.assertLess(parity.relative(gradient, double), 2 * own)


@pytest.mark.slow
class ReferenceTest(absltest.TestCase):
    def test_logits_and_input_gradients(self):
        parity.check_reference(self, "resnet18", image_size=64)


@pytest.mark.matrix
class SlowReferenceTest(parameterized.TestCase):
    def test_small_stem(self):
        net = torch_network("resnet50")
        import torch

        conv, pool = net.conv1, net.maxpool
        self.addCleanup(lambda: (setattr(net, "conv1", conv), setattr(net, "maxpool", pool)))
        net.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False).double()
        net.maxpool = torch.nn.Identity()
        images = np.random.default_rng(0).random((2, 32, 32, 3))
        with torch.no_grad():
            theirs = net.eval()(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
        with jax.enable_x64(True):
            ours, params, stats = ours_of("resnet50", net, small_stem=True)
            logits, _ = jax.jit(ours.apply)(params, stats, images)
        self.assertLess(parity.relative(logits, theirs), 1e-9)


class TrainModeTest(absltest.TestCase):
    """Against the reference in training mode, in float64: values, statistics and gradients."""

    group = 0

    @pytest.mark.slow
    def test_batch_statistics(self):
        group = self.group
        net = torch_network("resnet18")
        import torch

        images = np.random.default_rng(0).random((4, 64, 64, 3))
        labels = np.array([1, 3, 5, 7])
        theirs, gradients, moved = [], [], []
        for part in np.split(np.arange(4), 4 // (group or 4)):
            each = copy.deepcopy(net).train()  # what one process of the reference would see
            logits = each(torch.tensor(images[part].transpose(0, 3, 1, 2)))
            target = torch.tensor(labels[part])
            torch.nn.functional.cross_entropy(logits, target, reduction="sum").backward()
            theirs.append(logits.detach().numpy())
            gradients.append({k: p.grad.numpy() for k, p in each.named_parameters()})
            moved.append({k: v.numpy() for k, v in each.state_dict().items() if "running" in k})
        with jax.enable_x64(True):
            ours, params, stats = ours_of("resnet18", net, bn_group=group)

            def loss(params):
                logits, new = ours.apply(params, stats, images, train=True)
                picked = jax.nn.log_softmax(logits)[jnp.arange(4), jnp.asarray(labels)]
                return -picked.sum(), (logits, new)

            run = jax.jit(jax.value_and_grad(loss, has_aux=True))
            (_, (logits, new)), our_gradients = jax.device_get(run(params))
        self.assertLess(parity.relative(logits, np.concatenate(theirs)), 1e-9)
        rows = models.torch_names("resnet18")
        shapes = {k: v.shape for k, v in params.items()}
        summed = {k: sum(g[k] for g in gradients) for k in gradients[0]}
        for key, expected in convert.rename(rows, summed, shapes).items():
            self.assertLess(parity.relative(our_gradients[key], expected), 1e-7, key)
        averaged = {k: sum(m[k] for m in moved) / len(moved) for k in moved[0]}
        shapes = {k: v.shape for k, v in stats.items() if not k.startswith("normalize.")}
        for key, expected in convert.rename(rows, averaged, shapes).items():
            self.assertGreater(parity.relative(stats[key], expected), 1e-4, key)  # it did move
            self.assertLess(parity.relative(new[key], expected), 1e-12, key)
        np.testing.assert_array_equal(new["normalize.std"], stats["normalize.std"])


@pytest.mark.matrix
class GroupedTrainModeTest(TrainModeTest):
    group = 2


@functools.cache
def drawn():
    return jax.jit(models.create("resnet50", **SMALL).init)(jax.random.key(0))


def small(**overrides):
    """A network of three bottleneck blocks, and weights for it."""
    return models.create("resnet50", **SMALL, **overrides), *drawn()


class OptionsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.images = jax.random.uniform(jax.random.key(1), (4, 16, 16, 3))

    @pytest.mark.slow
    def test_bfloat16_computes_and_returns_float32(self):
        single, half = (small(dtype=d) for d in ("float32", "bfloat16"))
        logits = [jax.jit(net.apply)(*weights, self.images)[0] for net, *weights in (single, half)]
        self.assertEqual(logits[1].dtype, jnp.float32)
        self.assertGreater(parity.relative(logits[1], logits[0]), 0)
        # bfloat16 keeps 8 bits (4e-3 each rounding), through about 12 layers.
        self.assertLess(parity.relative(logits[1], logits[0]), 0.05)

    @sweeps.fast(1)
    @parameterized.product(activation=("relu", "gelu"), small_stem=(True, False))
    def test_nan_stays_nan(self, activation, small_stem):
        # XLA's CPU back end loses it between ReLU and pooling.
        options = {"activation": activation, "small_stem": small_stem, "depths": (1,), "width": 8}
        net = models.create("resnet50", num_classes=3, image_size=8, **options)
        params, stats = net.init(jax.random.key(0))
        images = np.full((3, 8, 8, 3), 0.5, np.float32)
        images[1, 4, 4, 0] = np.nan
        logits = jax.jit(lambda x: net.apply(params, stats, x)[0])(images)
        self.assertEqual(np.isnan(logits).all(1).tolist(), [False, True, False])
        self.assertEqual(np.isnan(logits).any(1).tolist(), [False, True, False])

    def test_initialisation_is_torchvisions(self):
        _, params, stats = small()
        kernel = params["layer2.0.conv2.kernel"]  # [3, 3, 128, 128]
        self.assertAlmostEqual(float(kernel.std()), (2 / (9 * 128)) ** 0.5, 3)
        self.assertGreater(float(jnp.abs(kernel).max()), 3 * float(kernel.std()))  # not cut
        bound = 512**-0.5
        for part in (params["fc.kernel"], params["fc.bias"]):
            self.assertLess(float(jnp.abs(part).max()), bound)
            self.assertGreater(float(jnp.abs(part).max()), bound / 2)
        np.testing.assert_array_equal(params["bn1.scale"], 1)
        np.testing.assert_array_equal(params["bn1.bias"], 0)
        np.testing.assert_array_equal(stats["bn1.var"], 1)
        self.assertFalse(any(p.weak_type for p in (params | stats).values()))

    def test_group_must_divide_the_batch(self):
        net, params, stats = small(bn_group=3)
        with self.assertRaisesRegex(ValueError, "group=3 does not divide"):
            jax.eval_shape(functools.partial(net.apply, train=True), params, stats, self.images)

    @parameterized.parameters(
        ({"activation": "silu"}, r"activation='silu' is unknown; choose one of \['relu', 'gelu'\]"),
        ({"depths": ()}, r"depths=\(\) must be a tuple of positive integers"),
        ({"depths": (1, 0)}, "must be a tuple of positive integers"),
        ({"bn_group": -1}, "bn_group=-1 must be at least 0"),
        ({"in_channels": 0}, "in_channels=0 must be at least 1"),
        ({"width": 128, "bottleneck": False}, "width=128: blocks of two.* need width=64"),
        ({"base": 0}, "base=0 must be at least 1"),
        ({"image_size": 0}, "image_size=0 must be at least 1"),
        ({"scan": True}, r"unknown option \['scan'\] for resnet50"),
    )
    def test_message(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            models.create("resnet50", **changes)


@pytest.mark.matrix
class SlowBehaviourTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.images = jax.random.uniform(jax.random.key(1), (4, 16, 16, 3))

    def test_remat_changes_nothing(self):
        results = []
        for remat in (False, True):
            net, params, stats = small(remat=remat)

            def loss(params, net=net, stats=stats):
                logits, new = net.apply(params, stats, self.images, train=True)
                return (logits**2).sum(), new

            results.append(jax.jit(jax.grad(loss, has_aux=True))(params))
        for plain, again in zip(*results, strict=True):
            for key in plain:
                # Rounding, through batch norms of few values: the same sums in another order.
                scale = np.abs(plain[key]).max()
                np.testing.assert_allclose(again[key], plain[key], atol=1e-4 * scale, err_msg=key)

    def test_drop_path(self):
        net, params, stats = small(drop_path=0.5)
        plain, *_ = small()
        train = jax.jit(functools.partial(net.apply, train=True))
        with self.assertRaisesRegex(ValueError, "call apply with a key"):
            net.apply(params, stats, self.images, train=True)
        drops = [train(params, stats, self.images, key=jax.random.key(k))[0] for k in (0, 1)]
        self.assertGreater(parity.relative(*drops), 1e-3)
        evaluated = [jax.jit(n.apply)(params, stats, self.images)[0] for n in (net, plain)]
        np.testing.assert_array_equal(*evaluated)
