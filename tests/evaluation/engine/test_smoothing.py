"""Randomized smoothing next to the authors' procedure on the same draws, and a known radius."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import stats

from jaxrobust.evaluation.engine import engine, smoothing
from jaxrobust.evaluation.engine.smoothing import ABSTAINS, Smoothing
from jaxrobust.models.kernels import convolutions
from tests.support import sweeps

SEED, SHAPE = 5, (4, 4, 3)
RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(48, 4)).astype(np.float32)
IMAGES = RNG.random((6, *SHAPE)).astype(np.float32)


def linear(weights, images):
    return images.reshape(len(images), -1) @ weights


def runner(network=linear, weights=WEIGHTS, slots=16):
    logits_fn = jax.tree_util.Partial(network, weights)
    made = engine.make(logits_fn, slots=slots, image_size=SHAPE[0])
    return engine.trace(made, SHAPE), logits_fn


def noise(number: int, draws: range) -> np.ndarray:
    """The draws of an image by its number, one after the other."""
    key = jax.random.fold_in(jax.random.key(SEED, impl="threefry2x32"), number)
    each = lambda draw: jax.random.normal(jax.random.fold_in(key, draw), SHAPE)  # noqa: E731
    return np.asarray(jax.lax.map(each, np.asarray(draws)))


def authors(image, draws: np.ndarray, how: Smoothing) -> tuple[int, float, list[int]]:
    """Certify as core.py does: the class by few draws, its share by the others, in float64."""
    logits = linear(WEIGHTS.astype(np.float64), image + how.sigma * draws.astype(np.float64))
    answers = logits.argmax(1)
    chosen = np.bincount(answers[: how.selection], minlength=4).argmax()
    counts = np.bincount(answers[how.selection :], minlength=4)
    votes = counts[chosen]
    share = stats.beta.ppf(how.alpha, votes, how.draws - votes + 1)
    if not share >= 0.5:
        return ABSTAINS, 0.0, counts.tolist()
    return int(chosen), how.sigma * stats.norm.ppf(share), counts.tolist()


class AuthorsTest(parameterized.TestCase):
    @parameterized.parameters(0.05, 0.5)
    def test_counts_and_radii(self, sigma):
        how = Smoothing(sigma, draws=300, selection=20, alpha=0.01)
        made, held = runner()
        abstained = 0
        for number, image in enumerate(IMAGES):
            found = smoothing.certify(made, image, number, how, seed=SEED)
            draws = noise(number, range(how.selection + how.draws))
            answer, radius, counts = authors(image, draws, how)
            own = smoothing.counts(made, image, number, how.selection, 320, sigma=sigma, seed=SEED)
            self.assertEqual(np.asarray(own).sum(0).tolist(), [*counts, 0])
            self.assertEqual(found.answer, answer)
            self.assertAlmostEqual(found.radius, radius, delta=1e-12)
            abstained += answer == ABSTAINS
        self.assertBetween(abstained, 1, len(IMAGES) - 1)  # both kinds are compared
        del held

    def test_a_linear_network_has_no_larger_radius(self):
        """Its smoothed class changes at the hyperplane: a certificate lies before it."""
        weights = np.stack([np.zeros(48), RNG.normal(size=48)], axis=1).astype(np.float32)
        how = Smoothing(0.3, draws=2000, alpha=0.001)
        made, held = runner(weights=weights)
        shares = []
        for number, image in enumerate(IMAGES):
            found = smoothing.certify(made, image, number, how, seed=SEED)
            distance = abs(image.ravel() @ weights[:, 1]) / np.linalg.norm(weights[:, 1])
            self.assertLess(found.radius, min(distance, how.largest_radius) + 1e-9)
            if found.answer != ABSTAINS:
                self.assertEqual(found.answer, int(image.ravel() @ weights[:, 1] > 0))
                shares.append(found.radius / min(distance, how.largest_radius))
        self.assertGreater(max(shares), 0.8)  # and not far before it
        del held


class DrawsTest(parameterized.TestCase):
    def test_a_number_at_a_time_changes_nothing(self):
        how = Smoothing(0.3, draws=203, selection=13)
        found = []
        for slots in (8, 40):
            made, held = runner(slots=slots)
            found.append(smoothing.certify(made, IMAGES[0], 7, how, seed=SEED))
            del held
        self.assertEqual(*found)

    def test_each_image_and_seed_has_others(self):
        made, held = runner()
        count = lambda number, seed: np.asarray(  # noqa: E731
            smoothing.counts(made, IMAGES[1], number, 0, 400, sigma=0.5, seed=seed)
        ).sum(0)
        first = count(0, 0)
        self.assertEqual(first.sum(), 400)
        for other in (count(1, 0), count(0, 1)):
            self.assertFalse(np.array_equal(first, other))
        del held

    def test_a_draw_without_an_answer_counts_for_no_class(self):
        def broken(weights, images):
            bright, logits = images[:, 0, 0, 0] > 0.5, linear(weights, images)
            first = jnp.where(bright, jnp.nan, logits[:, 0])  # one class is enough
            return logits.at[:, 0].set(first)

        made, held = runner(broken)
        image = np.full(SHAPE, 0.5, np.float32)
        found = smoothing.certify(made, image, 0, Smoothing(0.3, draws=200), seed=SEED)
        bright = (noise(0, range(100, 300))[:, 0, 0, 0] > 0).sum()
        self.assertEqual(found.unanswered, bright)
        self.assertLessEqual(found.votes, 200 - bright)
        self.assertGreater(found.votes, 0)
        del held


class TilesTest(absltest.TestCase):
    def test_votes_are_counted_without_tiles(self):
        """Tiles are off by 2,000 times the direct form's error next to a bright pixel, and nothing
        confirms a vote.
        """
        kernel = RNG.normal(size=(3, 3, 64, 64)).astype(np.float32)
        spread = RNG.normal(size=(3, 64)).astype(np.float32)

        def network(kernel, images):
            return convolutions.conv(images @ spread, kernel, padding=1).mean((1, 2))

        made, held = runner(network, kernel, slots=8 * 16)
        found = smoothing.counts(made, IMAGES[0], 0, 0, 128, sigma=0.5, seed=SEED)
        noisy = IMAGES[0] + 0.5 * noise(0, range(128))
        logits = np.sort(np.asarray(network(kernel, jnp.asarray(noisy))), axis=1)
        self.assertGreater((logits[:, -1] - logits[:, -2]).min(), 1e-4)  # far above rounding
        answers = np.asarray(network(kernel, jnp.asarray(noisy))).argmax(1)
        np.testing.assert_array_equal(
            np.asarray(found).sum(0), np.append(np.bincount(answers, minlength=64), 0)
        )
        program = smoothing._count_program(made.mesh, 64)
        key = jax.random.key_data(jax.random.key(0, impl="threefry2x32"))
        given = (made.logits_fn, IMAGES[0], key, np.float32(0.5), np.uint32(128))
        rows = np.zeros((made.mesh.size, 65), np.int32), np.arange(128, dtype=np.uint32)
        self.assertNotIn("_inputs", str(jax.make_jaxpr(program)(*given, *rows)))
        del held

    def test_votes_beside_one_bright_pixel(self):
        """Tiles are off by 2e-2 there, ten times the margin of each vote."""
        kernel = RNG.normal(size=(3, 3, 64, 64)).astype(np.float32)
        spread = RNG.normal(size=(3, 64)).astype(np.float32)

        def network(kernel, images):
            maps = (images @ spread).at[:, 1, 1].add(1e3)
            far = convolutions.conv(maps, kernel, padding=1)[:, 3, 3, 0]
            same = jnp.einsum("nijc,ijc->n", maps[:, 2:, 2:], kernel[:2, :2, :, 0])
            return jnp.stack([far, same + 2e-3], 1)

        made, held = runner(network, kernel, slots=8 * 16)
        found = smoothing.counts(made, IMAGES[0], 0, 0, 256, sigma=0.25, seed=SEED)
        self.assertEqual(np.asarray(found).sum(0).tolist(), [0, 256, 0])
        del held


class NumbersTest(parameterized.TestCase):
    @sweeps.rows(
        ({"sigma": 0}, "sigma=0 must be above 0"),
        ({"sigma": float("nan")}, "sigma=nan must be above 0"),
        ({"alpha": 0}, "alpha=0 must be between 0 and 0.5"),
        ({"alpha": 0.7}, "alpha=0.7 must be between 0 and 0.5"),
        ({"selection": 0}, "0 draws cannot choose a class"),
        ({"draws": 9}, "9 draws are too few to certify any image at alpha=0.001; give at least 10"),
    )
    def test_refuses(self, changed, sentence):
        with self.assertRaisesRegex(ValueError, sentence):
            smoothing.check(Smoothing(**({"sigma": 0.25} | changed)))

    def test_the_fewest_draws_certify(self):
        how = Smoothing(0.25, draws=10)
        smoothing.check(how)
        self.assertGreater(how.largest_radius, 0)
        self.assertEqual(smoothing.radius(9, how._replace(draws=9)), 0)

    def test_the_largest_radius_of_the_papers_numbers(self):
        """Section 4 of the paper: 3.8 sigma at most, for 100,000 draws and alpha 0.001."""
        self.assertAlmostEqual(Smoothing(1.0).largest_radius, 3.81, delta=0.01)
