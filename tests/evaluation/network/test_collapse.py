"""Networks that give one class: told where a sample shows it, and no alarm for honest ones."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust import data, evaluation
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.evaluation.network import collapse, reliability
from jaxrobust.types import Classifier
from tests.support import faults, sweeps

CLASSES = 10


def balanced(n):
    return np.arange(n) % CLASSES


class OfTest(parameterized.TestCase):
    @sweeps.rows(33, 64, 397, 5000)
    def test_a_constant_answer(self, n):
        found = collapse.of(np.full(n, 3), balanced(n))
        self.assertTrue(found.proven)
        self.assertIn(f"{n:,} of {n:,} clean images are predicted as class 3", found.words)
        self.assertIn("a lower learning rate", found.words)

    def test_nearly_all_and_the_rest_at_chance(self):
        rng = np.random.default_rng(0)
        labels, answers = balanced(5000), np.full(5000, 3)
        where = rng.choice(5000, 250, replace=False)
        answers[where] = rng.integers(0, CLASSES, 250)
        self.assertTrue(collapse.of(answers, labels).proven)
        answers[where] = labels[where]  # these are right: barely trained
        self.assertIsNone(collapse.of(answers, labels))

    def test_barely_trained_at_fifteen_percent(self):
        """However its answers spread: half of all in one class, or nine in ten of them."""
        n = 400
        labels = balanced(n)
        for share in (0.5, 0.9):
            answers = np.full(n, 3)
            others = np.flatnonzero(labels != 3)
            right, wrong = others[:20], others[20 : 20 + int((1 - share) * n) - 20]
            answers[right], answers[wrong] = labels[right], (labels[wrong] + 5) % CLASSES
            self.assertAlmostEqual((answers == labels).mean(), 0.15)
            self.assertIsNone(collapse.of(answers, labels), share)

    @sweeps.rows(*range(8))
    def test_images_of_mostly_one_class(self, seed):
        """Networks that know one in eight of the rare images, half of them, and all."""
        rng = np.random.default_rng(seed)
        labels = (rng.random(20_000) < 0.05).astype(int)
        for knows in (0.12, 0.5):
            answers = np.where(rng.random(20_000) < knows, labels, 0)
            self.assertIsNone(collapse.of(answers, labels))
        self.assertIsNone(collapse.of(labels, labels))
        self.assertIsNone(collapse.of(np.zeros(50, int), np.zeros(50, int)))  # a sorted split

    def test_the_moments_are_those_of_all_orders(self):
        rng = np.random.default_rng(0)
        answers, labels = rng.integers(0, 3, 40), rng.integers(0, 3, 40)
        right = [(answers == rng.permutation(labels)).sum() for _ in range(40_000)]
        above = int((answers == labels).sum()) - collapse.beyond_chance(answers, labels)
        self.assertAlmostEqual(above, np.mean(right) + 3 * np.std(right), delta=0.05)

    @sweeps.rows((16, True), (6, True), (3, False), (1, False))
    def test_few_images_say_what_they_show(self, n, told):
        found = collapse.of(np.full(n, 3), balanced(n))
        self.assertEqual(found is not None, told)
        if told:
            self.assertFalse(found.proven)
            self.assertIn("So few images only show that at least", found.words)

    def test_no_answers(self):
        self.assertIsNone(collapse.of(np.zeros(0, int), np.zeros(0, int)))
        self.assertIsNone(collapse.of(np.full(64, -1), balanced(64)))
        answers = np.where(np.arange(64) < 8, -1, 3)
        self.assertTrue(collapse.of(answers, balanced(64)).proven)


class FewTest(parameterized.TestCase):
    """`reliability.check_network` of few images."""

    def flags(self, right, n=16):
        images, labels = faults.colours(n)
        answers = np.where(np.arange(n) < right, labels, (labels + 1) % 10)
        logits = np.eye(10, dtype=np.float32)[answers] + np.linspace(0, 0.01, n)[:, None]

        def forward(given):
            same = (given[:, None] == images[None]).all(axis=(2, 3, 4))
            return np.where(same.any(1)[:, None], logits[same.argmax(1)], 0.0)

        return reliability.check_network(forward, faults.healthy, images, labels)

    @sweeps.rows((0, "1"), (2, "0.49"), (4, "0.068"))
    def test_sixteen_images_that_chance_explains(self, right, chance):
        said = self.flags(right)["low-accuracy"]
        self.assertIn(f"{right} of 16 clean images are classified correctly; guessing", said)
        self.assertIn(f"with probability {chance}, so these images are too few", said)

    @sweeps.rows(5, 9, 16)
    def test_sixteen_images_that_it_does_not_explain(self, right):
        self.assertNotIn("low-accuracy", self.flags(right))


class EvaluationTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        images, labels = faults.colours(40)
        self.batch = (jnp.asarray(images), jnp.asarray(labels, jnp.int32))

    def test_counts_keep_answers(self):
        """What training, its end and the choice of weights count."""
        images, labels = self.batch
        constant = lambda p, s, x: (jnp.zeros((len(x), 10)).at[:, 3].set(1.0), s)  # noqa: E731
        healthy = lambda p, s, x: (faults.healthy(x), s)  # noqa: E731
        mask = jnp.arange(40) < 38
        for apply, collapsed in ((constant, True), (healthy, False)):
            found = accuracy.counts(
                *({}, {}, images, labels, mask, jnp.arange(40), jax.random.key(0)),
                judging=accuracy.Judging(
                    net=Classifier(init=None, apply=apply),
                    attack=lambda logits_fn, key, images, labels: images,
                    dtype="float32",
                ),
            )
            parts = [jax.device_get(found)]
            source = data.open_source("fake:8x8x1:10", "test")
            with mock.patch.object(accuracy, "_judgements", return_value=parts):
                reached = accuracy.count(None, None, mock.Mock(source=source, limit=None), None)
            self.assertEqual(reached["images"], 38)
            self.assertEqual(reached.get("collapse", {}).get("proven", False), collapsed)

    def test_autoattack_flags_it(self):
        images, labels = faults.colours(16)
        how = {
            "norm": "linf",
            "epsilon": 0.01,
            "attacks": ("apgd-ce",),
            "overrides": {"apgd-ce": {"steps": 1}},
        }
        for name, said in (("one-class", True), (None, False)):
            net = faults.FAULTS[name] if name else faults.healthy
            found = evaluation.autoattack(net, images, labels, verbose=False, batch_size=16, **how)
            self.assertEqual("collapsed" in found.flags, said, found.flags)
            self.assertEqual("low-accuracy" in found.flags, said, found.flags)
            np.testing.assert_array_equal(found.answers, np.argmax(net(images), axis=1))
