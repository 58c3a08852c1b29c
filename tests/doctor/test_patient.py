"""What is measured on a network under examination, where paper knows it: a linear one."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from jaxrobust.doctor import patient as patients
from jaxrobust.doctor.patient import Patient
from jaxrobust.types import Threat
from tests.support import sweeps

# Two classes that a 2x2 image's pixels vote for: the margin of class 1 is their weighted sum.
WEIGHTS = np.float32([1.0, -2.0, 3.0, 0.5])
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0.4, 0.6, (7, 2, 2, 1)).astype(np.float32)
LABELS = (IMAGES.reshape(7, 4) @ WEIGHTS > 1.2).astype(int)
LABELS[3] = 1 - LABELS[3]  # which the network gets wrong


def logits_fn(images: jax.Array) -> jax.Array:
    votes = images.reshape(len(images), 4) @ WEIGHTS
    return jnp.stack([jnp.full(len(images), 1.2), votes], axis=1)


def patient(norm: str = "linf", epsilon: float = 0.1, **more) -> Patient:
    return Patient(logits_fn, IMAGES, LABELS, Threat(norm, epsilon), batch=3, **more)


def margins(images: np.ndarray) -> np.ndarray:
    """Of the wrong class over the right one."""
    wrong = images.reshape(len(images), 4) @ WEIGHTS - 1.2
    return np.where(LABELS == 0, wrong, -wrong)


class PatientTest(parameterized.TestCase):
    def test_every_image_once_whatever_the_batch(self):
        one = patient()
        np.testing.assert_allclose(one.logits[:, 1], IMAGES.reshape(7, 4) @ WEIGHTS, rtol=1e-6)
        np.testing.assert_array_equal(one.right, np.arange(7) != 3)
        np.testing.assert_array_equal(one.attacked, [0, 1, 2, 4, 5, 6])

    # The steepest way out of a ball moves the margin by the radius times the dual norm; ten steps
    # find all of it in Linf, and more than 95% in L2.
    @sweeps.rows(("linf", 6.5, 0.9999), ("l2", np.sqrt(14.25), 0.95))
    def test_pgd_goes_the_steepest_way(self, norm, dual, share):
        one = patient(norm)
        for epsilon, loss in ((0.1, "ce"), (0.2, "cw")):
            gain = one.after_pgd(epsilon, loss) - margins(IMAGES)[one.attacked]
            self.assertTrue((gain <= epsilon * dual + 1e-6).all(), gain)
            self.assertTrue((gain > share * epsilon * dual).all(), gain)

    @sweeps.rows(("linf", 0.1, 6.5), ("l2", 0.1, np.sqrt(14.25)), ("l1", 1.5, 3))
    def test_noise_is_the_best_of_some_and_no_better_than_the_steepest(self, norm, epsilon, dual):
        one = patient(norm, epsilon)
        gain = one.after_noise - margins(IMAGES)[one.attacked]
        self.assertTrue((gain <= epsilon * dual + 1e-6).all())
        self.assertTrue((gain > 0).all())  # of ten points one goes up
        if norm == "linf":  # corners: pixels that move by the radius, each up or down
            corners = np.array(np.meshgrid(*[[-0.1, 0.1]] * 4)).reshape(4, -1).T @ WEIGHTS
            nearest = np.abs(gain[:, None] - corners).min(1)
            np.testing.assert_allclose(nearest, 0, atol=1e-5)

    def test_what_is_remembered_of_a_radius_and_a_loss(self):
        """Radii of 7.9 and 8 of 255 are two, as are losses; the same is searched once."""
        one = patient()
        radii = (7.9 / 255, 8 / 255, 8 / 255)
        margins_of = [one.after_pgd(radius) for radius in radii]
        self.assertIs(margins_of[1], margins_of[2])
        self.assertTrue((margins_of[0] < margins_of[1]).all())
        self.assertIsNot(one.after_pgd(8 / 255, "cw"), margins_of[1])

    def test_an_image_draws_by_its_number_whichever_others_are_attacked(self):
        one, calls = patient(), []
        self.assertLen(one.attacked, 6)
        with mock.patch.object(Patient, "_batched", lambda self, _, *arrays: calls.append(arrays)):
            one.after_pgd(0.1)
        ((images, labels, ids, radii),) = calls
        np.testing.assert_array_equal(ids, [0, 1, 2, 4, 5, 6])
        np.testing.assert_array_equal(images, IMAGES[ids])
        np.testing.assert_array_equal(labels, LABELS[ids])
        np.testing.assert_array_equal(radii, np.full(6, 0.1, np.float32))

    def test_slopes(self):
        share = 1 / (1 + np.exp(-margins(IMAGES)))  # of the wrong class
        np.testing.assert_allclose(patient().slopes("ce"), 3 * share, rtol=1e-5)
        np.testing.assert_allclose(patient().slopes("cw"), np.full(7, 3.0), rtol=1e-6)
        flat = patient(others={"bfloat16": lambda x: 0 * logits_fn(x)})
        np.testing.assert_array_equal(flat.slopes("ce", "bfloat16"), np.zeros(7))

    @sweeps.rows(("linf", 0.5), ("l2", 1.0), ("l1", 2.0))
    def test_the_radius_at_which_all_images_can_be_grey(self, norm, radius):
        self.assertEqual(patient(norm, 1.5 if norm == "l1" else 0.1).everything, radius)

    def test_why_there_is_no_gradient(self):
        self.assertIsNone(patient().without_gradient)
        called = lambda x: jax.pure_callback(np.asarray, jax.ShapeDtypeStruct((3, 2), x.dtype), x)  # noqa: E731
        one = Patient(called, IMAGES, LABELS, batch=3)
        self.assertIn("callback", one.without_gradient.lower())

        def fails(x):
            raise TypeError("no\n  such   thing" + " x" * 200)

        reason = Patient(fails, IMAGES, LABELS, batch=3).without_gradient
        self.assertStartsWith(reason, "no such thing x x")
        self.assertLen(reason, 200)

    def test_the_first_that_are_right_are_attacked(self):
        with mock.patch.object(patients, "_ATTACKED", 4):
            np.testing.assert_array_equal(patient().attacked, [0, 1, 2, 4])
