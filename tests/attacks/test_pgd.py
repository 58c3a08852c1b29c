"""FGSM and PGD against their formulas in NumPy, and their promises."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust import attacks
from tests.support import sweeps
from tests.support.golden import norm_in_float64

NORMS = ("linf", "l2", "l1")
EPSILON = {"linf": 0.1, "l2": 0.5, "l1": 2.0}


class PgdTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        keys = jax.random.split(jax.random.key(0), 4)
        w1, w2 = jax.random.normal(keys[0], (48, 16)), jax.random.normal(keys[1], (16, 5))
        cls.net = staticmethod(lambda x: jnp.sin(x.reshape(len(x), -1) @ w1) @ w2)
        cls.images = jax.random.uniform(keys[2], (16, 4, 4, 3))
        cls.labels = jax.random.randint(keys[3], (16,), 0, 5, jnp.int32)

    def gradient(self, points):
        def total(x):
            return attacks.ce_loss(self.net(x), self.labels).sum()

        return np.asarray(jax.grad(total)(jnp.asarray(points)))

    @sweeps.rows("linf", "l2")
    def test_steps_by_hand(self, norm):
        """Three steps of 0.04 in NumPy; the radius binds."""
        x, epsilon, step = np.asarray(self.images), np.float32(0.1), np.float32(0.04)

        def length(v):
            return np.sqrt((v * v).sum(axis=(1, 2, 3), keepdims=True))

        point = x
        for _ in range(3):
            gradient = self.gradient(point)
            if norm == "linf":
                point = np.clip(point + step * np.sign(gradient), x - epsilon, x + epsilon)
            else:
                delta = point + step * gradient / length(gradient) - x
                point = x + delta * np.minimum(1, epsilon / length(delta))
            point = np.clip(point, 0, 1)
        attack = attacks.pgd(norm=norm, epsilon=0.1, steps=3, step_size=0.04, random_start=False)
        attack = jax.jit(functools.partial(attack, self.net))
        images_adv = attack(None, self.images, self.labels)
        np.testing.assert_allclose(images_adv, point, atol=1e-6)  # rounding of three steps

    @sweeps.fast("linf")
    @parameterized.parameters(*NORMS)
    def test_default_steps(self, norm):
        """PGD: 2.5 epsilon / K, as Madry et al. 2018; FGSM: epsilon. Nothing binds here."""
        epsilon, middle = EPSILON[norm], jnp.full((2, 4, 4, 3), 0.5)
        labels, weights = jnp.zeros(2, jnp.int32), jax.random.normal(jax.random.key(0), (48, 5))
        options = {"norm": norm, "epsilon": epsilon, "kept_fraction": 1.0}

        def length(points):
            return norm_in_float64(np.asarray(points, np.float64) - 0.5, norm)

        machine = attacks.pgd_machine(steps=10, **options)
        gradient = jax.random.normal(jax.random.key(1), middle.shape)
        one = jax.jit(lambda: machine.tell(machine.init(middle, labels), None, None, gradient))
        np.testing.assert_allclose(length(one().points), 0.25 * epsilon, rtol=1e-5)
        attack = functools.partial(attacks.fgsm(**options), lambda x: x.reshape(2, -1) @ weights)
        found = jax.jit(attack)(None, middle, labels)
        np.testing.assert_allclose(length(found), epsilon, rtol=1e-5)

    def test_fgsm_by_hand(self):
        x = np.asarray(self.images)
        expected = np.clip(x + np.float32(0.1) * np.sign(self.gradient(x)), 0, 1)
        images_adv = attacks.fgsm(epsilon=0.1)(self.net, None, self.images, self.labels)
        np.testing.assert_allclose(images_adv, expected, atol=1e-7)

    def test_fgsm_from_a_random_start(self):
        key = jax.random.key(5)
        keys = attacks.image_keys(key, 16)
        start = np.asarray(attacks.GEOMETRIES["linf"].sample(keys, self.images, jnp.full(16, 0.1)))
        x, epsilon = np.asarray(self.images), np.float32(0.1)
        expected = start + np.float32(0.125) * np.sign(self.gradient(start))
        expected = np.clip(np.clip(expected, x - epsilon, x + epsilon), 0, 1)
        attack = attacks.fgsm(epsilon=0.1, step_size=0.125, random_start=True)
        np.testing.assert_allclose(attack(self.net, key, x, self.labels), expected, atol=1e-7)

    @sweeps.rows(*itertools.product((False, True), (False, True)))
    def test_starts_with_noise(self, normal, projected):
        """Where the first gradient is asked for, and that each image has its own draw."""
        noise = attacks.Noise(normal, 0.2, projected)
        images = jnp.concatenate([jnp.zeros((8, 16, 16, 3)), jnp.full((8, 16, 16, 3), 0.5)])
        machine = attacks.pgd_machine(norm="linf", epsilon=0.1, steps=2)
        keys = attacks.image_keys(jax.random.key(0), 16)
        labels = jnp.zeros(16, jnp.int32)
        points = machine.query(machine.init(images, labels, keys=keys, start=noise))
        again = machine.query(machine.init(images[5:], labels[5:], keys=keys[5:], start=noise))
        np.testing.assert_array_equal(points[5:], again)
        delta = np.asarray(points - images)
        self.assertEqual((np.asarray(points) < 0).any(), not projected)
        if projected:
            self.assertLessEqual(np.abs(delta).max(), 0.1 + 1e-7)
            self.assertTrue((delta[:8] >= 0).all())
            return
        # 6,144 draws: of the standard deviation 1% is a standard error.
        std = 0.2 if normal else 0.1 / np.sqrt(3)
        np.testing.assert_allclose(delta.std(), std, rtol=0.04)
        np.testing.assert_allclose(delta.mean(), 0, atol=0.04 * std)
        self.assertEqual(np.abs(delta).max() > 0.1 + 1e-7, normal)

    def test_of_noise_nothing_leaves_the_ball(self):
        """Not even where no gradient is finite."""
        attack = attacks.pgd(epsilon=0.1, steps=2, random_start=attacks.Noise(True, 0.5))
        for net in (self.net, lambda x: self.net(x) * jnp.nan):
            found = attack(net, jax.random.key(0), self.images, self.labels)
            self.assertLessEqual(np.abs(found - self.images).max(), 0.1 + 1e-6)
            self.assertTrue((found >= 0).all() and (found <= 1).all())

    @sweeps.rows(
        (
            {"random_start": attacks.Noise(True)},
            "std=0.0 does not change the image; pass a std above",
        ),
        ({"random_start": attacks.Noise(False), "norm": "l1"}, "needs linf and l2, not l1;"),
    )
    def test_refuses_noise(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            attacks.pgd(epsilon=0.1, steps=2, **changes)

    def test_trades(self):
        """KL from the clean probabilities; its gradient at the image is zero: start next to it."""
        clean = jax.nn.softmax(self.net(self.images), axis=1)
        attack = attacks.pgd(epsilon=0.1, steps=4, loss="kl")
        images_adv = attack(self.net, jax.random.key(0), self.images, clean)
        self.assertGreater(attacks.kl_loss(self.net(images_adv), clean).mean(), 0.1)

    @sweeps.rows(0.0, -0.1, float("inf"))
    def test_step_size(self, step_size):
        with self.assertRaisesRegex(ValueError, f"step_size={step_size} must be a finite number"):
            attacks.pgd(epsilon=0.1, steps=1, step_size=step_size)


class StartsTest(absltest.TestCase):
    def test_what_they_are_called(self):
        """As `--start` and `attack.start` take them; `boxed` ones are projected first."""
        found = dict(attacks.STARTS)
        self.assertEqual((found.pop("image"), found.pop("random")), (False, True))
        rows = {name: (noise.normal, noise.projected, noise.std) for name, noise in found.items()}
        self.assertEqual(
            rows,
            {
                "uniform": (False, False, 0),
                "uniform-boxed": (False, True, 0),
                "gauss": (True, False, 0),
                "gauss-boxed": (True, True, 0),
            },
        )
