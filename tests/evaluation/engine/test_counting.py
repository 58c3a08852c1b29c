"""Counting right answers: which images count, what an attack may see, and what is told of each."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from jaxrobust import data
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.evaluation.engine.accuracy import EvaluatedImages
from jaxrobust.runtime.devices import sharding
from jaxrobust.types import Classifier, Weights
from tests.support import sweeps

IMAGES = EvaluatedImages(data.open_source("fake:8x8x1:10", "test"), image_size=8, batch_size=4)


def source(n: int) -> mock.MagicMock:
    return mock.MagicMock(__len__=lambda own: n)


class ImagesTest(parameterized.TestCase):
    @sweeps.rows(
        ({}, 10), ({"limit": 4}, 4), ({"limit": 10}, 10), ({"limit": 11}, 10), ({"places": ()}, 0),
        ({"places": (7, 3)}, 2), ({"places": (7, 3), "limit": 1}, 2),
    )  # fmt: skip
    def test_how_many(self, how, count):
        self.assertLen(EvaluatedImages(source(10), image_size=8, batch_size=4, **how), count)


class CountTest(parameterized.TestCase):
    """Ten images in batches of eight: the last six places of the second are padding."""

    def setUp(self):
        super().setUp()
        self.mesh = sharding.make_mesh()
        self.images = dataclasses.replace(IMAGES, batch_size=8, limit=10, seed=7)
        batches = data.evaluation_batches(IMAGES.source, batch_size=10, image_size=8, limit=10)
        (self.batch,) = batches

    def counter(self, weights, **how):
        apply = lambda params, stats, x: (x.reshape(len(x), -1) @ params["w"], stats)  # noqa: E731

        def attack(logits_fn, keys, images, labels):
            turned = jax.vmap(jax.random.bernoulli)(keys)
            return jnp.where(turned[:, None, None, None], 1 - images, images)

        net = Classifier(init=None, apply=apply)
        return accuracy.counter(net, attack, mesh=self.mesh, **how), Weights({"w": weights}, {})

    def expected(self, weights):
        """Whether images are right as they are, and after the draws of their ids and the seed."""
        images = self.batch.images.reshape(10, -1) / np.float32(255)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(7), self.batch.ids)
        turned = np.asarray(jax.vmap(jax.random.bernoulli)(keys))[:, None]
        attacked = np.where(turned, 1 - images, images)
        answers = [(points @ weights).argmax(1) for points in (images, attacked)]
        clean, kept = (found == self.batch.labels for found in answers)
        return clean, clean & kept

    def test_shares_and_images_in_order_are_of_what_is_no_padding(self):
        weights = np.random.default_rng(0).standard_normal((64, 10)).astype(np.float32)
        clean, robust = self.expected(weights)
        between = mock.Mock()
        counter, loaded = self.counter(weights)
        found = accuracy.count(counter, loaded, self.images, self.mesh, between=between)
        shares = {"clean": clean.mean(), "robust": robust.mean(), "images": 10}
        self.assertEqual({key: found[key] for key in shares}, shares)
        self.assertEqual(between.call_count, 2)
        between.side_effect = [None, KeyboardInterrupt]
        with self.assertRaises(KeyboardInterrupt):
            accuracy.count(counter, loaded, self.images, self.mesh, between=between)
        counter, loaded = self.counter(weights, norm="linf")
        each = accuracy.each(counter, loaded, self.images, self.mesh)
        np.testing.assert_array_equal(each["clean"], clean)
        np.testing.assert_array_equal(each["robust"], robust)
        np.testing.assert_array_equal(each["labels"], self.batch.labels)

    def test_no_images(self):
        counter, loaded = self.counter(np.zeros((64, 10), np.float32))
        none = dataclasses.replace(self.images, limit=0, places=())
        found = accuracy.count(counter, loaded, none, self.mesh)
        self.assertEqual(found, {"clean": 0, "robust": 0, "images": 0})

    def test_one_class_is_told_without_the_padding(self):
        many = EvaluatedImages(
            data.open_source("fake:8x8x1:10", "test"), 8, batch_size=48, limit=60
        )
        counter, loaded = self.counter(np.zeros((64, 10), np.float32))  # of equals the first
        found = accuracy.count(counter, loaded, many, self.mesh)["collapse"]
        self.assertIn("60 of 60 clean images are predicted as class 0", found["words"])

    def test_a_pipe_hears_of_batches_that_are_done(self):
        counter, loaded = self.counter(np.zeros((64, 10), np.float32))
        words = []
        with mock.patch.object(accuracy.patience, "lasting") as lasting:
            note = lambda: words.append(lasting.call_args_list[0].args[0]())  # noqa: E731
            accuracy.count(counter, loaded, self.images, self.mesh, bar="testing", between=note)
        self.assertEqual(words, ["testing: 1 of 2 batches", "testing: 2 of 2 batches"])


class JudgedTest(parameterized.TestCase):
    """Logits are the pixels of 1x2x3 images; the attack adds to them what it is told."""

    IMAGES = (
        np.array([[9, 1, 0, 0, 0, 0], [0, 9, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0], [0, 0, 9, 0, 0, 0],
                  [9, 0, 0, 0, 0, 0]], np.float32)
        / 10
    )  # fmt: skip
    LABELS = (0, 1, 1, 2, 0)
    MASK = (True, True, True, True, False)

    def judged(self, added=0.0, images=None, scale=1.0, seen=None, **how):
        images = self.IMAGES if images is None else images

        def apply(params, stats, x):
            return x.reshape(len(x), -1) * scale, stats

        def attack(logits_fn, keys, x, labels):
            if seen is not None:
                seen.append((keys, x))
            return x + np.broadcast_to(np.float32(added), (5, 6)).reshape(5, 1, 2, 3)

        made = accuracy.Judging(Classifier(init=None, apply=apply), attack, "float32", **how)
        given = (jnp.asarray(images).reshape(-1, 1, 2, 3), jnp.array(self.LABELS),
                 jnp.array(self.MASK), jnp.array([5, 6, 7, 8, 9]), jax.random.key(3))  # fmt: skip
        return accuracy.judged({}, {}, *given, judging=made)

    def test_right_before_and_after(self):
        added = np.zeros((5, 6))
        added[0, 1] = 1  # the first is fooled
        added[2] = [-1, 1, 0, 0, 0, 0]  # what was wrong becomes right
        found = self.judged(added)
        self.assertEqual(found["count"].tolist(), list(self.MASK))
        self.assertEqual(found["clean"].tolist(), [True, True, False, True, False])
        self.assertEqual(found["robust"].tolist(), [False, True, False, True, False])
        self.assertEqual(found["answers"].tolist(), [0, 1, 0, 2, 0])
        self.assertEqual(found["reached"].tolist(), [1, 1, 1, 2, 0])
        self.assertEqual(found["labels"].tolist(), list(self.LABELS))
        self.assertNotIn("stable", found)

    @sweeps.rows(("linf", 2.0), ("l2", 3.0), ("l1", 5.0))
    def test_norms(self, norm, length):
        added = np.zeros((5, 6))
        added[1] = [2, -2, 1, 0, 0, 0]
        found = self.judged(added, norm=norm)["norms"]
        np.testing.assert_allclose(found, [0, length, 0, 0, 0], rtol=1e-6)

    def test_what_is_not_finite_is_no_answer(self):
        added = np.zeros((5, 6))
        added[1, 4], added[3, 0] = np.nan, np.inf
        found = self.judged(added)
        self.assertEqual(found["robust"].tolist(), [True, False, False, False, False])
        self.assertEqual(found["reached"].tolist(), [0, -1, 0, -1, 0])
        broken = np.where(np.arange(6) == 5, np.nan, self.IMAGES)
        found = self.judged(images=broken)
        self.assertEqual(found["answers"].tolist(), [-1] * 5)
        self.assertFalse(found["clean"].any())

    def test_what_moved(self):
        added = np.zeros((5, 6))
        added[0, 1], added[2, 3] = 1, 0.5  # the class of the first changes
        found = self.judged(added, scale=2.0, moved=True)
        self.assertEqual(found["stable"].tolist(), [False, True, True, True, False])
        self.assertEqual(found["finite"].tolist(), [True, True, True, True, False])
        np.testing.assert_allclose(found["local_lipschitz"], [2, 0, 2, 0, 0], rtol=1e-4)

    def test_bytes_are_in_the_unit_range(self):
        """And the draws of an image depend on its id."""
        seen = []
        whole = np.uint8(255 * self.IMAGES)
        found = self.judged(images=whole, seen=seen)
        self.assertEqual(found["clean"].tolist(), [True, True, False, True, False])
        ((keys, x),) = seen
        np.testing.assert_allclose(x.reshape(5, 6), whole / 255, atol=1e-6)
        expected = [jax.random.fold_in(jax.random.key(3), n) for n in (5, 9)]
        data = np.asarray(jax.random.key_data(keys))
        np.testing.assert_array_equal(data[[0, 4]], [jax.random.key_data(k) for k in expected])
