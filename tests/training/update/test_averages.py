"""Averages with a warm-up, and running statistics with another momentum than the network's."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from flax import nnx

from jaxrobust import models
from jaxrobust.config import phase
from jaxrobust.models.interface import classifier
from jaxrobust.models.modules.basic import BatchNorm, Normalize
from jaxrobust.training.update import averages
from tests.support import sweeps
from tests.support.parity import torch_or_skip
from tests.support.steps import standard


class AveragingTest(parameterized.TestCase):
    @sweeps.rows(None, 0, 2)
    def test_decay_by_hand(self, warmup):
        """Three updates an epoch; the weights of update i are i + 1."""
        p = phase(ema_decay=0.5, ema_warmup_epochs=warmup, epochs=5)
        average = averages.averaging(p, "train", steps_per_epoch=3)
        mean, expected = {"w": jnp.zeros(2), "bn.mean": jnp.zeros(2)}, 0.0
        for step in range(15):
            new = jnp.full(2, step + 1.0)
            with standard():
                mean = average(mean, {"w": new}, {"bn.mean": 10 * new}, jnp.int32(step))
            d = step + 1 - 3 * (warmup or 0)
            decay = 0.5 if warmup is None else 0.0 if d < 0 else min(0.5, (1 + d) / (10 + d))
            expected = decay * expected + (1 - decay) * (step + 1)
            np.testing.assert_allclose(mean["w"], expected, rtol=1e-6)
            np.testing.assert_allclose(mean["bn.mean"], 10 * mean["w"], rtol=1e-6)

    def test_copies_statistics(self):
        p = phase(ema_decay=0.5, ema_statistics="copied")
        average = averages.averaging(p, "train", steps_per_epoch=3)
        old, one = {"w": jnp.zeros(1), "bn.mean": jnp.zeros(1)}, jnp.ones(1)
        found = average(old, {"w": one}, {"bn.mean": one}, jnp.int32(0))
        self.assertEqual((found["w"], found["bn.mean"]), (0.5, 1))

    @sweeps.rows(
        ({"ema_decay": 1.0}, "train.ema_decay=1.0 must be at least 0 and below 1"),
        ({"ema_warmup_epochs": 50}, "ema_warmup_epochs=50 must be .* below train.epochs=50, or"),
        (
            {"ema_statistics": "mean"},
            "train.ema_statistics='mean' must be one of 'averaged', 'copied'",
        ),
    )
    def test_refuses(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            averages.averaging(phase(**changes), "train", steps_per_epoch=3)


class StatisticsTest(parameterized.TestCase):
    def test_momentum_is_the_phases(self):
        """What an update does not move, such as the normalization of images, keeps its bits."""
        rng = np.random.default_rng(0)
        moves = averages.running_statistics(phase(bn_momentum=(1.0, 0.25)), "train")
        shown = jnp.asarray(rng.normal(size=4), jnp.float32)
        old, expected = {"bn.mean": jnp.zeros(4), "normalize.mean": shown}, np.zeros(4)
        for step in range(4):
            new = rng.normal(size=4).astype(np.float32)
            momentum = 0.25 if step else 1.0
            old = moves(old, {"bn.mean": new, "normalize.mean": shown}, jnp.int32(step))
            expected = (1 - momentum) * expected + momentum * new
            np.testing.assert_allclose(old["bn.mean"], expected, rtol=1e-6, atol=1e-7)
            np.testing.assert_array_equal(old["normalize.mean"], shown)

    @parameterized.parameters((1.0, 0.01), (0.3, 0.1), (1.0, 1.0))
    def test_is_pytorchs_batch_norm(self, first, later):
        """A dead channel among them, and starts that are large, small and those of a fresh norm."""
        torch = torch_or_skip(self)
        rng = np.random.default_rng(1)
        start = np.float32([50, 28, 1, 1e-3, 50, 28])
        theirs = torch.nn.BatchNorm2d(len(start))
        theirs.running_var.copy_(torch.tensor(start))
        theirs.running_mean.copy_(torch.tensor(start))
        net = classifier.showing_batches(classifier.classifier(lambda rngs: _Norm(len(start))))
        params, old = net.init(jax.random.key(0))
        old |= {"norm.mean": jnp.asarray(start), "norm.var": jnp.asarray(start)}
        moves = averages.running_statistics(phase(bn_momentum=(first, later)), "train")

        @jax.jit
        def update(old, images, step):
            return moves(old, net.apply(params, old, images, train=True)[1], step)

        scale = np.float32([1, 1, 3, 0.01, 0, 0])  # the last two are dead
        for step in range(5):
            images = scale * rng.normal(size=(6, 4, 4, len(start))).astype(np.float32)
            theirs.momentum = later if step else first
            theirs(torch.tensor(images.transpose(0, 3, 1, 2)))
            old = update(old, jnp.asarray(images), jnp.int32(step))
            for ours, found in (("mean", theirs.running_mean), ("var", theirs.running_var)):
                # Of the largest number that the running one has been a mixture of.
                np.testing.assert_allclose(
                    old[f"norm.{ours}"], found, rtol=1e-6, atol=1e-6, err_msg=f"{ours} {step}"
                )
            self.assertGreaterEqual(old["norm.var"].min(), 0)
            if first == 1:
                np.testing.assert_array_equal(old["norm.var"][-2:], 0)
                np.testing.assert_array_equal(old["norm.mean"][-2:], 0)
        self.assertTrue(np.isfinite(net.apply(params, old, jnp.asarray(images))[0]).all())

    def test_a_network_whose_norms_have_several_momenta(self):
        """That of the last norm is 0.9, as it was released."""
        small = {"depths": (1,), "width": 1, "dropout": 0.0}
        net = models.create("cifar_wrn_40_10", num_classes=3, image_size=8, **small)
        shown = classifier.showing_batches(net)
        params, stats = net.init(jax.random.key(0))
        images = jax.random.uniform(jax.random.key(1), (4, 8, 8, 3))
        both = jax.jit(
            lambda: [one.apply(params, stats, images, train=True) for one in (net, shown)]
        )
        (logits, moved), (same, batch) = both()
        np.testing.assert_array_equal(logits, same)
        for key, value in moved.items():
            momentum = 0.9 if key.startswith("bn1.") else 0.1
            mixed = (1 - momentum) * stats[key] + momentum * batch[key]
            np.testing.assert_allclose(value, mixed, rtol=1e-5, atol=1e-6, err_msg=key)

    def test_is_the_networks_by_default(self):
        moves = averages.running_statistics(phase(), "train")
        new = {"bn.mean": jnp.ones(2)}
        self.assertIs(moves(jax.tree.map(jnp.zeros_like, new), new, 0), new)

    @sweeps.rows(
        ({"bn_momentum": (0.1,)}, r"train.bn_momentum=\(0.1,\) must be two numbers above 0"),
        ({"bn_momentum": (1.0, 0.0)}, "must be two numbers above 0 and at most 1"),
        (
            {"bn_momentum": (1.0, 0.01), "objective": "trades"},
            "objective='trades' changes them twice; set train.bn_statistics='adversarial'",
        ),
    )
    def test_refuses(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            averages.running_statistics(phase(**changes), "train")


class _Norm(nnx.Module):
    """A batch norm and its normalization of images, which is none."""

    def __init__(self, channels):
        self.normalize, self.norm = Normalize(channels), BatchNorm(channels)

    def __call__(self, images, train, key):
        return self.norm(self.normalize(images), train).mean((1, 2))
