"""What counts as right, clean and under attack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest

from jaxrobust.evaluation.engine import accuracy
from jaxrobust.types import Classifier, Threat


class Top5Test(absltest.TestCase):
    def counts(self, logits, labels, mask, **how):
        net = Classifier(init=None, apply=lambda params, stats, images: (jnp.asarray(logits), {}))
        n = len(labels)
        return accuracy.counts(
            *({}, {}, jnp.zeros((n, 2, 2, 1)), jnp.asarray(labels), jnp.asarray(mask)),
            jnp.arange(n),
            jax.random.key(0),
            judging=accuracy.Judging(
                net, lambda logits_fn, key, images, labels: images, dtype="float32", **how
            ),
        )

    def test_is_torchs_topk(self):
        rng = np.random.default_rng(0)
        logits = rng.normal(size=(64, 20)).astype(np.float32)
        labels, mask = rng.integers(0, 20, 64).astype(np.int32), rng.random(64) < 0.8
        found = self.counts(logits, labels, mask, top5=True)
        ranks = (logits > logits[np.arange(64), labels][:, None]).sum(1)
        self.assertEqual(found["clean_top5"], ((ranks < 5) & mask).sum())
        self.assertEqual(found["clean"], ((ranks < 1) & mask).sum())
        self.assertGreater(found["clean_top5"], found["clean"])
        self.assertNotIn("clean_top5", self.counts(logits, labels, mask))

    def test_few_classes_and_nan(self):
        mask, labels = np.ones(2, bool), np.zeros(2, np.int32)
        few = self.counts(np.zeros((2, 5), np.float32), labels, mask, top5=True)
        self.assertNotIn("clean_top5", few)
        logits = np.zeros((2, 9), np.float32)
        logits[1, 3] = np.nan
        self.assertEqual(self.counts(logits, labels, mask, top5=True)["clean_top5"], 1)


@pytest.mark.computes
class ApgdCeTest(absltest.TestCase):
    @pytest.mark.slow
    def test_reports_the_last_point_that_is_wrong(self):
        """Not that of the highest loss, where this network is right again."""

        def logits_fn(x):
            pixel = x[:, 0, 0]  # the loss rises all the way to 0.6
            wrong = jnp.where(pixel < 0.58, 1.1, 0.9)
            return jnp.concatenate([jnp.ones_like(pixel), wrong, *[20 * pixel - 11.1] * 8], axis=1)

        images, keys = jnp.full((8, 4, 4, 1), 0.5), jax.random.split(jax.random.key(0), 8)
        attack = accuracy.apgd_ce(Threat("linf", 0.1), steps=3)
        points = attack(logits_fn, keys, images, jnp.zeros(8, jnp.int32))
        wrong = logits_fn(points).argmax(axis=1) != 0
        self.assertGreaterEqual(wrong.sum(), 6)  # whose random start was below 0.58
