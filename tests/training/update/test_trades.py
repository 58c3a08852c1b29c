"""What TRADES shows the network, and with which draws."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust import attacks
from jaxrobust.models.kernels import batch_norms
from jaxrobust.runtime.devices import sharding
from jaxrobust.training.update import objectives, step
from jaxrobust.types import Batch, Classifier
from tests.support import sweeps


def noisy() -> Classifier:
    """Logits are the pixels, of one line, plus what an image's key draws when it trains."""

    def apply(params, stats, images, *, train=False, key=None):
        logits = images[:, 0, 0] * params["scale"]
        return logits + (drawn(key) if train else 0), stats

    return Classifier(lambda key: ({"scale": jnp.ones(())}, {}), apply)


@jax.jit
def drawn(keys):
    return jax.vmap(lambda key: jax.random.normal(key, (5,)))(keys)


def divergence(p_logits, q_logits) -> float:
    p, q = (np.asarray(jax.nn.log_softmax(x), np.float64) for x in (p_logits, q_logits))
    return (np.exp(p) * (p - q)).sum(-1).mean()


class PassesTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        rng = np.random.default_rng(0)
        images = jnp.asarray(rng.random((6, 1, 1, 5), dtype=np.float32))
        self.batch = Batch(images, jnp.asarray(rng.integers(0, 5, 6), jnp.int32))
        self.keys = attacks.image_keys(jax.random.key(3), 6)

    @sweeps.fast(2, 3)
    @parameterized.product(group=(0, 3, 6), statistics=objectives.STATISTICS)
    def test_batch_norms_normalise_apart_and_move_twice(self, group, statistics):
        shape = (6, 2, 2, 3)
        images, images_adv = np.random.default_rng(1).random((2, *shape), np.float32)
        images_adv = 0.5 * images_adv
        running = {"mean": jnp.full(3, 0.2), "var": jnp.full(3, 0.7)}

        def apply(params, stats, x, *, train=False, key=None):
            x, mean, var = batch_norms.batch_norm_train(x, jnp.ones(3), jnp.zeros(3), group=group)
            new = {"mean": mean, "var": var}
            moved = {name: 0.9 * stats[name] + 0.1 * new[name] for name in stats}
            return (x * x * x).mean((1, 2)), moved

        batch = Batch(jnp.asarray(images), self.batch.labels % 3)
        net = Classifier(lambda key: ({}, {}), apply)
        _, (stats, metrics) = objectives.trades(6.0, statistics).loss(
            net, {}, running, batch, jnp.asarray(images_adv), None
        )

        def by_hand(x):
            parts = x.astype(np.float64).reshape(-1, group or 6, *shape[1:])
            mean, var = parts.mean((1, 2, 3), keepdims=True), parts.var((1, 2, 3), keepdims=True)
            normal = ((parts - mean) / np.sqrt(var + 1e-5)).reshape(shape)
            count = parts[0].size // 3
            unbiased = var.mean(0).reshape(3) * count / (count - 1)
            return (normal**3).mean((1, 2)), mean.mean(0).reshape(3), unbiased

        (clean, *first), (robust, *second) = map(by_hand, (images, images_adv))
        # float32 sums of a few cubes.
        np.testing.assert_allclose(metrics["kl"], divergence(clean, robust), rtol=1e-4)
        for name, one, two in zip(("mean", "var"), first, second, strict=True):
            before = np.asarray(running[name])
            before = 0.9 * before + 0.1 * one if statistics == "both" else before
            expected = 0.9 * before + 0.1 * two
            np.testing.assert_allclose(stats[name], expected, rtol=1e-5, err_msg=name)

    def test_noise_outside_of_the_pixels_is_no_divergence(self):
        """Random erasing leaves [0, 1]; the attack's points do not."""
        batch = self.batch._replace(images=4 * self.batch.images - 2)
        inside = batch.images.clip(0, 1)
        self.assertGreater(float(jnp.abs(inside - batch.images).max()), 0.5)
        objective = objectives.trades(6.0)
        params, _ = noisy().init(jax.random.key(0))
        plain = noisy()._replace(
            apply=lambda params, stats, x, train, key: noisy().apply(params, stats, x)
        )
        _, (_, metrics) = objective.loss(plain, params, {}, batch, inside, None)
        self.assertEqual(metrics["kl"], 0)
        targets = objective.attack_targets(lambda x: x[:, 0, 0], batch)
        np.testing.assert_allclose(targets, jax.nn.softmax(inside[:, 0, 0]), rtol=1e-6)

    @pytest.mark.slow
    def test_an_image_draws_twice_as_the_attack_sees(self):
        objective, net = objectives.trades(6.0), noisy()
        one, two = objective.draws(self.keys)
        first, second = drawn(one), drawn(two)
        self.assertGreater(float(jnp.abs(first - second).min(1).max()), 0.01)
        again, _ = objective.draws(self.keys[3:])  # of an image, whatever its batch
        np.testing.assert_array_equal(drawn(again), first[3:])

        def attack(logits_fn, keys, images, targets):
            return (logits_fn(jnp.zeros_like(images)) + targets)[:, None, None]

        mesh = sharding.make_mesh(jax.devices()[:1])
        params, stats = net.init(jax.random.key(0))
        spread = sharding.spread(mesh, params)
        parts = step.GradientParts(net, attack, objective, attack_in_train_mode=True)
        of_device = partial(step.device_gradients, parts=parts, spread=spread, microbatches=2)
        of_all = jax.jit(spread.each(of_device, copies=2, split=2, gradients=True))
        keys = step.ImageKeys(self.keys, self.keys)
        _, (_, metrics) = of_all(params, stats, {}, self.batch, keys)
        clean = self.batch.images[:, 0, 0] + first
        robust = 2 * second + jax.nn.softmax(clean)
        np.testing.assert_allclose(metrics["kl"], divergence(clean, robust), rtol=1e-5)
