"""What counts as right, clean and under attack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest

from jaxrobust.evaluation import accuracy
from jaxrobust.types import Classifier


class CountsTest(absltest.TestCase):
    def test_an_attack_rights_no_wrong(self):
        def apply(params, stats, images):
            return jnp.stack([images.sum((1, 2, 3)), jnp.ones(len(images))], axis=1), stats

        dark = jnp.zeros((2, 2, 2, 1))
        found = accuracy.counts(
            *({}, {}, dark, jnp.array([0, 1]), jnp.ones(2, bool), jnp.arange(2)),
            jax.random.key(0),
            net=Classifier(init=None, apply=apply),
            attack=lambda logits_fn, key, images, labels: images + 1,
            dtype=jnp.dtype("float32"),
        )
        self.assertEqual((found["clean"], found["robust"]), (1, 0))

    def test_nan_is_no_right_answer(self):
        def apply(params, stats, images):
            return jnp.full((len(images), 3), params["logit"][0]).at[:, 1].set(0.0), stats

        net = Classifier(init=None, apply=apply)
        images, labels = jnp.zeros((4, 2, 2, 1)), jnp.array([0, 0, 1, 2])
        for logit, clean in ((1.0, 2), (np.nan, 0)):
            counts = accuracy.counts(
                {"logit": jnp.array([logit])},
                {},
                images,
                labels,
                jnp.ones(4, bool),
                jnp.arange(4),
                jax.random.key(0),
                net=net,
                attack=lambda logits_fn, key, images, labels: images,
                dtype=jnp.dtype("float32"),
            )
            self.assertEqual((counts["clean"], counts["robust"]), (clean, clean))


@pytest.mark.computes
class ApgdCeTest(absltest.TestCase):
    def test_reports_the_last_point_that_is_wrong(self):
        """Not that of the highest loss, where this network is right again."""

        def logits_fn(x):
            pixel = x[:, 0, 0]  # the loss rises all the way to 0.6
            wrong = jnp.where(pixel < 0.58, 1.1, 0.9)
            return jnp.concatenate([jnp.ones_like(pixel), wrong, *[20 * pixel - 11.1] * 8], axis=1)

        images, keys = jnp.full((8, 4, 4, 1), 0.5), jax.random.split(jax.random.key(0), 8)
        attack = accuracy.apgd_ce(norm="linf", epsilon=0.1, steps=3)
        points = attack(logits_fn, keys, images, jnp.zeros(8, jnp.int32))
        wrong = logits_fn(points).argmax(axis=1) != 0
        self.assertGreaterEqual(wrong.sum(), 6)  # whose random start was below 0.58


if __name__ == "__main__":
    absltest.main()
