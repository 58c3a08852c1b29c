"""Multi steepest descent next to NumPy's in float64, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust import attacks
from jaxrobust.attacks import mixes
from jaxrobust.training.update import inner
from jaxrobust.zoo.objectives.norms import steepest
from tests.support.steps import small_config

RADII = {"linf": 0.06, "l2": 0.3, "l1": 1.1}
STEPS = {"linf": 0.03, "l2": 0.15, "l1": 0.55}
RANDOM = np.random.default_rng(7)
IMAGES = RANDOM.random((12, 4, 4, 3))
LABELS = RANDOM.integers(0, 3, 12)
WEIGHTS = RANDOM.standard_normal((48, 3))
KEPT = 0.05


def network(images):
    return 3 * jnp.tanh(images.reshape(len(images), -1) @ WEIGHTS)


def losses(x):
    """Cross-entropy of each image, and its slope, in NumPy."""
    bent = np.tanh(x.reshape(len(x), -1) @ WEIGHTS)
    logits = 3 * bent
    top = logits.max(1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
    wrong = np.exp(log_p) - np.eye(3)[LABELS]
    slope = (3 * wrong * (1 - bent**2)) @ WEIGHTS.T
    return -log_p[np.arange(len(x)), LABELS], slope.reshape(x.shape)


def whole(values, of):
    return of(values.reshape(len(values), -1), axis=1)[:, None, None, None]


def steps_of(x, slope):
    """Where the steepest step of each norm leads, before its projection."""
    size = np.abs(slope)
    flat = np.sort(size.reshape(len(x), -1), axis=1)
    least = flat[:, int((1 - KEPT) * flat.shape[1])][:, None, None, None]
    signs = np.where(size >= least, np.sign(slope), 0)
    return {
        "linf": x + STEPS["linf"] * np.sign(slope),
        "l2": x + STEPS["l2"] * slope / np.sqrt(whole(slope**2, np.sum)),
        "l1": x + STEPS["l1"] * signs / whole(np.abs(signs), np.sum),
    }


def projected(norm, x):
    """The point of ball and box that belongs to `x`; on l1 the nearest one, by halving."""
    delta, radius = x - IMAGES, RADII[norm]
    if norm == "linf":
        return np.clip(IMAGES + np.clip(delta, -radius, radius), 0, 1)
    if norm == "l2":
        length = np.sqrt(whole(delta**2, np.sum))
        return np.clip(IMAGES + delta * np.minimum(1, radius / np.maximum(length, 1e-12)), 0, 1)

    def shrunk(alpha):
        small = np.sign(delta) * np.maximum(np.abs(delta) - alpha, 0)
        return np.clip(IMAGES + small, 0, 1) - IMAGES

    low, high = np.zeros((len(x), 1, 1, 1)), whole(np.abs(delta), np.max)
    fits = whole(np.abs(shrunk(low)), np.sum) <= radius
    for _ in range(80):
        middle = (low + high) / 2
        over = whole(np.abs(shrunk(middle)), np.sum) > radius
        low, high = np.where(over, middle, low), np.where(over, high, middle)
    return IMAGES + np.where(fits, shrunk(0), shrunk(high))


def restated(norms, count):
    """Algorithm 1 of the paper; the points, and which norms were chosen."""
    x, chosen = IMAGES, set()
    for _ in range(count):
        moved = steps_of(x, losses(x)[1])
        found = np.stack([projected(norm, moved[norm]) for norm in norms])
        best = np.stack([losses(own)[0] for own in found]).argmax(0)
        chosen |= {norms[i] for i in best}
        x = found[best, np.arange(len(x))]
    return x, chosen


def balls(norms, share=1.0):
    return [steepest.SteepestBall(norm, share * RADII[norm], STEPS[norm]) for norm in norms]


class PointsTest(parameterized.TestCase):
    @parameterized.parameters(("linf", "l2", "l1"), ("l1", "linf"))
    def test_those_of_numpy(self, *norms):
        with jax.enable_x64(True):
            attack = steepest.msd(balls(norms), steps=5)
            found = attack(network, None, jnp.asarray(IMAGES), jnp.asarray(LABELS))
            expected, chosen = restated(norms, 5)
            self.assertEqual(chosen, set(norms))  # else it shows less
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
            for norm in norms:  # each by itself ends elsewhere
                alone, _ = restated((norm,), 5)
                self.assertGreater(np.abs(alone - expected).max(), 1e-3)

    def test_one_norm_is_its_pgd(self):
        images, labels = jnp.asarray(IMAGES, jnp.float32), jnp.asarray(LABELS, jnp.int32)
        how = {"norm": "l2", "epsilon": 0.3, "step_size": 0.15, "steps": 3, "random_start": False}
        programs = [
            str(jax.make_jaxpr(lambda x, own=own: own(network, None, x, labels))(images))
            for own in (steepest.msd(balls(["l2"]), steps=3), attacks.pgd(**how))
        ]
        self.assertEqual(*programs)

    def test_it_begins_at_the_first_norms_random_point(self):
        images, labels = jnp.asarray(IMAGES, jnp.float32), jnp.asarray(LABELS, jnp.int32)
        keys, still = attacks.image_keys(jax.random.key(1), 12), {"step_size": 1e-12}
        none = [own._replace(**still) for own in balls(("linf", "l2", "l1"))]
        found = steepest.msd(none, steps=1, random_start=True)(network, keys, images, labels)
        start = attacks.pgd(norm="linf", epsilon=0.06, steps=1, random_start=True, **still)
        expected = np.asarray(start(network, keys, images, labels))
        same = np.abs(np.asarray(found) - expected).max((1, 2, 3)) < 1e-6
        self.assertTrue(same.any())  # where its own candidate was the best
        self.assertTrue((np.abs(np.asarray(found) - IMAGES).max((1, 2, 3)) > 0.01).all())

    def test_radii_grow_alike_and_steps_stay(self):
        config = small_config(
            attack__norm=tuple(RADII), attack__epsilon=tuple(RADII.values()), attack__mix="msd",
            attack__name="pgd", attack__step_size=tuple(STEPS.values()), attack__warmup_epochs=2,
        )  # fmt: skip
        images, labels = jnp.asarray(IMAGES, jnp.float32), jnp.asarray(LABELS, jnp.int32)
        attack = inner.training_attack(config, "adversarial")
        found = attack(network, None, images, labels, epsilon_share=jnp.float32(0.5))
        half = steepest.msd(balls(tuple(RADII), 0.5), steps=3)
        np.testing.assert_allclose(found, half(network, None, images, labels), atol=1e-6)


class CostTest(absltest.TestCase):
    def test_passes_are_those_that_are_made(self):
        made = []

        def counted(images):
            jax.debug.callback(lambda: made.append(1))
            return network(images)

        how = {"attack__norm": tuple(RADII), "attack__epsilon": tuple(RADII.values())}
        config = small_config(**how, attack__mix="msd", attack__name="pgd")
        attack = inner.training_attack(config, "adversarial")
        images, labels = jnp.asarray(IMAGES, jnp.float32), jnp.asarray(LABELS, jnp.int32)
        jax.block_until_ready(attack(counted, None, images, labels))
        jax.effects_barrier()
        steps, forward = 3, len(made)
        self.assertEqual(forward, steps * (1 + 3))
        self.assertEqual(mixes.passes(config.attack), forward + steps)  # as many backward
