"""Averages with a warm-up, and running statistics with another momentum than the network's."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.config import phase
from jaxrobust.training import averages
from tests.support.steps import standard


class AveragingTest(parameterized.TestCase):
    @parameterized.parameters(None, 0, 2)
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

    @parameterized.parameters(
        ({"ema_decay": 1.0}, "train.ema_decay=1.0 must be at least 0 and below 1"),
        ({"ema_warmup_epochs": 50}, "ema_warmup_epochs=50 must be .* below train.epochs=50, or"),
        ({"ema_statistics": "mean"}, "train.ema_statistics='mean'; one of 'averaged', 'copied'"),
    )
    def test_refuses(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            averages.averaging(phase(**changes), "train", steps_per_epoch=3)


class StatisticsTest(parameterized.TestCase):
    @parameterized.parameters(0.1, 0.01)
    def test_momentum_is_the_phases(self, own):
        """Whatever the network's own is; that of images never changes."""
        rng = np.random.default_rng(0)
        p = phase(bn_momentum=(1.0, 0.25))
        moves = averages.running_statistics(p, "train", own=own)
        old, expected = jnp.zeros(4), np.zeros(4)
        for step in range(4):
            new = rng.normal(size=4).astype(np.float32)
            momentum = 0.25 if step else 1.0
            moved = {"bn.mean": (1 - own) * old + own * new, "normalize.mean": new}
            found = moves({"bn.mean": old, "normalize.mean": new}, moved, jnp.int32(step))
            expected = (1 - momentum) * expected + momentum * new
            # A difference of two float32 numbers, 1 / own times as large as it was.
            np.testing.assert_allclose(found["bn.mean"], expected, atol=1e-6 / own)
            np.testing.assert_array_equal(found["normalize.mean"], new)
            old = found["bn.mean"]

    def test_is_the_networks_by_default(self):
        moves = averages.running_statistics(phase(), "train", own=0.1)
        new = {"bn.mean": jnp.ones(2)}
        self.assertIs(moves(jax.tree.map(jnp.zeros_like, new), new, 0), new)

    @parameterized.parameters(
        ({"bn_momentum": (0.1,)}, r"train.bn_momentum=\(0.1,\) must be two numbers above 0"),
        ({"bn_momentum": (1.0, 0.0)}, "must be two numbers above 0, at most 1"),
        (
            {"bn_momentum": (1.0, 0.01), "objective": "trades"},
            "objective='trades' moves them twice; set train.bn_statistics='adversarial'",
        ),
    )
    def test_refuses(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            averages.running_statistics(phase(**changes), "train", own=0.1)

    def test_refuses_what_nobody_knows(self):
        with self.assertRaisesRegex(ValueError, "known to you alone; set it there, and train.bn_"):
            averages.running_statistics(phase(bn_momentum=(1.0, 0.1)), "train", own=None)


if __name__ == "__main__":
    absltest.main()
