"""Counting right answers: which images count, what an attack may see, and what is told of each."""

import contextlib
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from jaxrobust import data
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.evaluation.engine.accuracy import EvaluatedImages
from jaxrobust.types import Classifier
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
    """The judgements of two batches; the last images of the second are padding."""

    def setUp(self):
        super().setUp()
        self.batches = [
            self.batch(answers=[0, 1, 2], labels=[0, 1, 0], mask=[1, 1, 1]),
            self.batch(answers=[2, 0, 0], labels=[2, 0, 0], mask=[1, 0, 0]),
        ]
        self.between = mock.Mock()

    def batch(self, answers, labels, mask):
        right = np.equal(answers, labels) & np.array(mask, bool)
        own = {"count": sum(mask), "clean": right.sum(), "robust": right[:1].sum()}
        own |= {"clean_top5": sum(mask), "mask": np.array(mask, bool)}
        return own | {"answers": np.array(answers), "labels": np.array(labels)}

    def count(self):
        with mock.patch.object(accuracy, "_judgements", return_value=iter(self.batches)) as asked:
            found = accuracy.count("counter", "weights", IMAGES, "mesh", bar="bar",
                                   between=self.between)  # fmt: skip
        asked.assert_called_once_with("counter", "weights", IMAGES, "mesh", "bar")
        return found

    def test_shares_are_of_what_is_no_padding(self):
        expected = {"clean": 3 / 4, "robust": 2 / 4, "clean_top5": 1.0, "images": 4}
        self.assertEqual({k: v for k, v in self.count().items() if k != "doubts"}, expected)
        self.assertEqual(self.between.call_count, 2)

    def test_what_is_raised_in_between_ends_it(self):
        self.between.side_effect = [None, KeyboardInterrupt]
        with self.assertRaises(KeyboardInterrupt):
            self.count()

    def test_no_images(self):
        self.batches = []
        self.assertEqual(self.count(), {"clean": 0, "robust": 0, "images": 0})

    def test_one_class_is_told_without_the_padding(self):
        n = 60
        labels = np.arange(n) % 10
        padded = {"answers": np.where(np.arange(2 * n) < n, 3, 5), "labels": np.tile(labels, 2)}
        self.batches = [self.batch(**padded, mask=(np.arange(2 * n) < n).astype(int))]
        found = self.count()["collapse"]
        self.assertTrue(found["proven"])
        self.assertIn(f"{n} of {n} clean images are given class 3", found["words"])

    def test_each_in_order_without_the_padding(self):
        batches = [
            {"count": np.array([True, True]), "clean": np.array([True, False]), "x": np.arange(2)},
            {"count": np.array([True, False]), "clean": np.array([True, True]), "x": np.arange(2)},
        ]
        with mock.patch.object(accuracy, "_judgements", return_value=iter(batches)) as asked:
            found = accuracy.each("counter", "weights", IMAGES, "mesh")
        asked.assert_called_once_with("counter", "weights", IMAGES, "mesh", "")
        self.assertEqual(set(found), {"clean", "x"})
        self.assertEqual(found["clean"].tolist(), [True, False, True])
        self.assertEqual(found["x"].tolist(), [0, 1, 0])


class BatchesTest(parameterized.TestCase):
    """What is read, and what a counter is called with."""

    def judgements(self, bar="", **how):
        names = ("images", "labels", "mask", "ids")
        read = [
            SimpleNamespace(**{name: f"{name} {at}" for name in names}, damaged=[f"d{at}"])
            for at in range(2)
        ]
        self.counter = mock.Mock(return_value={"count": 1})
        images = EvaluatedImages(source(20), image_size=8, batch_size=4, **how)
        self.closed = False

        def batches(*given, **asked):
            try:
                yield from read
            finally:
                self.closed = True

        with (
            mock.patch.object(accuracy.pipeline, "evaluation_batches", batches),
            mock.patch.object(accuracy.sharding, "global_arrays", lambda mesh, arrays: arrays),
        ):
            found = accuracy._judgements(self.counter, ("w", "s"), images, "mesh", bar)
            yield from found

    def test_a_pipe_hears_of_batches_that_are_done(self):
        with (
            mock.patch.object(accuracy, "_compiling", return_value=contextlib.nullcontext()),
            mock.patch.object(accuracy.patience, "lasting") as lasting,
        ):
            words = [lasting.call_args.args[0]() for _ in self.judgements("testing")]
        self.assertEqual(words, ["testing: 1 of 5 batches", "testing: 2 of 5 batches"])

    def test_each_batch_has_the_same_key_of_the_seed(self):
        met = mock.Mock()
        list(self.judgements(seed=7, meets=met))
        for at, call in enumerate(self.counter.call_args_list):
            *given, key = call.args
            expected = [f"{name} {at}" for name in ("images", "labels", "mask", "ids")]
            self.assertEqual(given, ["w", "s", *expected])
            self.assertTrue(jnp.array_equal(jax.random.key_data(key), np.uint32([0, 7])))
        self.assertEqual(met.add.call_args_list, [mock.call(["d0"]), mock.call(["d1"])])

    def test_who_stops_early_closes_what_reads(self):
        found = self.judgements()
        next(found)
        found.close()
        self.assertTrue(self.closed)


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

    def test_counts_are_sums_and_what_collapse_asks_for(self):
        right = {"clean": [True, True, False], "count": [True] * 3, "robust": [True, False, False]}
        found = {name: np.array(values) for name, values in right.items()}
        found |= {name: np.arange(3) for name in ("answers", "labels", "reached")}
        found["norms"] = np.ones(3)
        with mock.patch.object(accuracy, "judged", return_value=found) as judged:
            sums = accuracy.counts("batch", judging="how")
        judged.assert_called_once_with("batch", judging="how")
        self.assertEqual({k: int(sums[k]) for k in ("clean", "count", "robust")},
                         {"clean": 2, "count": 3, "robust": 1})  # fmt: skip
        self.assertEqual(set(sums), {"clean", "count", "robust", "answers", "labels", "mask"})
        self.assertEqual(sums["mask"].tolist(), [True] * 3)
