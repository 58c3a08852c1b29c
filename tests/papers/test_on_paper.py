"""The analyses of one pixel, whose attacked loss is known on paper."""

from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from jaxrobust.papers.networks import (
    attack,
    effectiveness,
    perturbations,
    semantic_score,
)
from jaxrobust.papers.networks import synthesis as from_noise
from jaxrobust.papers.networks.analyses import AnalysisSettings
from jaxrobust.papers.networks.network_sample import NetworkSample
from jaxrobust.types import Threat

EPSILON = 0.2
# So near to an end of [0, 1] that each random start reaches the far side of its ball.
PIXELS, LABELS = np.float32([1.0, 0.95, 0.0, 0.05]), np.int32([0, 0, 1, 1])
ATTACKED = np.array([0.8, 0.75, 0.2, 0.25])


def logit(pixels: np.ndarray) -> np.ndarray:
    """The logit of class 0; that of class 1 is 0."""
    return 8 * (pixels - 0.85)


def ce(pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(np.where(labels == 0, -1, 1) * logit(pixels)))


def sample(classes: int = 2) -> NetworkSample:
    network = SimpleNamespace(num_classes=classes, image_size=1)
    subject = SimpleNamespace(ball=Threat("linf", EPSILON), network=network)
    rest = jnp.arange(classes - 1, dtype=jnp.float32)[::-1] - (classes - 2)
    logits_fn = jax.tree_util.Partial(
        lambda x: jnp.stack([logit(x[:, 0, 0, 0]), *jnp.tile(rest[:, None], (1, len(x)))], 1)
    )
    images = PIXELS.reshape(4, 1, 1, 1)
    return NetworkSample("a pixel", subject, logits_fn, images, LABELS, np.arange(4), ("a", "b"))


def settings(name: str, steps: tuple[int, ...] = (3,), **others) -> AnalysisSettings:
    return AnalysisSettings(name, {"workdir": None}, 4, steps, batch=3, **others)


class PixelTest(parameterized.TestCase):
    def assert_columns(self, rows, **expected):
        for key, values in expected.items():
            np.testing.assert_allclose([row[key] for row in rows], values, atol=1e-5, err_msg=key)

    def test_perturbations(self):
        rows, (images, change) = perturbations.analyse(sample(), settings("perturbations"))
        self.assert_columns(
            rows,
            clean_prediction=LABELS,
            adversarial_prediction=[1, 1, 1, 1],
            clean_ce=ce(PIXELS, LABELS),
            adversarial_ce=ce(ATTACKED, LABELS),
            largest_change=[EPSILON] * 4,
            mean_change_of_limit=[1] * 4,
            share_at_limit=[1] * 4,
        )
        self.assertEqual([row["class"] for row in rows], ["a", "a", "b", "b"])
        np.testing.assert_allclose(images.ravel(), ATTACKED, atol=1e-6)
        np.testing.assert_allclose(change.ravel(), [0, 0, 1, 1], atol=1e-5)  # black: it fell

    def test_outside_of_linf_the_limit_is_each_images_largest_change(self):
        subject = SimpleNamespace(ball=Threat("l2", 1.0))
        delta = np.float32([[0.1, -0.4], [0.0, 0.0]]).reshape(2, 1, 2, 1)
        limits = perturbations.limits(sample()._replace(subject=subject), delta)
        np.testing.assert_allclose(limits, [0.4, np.finfo(np.float32).tiny])
        shown = perturbations.shown(delta, limits, "attack")
        np.testing.assert_allclose(shown.ravel(), [0.625, 0, 0.5, 0.5])

    def test_synthesis(self):
        how = settings("synthesis", (5,), targets=(1, 0, 0))  # 5 steps of 0.225 cross [0, 1]
        rows, images = from_noise.analyse(sample(), how)
        targets, ends = np.array([1, 0, 0, 1]), np.array([0, 1, 1, 0])
        start = from_noise.noise((4, 1, 1, 1), 0).ravel()
        np.testing.assert_array_equal(images.ravel(), ends)
        self.assert_columns(
            rows,
            target=targets,
            prediction=targets,
            start_ce=ce(start, targets),
            end_ce=ce(ends, targets),
            probability=np.exp(-ce(ends, targets)),
            saturated_at_start=(start == 0) | (start == 1),
            saturated_at_end=[1] * 4,
        )

    def test_targets_are_drawn_or_refused(self):
        drawn = np.random.default_rng([3, 1]).integers(0, 2, 4)
        rows, _ = from_noise.analyse(sample(), settings("synthesis", (1,), seed=3))
        self.assert_columns(rows, target=drawn)
        for target in (2, -1):
            said = "--targets must be classes of a pixel, from 0 to 1"
            with self.assertRaisesRegex(ValueError, said):
                from_noise.analyse(sample(), settings("synthesis", targets=(target,)))

    def test_noise_is_almost_all_black_or_white(self):
        start = from_noise.noise((200, 200), 3)
        self.assertAlmostEqual(((start == 0) | (start == 1)).mean(), 1 - 1 / 30, delta=0.005)

    def test_effectiveness(self):
        # Losses of 0.5 and 1.5 after 1 step from two starts, and of 2 and 2 after 4.
        losses = {(1, 0): 0.5, (1, 1): 1.5, (4, 0): 2.0, (4, 1): 2.0}

        def pgd(seen, *, steps, seed, batch):
            z = -np.log(np.expm1(losses[steps, seed]))
            return None, np.float32([[z, 0], [z, 0], [0, z], [0, z]])

        with mock.patch.object(attack, "pgd", pgd):
            rows, _ = effectiveness.analyse(sample(), settings("effectiveness", (1, 4), seeds=2))
        self.assert_columns(
            rows,
            attack_steps=[1, 4],
            ce=[1, 2],
            ce_std_over_seeds=[0.5, 0],
            accuracy=[0.5, 0],  # e^-0.5 is above a half, e^-1.5 and e^-2 are below
            left_percent=[50, 0],
        )

    @parameterized.parameters(("code", 1.0), ("attack", 0.0))
    def test_a_score_is_the_accuracy_on_perturbations(self, sign, score):
        rows, change = semantic_score.analyse(sample(), settings("semantic-score", sign=sign))
        self.assert_columns(rows, perturbations_top1=[score], images_top1=[1], top=[1])
        self.assertEqual(change.ravel().tolist(), [255 * (y == (sign == "attack")) for y in LABELS])

    def test_hits(self):
        values, labels = np.float32([[3, 2, 1, 0]] * 4), np.array([0, 1, 2, 3])
        hits = [semantic_score.hits(values, labels, top) for top in (1, 2, 3)]
        self.assertEqual(hits, [0.25, 0.5, 0.75])
