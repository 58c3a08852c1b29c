"""Targets by their distance of first order: the formula, the order, what it does not know."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.attacks.geometry import malt
from tests.support import sweeps

WEIGHTS = np.random.default_rng(0).standard_normal((12, 6)).astype(np.float32)
IMAGES = np.random.default_rng(1).random((5, 2, 2, 3), np.float32)
LABELS = np.argmax(IMAGES.reshape(5, -1) @ WEIGHTS, axis=1).astype(np.int32)
TARGETS = np.stack([np.delete(np.arange(6), label)[:4] for label in LABELS]).astype(np.int32)


def linear(x):
    return x.reshape(len(x), -1) @ WEIGHTS


class DistancesTest(parameterized.TestCase):
    @sweeps.rows(("linf", 1), ("l2", 2), ("l1", np.inf))
    def test_of_a_linear_network_they_are_those_of_its_boundaries(self, norm, dual):
        found = malt.first_order_distances(linear, IMAGES, LABELS, TARGETS, norm=norm)
        logits = np.asarray(linear(IMAGES))
        for i, (label, targets) in enumerate(zip(LABELS, TARGETS, strict=True)):
            for j, target in enumerate(targets):
                gap = logits[i, label] - logits[i, target]
                slope = np.linalg.norm(WEIGHTS[:, label] - WEIGHTS[:, target], dual)
                self.assertAlmostEqual(float(found[i, j]), gap / slope, places=5)

    def test_of_any_network_they_are_by_its_gradients(self):
        def net(x):
            return jnp.tanh(linear(x)) ** 2

        found = malt.first_order_distances(net, IMAGES, LABELS, TARGETS, norm="l2")
        rows = jax.jacobian(lambda x: net(x[None])[0])(jnp.asarray(IMAGES[2])).reshape(6, -1)
        logits, label = net(IMAGES[2:3])[0], LABELS[2]
        for j, target in enumerate(TARGETS[2]):
            slope = jnp.linalg.norm(rows[label] - rows[target])
            self.assertAlmostEqual(
                float(found[2, j]), float((logits[label] - logits[target]) / slope), places=4
            )

    def test_where_two_logits_do_not_part_it_is_infinite(self):
        flat = lambda x: jax.lax.stop_gradient(linear(x))  # noqa: E731
        found = malt.first_order_distances(flat, IMAGES, LABELS, TARGETS, norm="linf")
        self.assertTrue(np.isposinf(found).all())

    def test_a_norm_that_is_none(self):
        with self.assertRaisesRegex(ValueError, "l3"):
            malt.first_order_distances(linear, IMAGES, LABELS, TARGETS, norm="l3")


class OrderTest(absltest.TestCase):
    def test_nearest_first_and_ties_as_they_were(self):
        distances = np.float32([[3, 1, 2, 1], [np.inf, np.nan, 5, 4], [np.nan] * 4])
        targets = np.array([[7, 8, 9, 6]] * 3)
        ordered = malt.nearest_first(distances, targets)
        self.assertEqual(ordered.tolist(), [[8, 6, 9, 7], [6, 9, 7, 8], [7, 8, 9, 6]])

    def test_no_images(self):
        self.assertEqual(malt.nearest_first(np.zeros((0, 3)), np.zeros((0, 3), int)).shape, (0, 3))
