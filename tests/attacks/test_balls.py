"""Balls: the L1 projection against auto-attack a392200, and what every ball promises."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from jaxrobust.attacks import GEOMETRIES
from jaxrobust.attacks.geometry.balls import l1_correction, place_linf
from tests.support import paths, sweeps
from tests.support.golden import assert_within, load, norm_in_float64

NORMS = ("linf", "l2", "l1")
correction = jax.jit(l1_correction)


def random_cases(norm, count=1000, seed=0):
    """Images, faraway points and radii; one image in four has saturated pixels."""
    rng = np.random.default_rng(seed)
    images = rng.random((count, 4, 4, 3))
    images[::4] = images[::4].round()
    points = images + rng.normal(size=images.shape) * 10 ** rng.uniform(-3, 1, (count, 1, 1, 1))
    epsilon = {"linf": 0.3, "l2": 1.5, "l1": 6}[norm] * rng.random(count)
    epsilon[:50] = 0
    return (jnp.asarray(a, jnp.float32) for a in (images, points, epsilon))


class L1GoldenTest(parameterized.TestCase):
    def check(self, golden):
        for name in sorted(k[:-2] for k in golden if k.startswith("l1_") and k.endswith("_x")):
            x, y, expected = (golden[f"{name}_{k}"] for k in ("x", "y", "delta"))
            epsilon = jnp.full(len(x), float(name.split("eps")[1]), jnp.float32)
            delta = np.asarray(correction(jnp.asarray(x), jnp.asarray(y), epsilon))
            # The reference sums what is taken away, in float32: it loses the digits of a large y.
            tolerance = 2e-6 + 2e-6 * np.abs(y).max(axis=1, keepdims=True)
            assert_within(delta, expected, tolerance)
            np.testing.assert_array_equal(delta == -y, expected == -y)  # who is left at zero

    def test_small(self):
        self.check(load(paths.GOLDEN / "attacks/projections.npz"))

    def test_in_full(self):
        if not (paths.SHARED / "golden/projections.npz").exists():
            self.skipTest(paths.NO_SHARED)
        self.check(load(paths.SHARED / "golden/projections.npz"))

    def test_against_a_sort_in_float64(self):
        """The definition: one alpha for all, found here from the sorted breakpoints."""
        rng = np.random.default_rng(3)
        x, y = rng.random((200, 12)), rng.normal(size=(200, 12))
        most = np.abs(y)
        least = np.maximum(0, -np.minimum(1 - x - y, x + y))
        expected = np.empty_like(y)
        for i in range(len(x)):
            nodes = np.sort(np.concatenate([[0], least[i], most[i]]))
            left = (most[i] - np.clip(nodes[:, None], least[i], most[i])).sum(1)
            alpha = np.interp(-1.0, -left, nodes) if left[0] > 1 else 0
            expected[i] = -np.sign(y[i]) * np.clip(alpha, least[i], most[i])
        delta = correction(*(jnp.asarray(a, jnp.float32) for a in (x, y)), jnp.ones(200))
        np.testing.assert_allclose(delta, expected, atol=1e-6)  # rounding of x and y

    def test_images_outside_the_box(self):
        """Training noise: the ball is that of the clipped image, and nothing is NaN."""
        images, points, epsilon = random_cases("l1", 100)
        noisy = images + 3 * jax.random.normal(jax.random.key(1), images.shape)
        project = jax.jit(GEOMETRIES["l1"].project)
        expected = project(points, jnp.clip(noisy, 0, 1), epsilon)
        np.testing.assert_array_equal(project(points, noisy, epsilon), expected)


class PropertyTest(parameterized.TestCase):
    @sweeps.rows(*NORMS)
    def test_projection_stays_in_ball_and_box(self, norm):
        ball = GEOMETRIES[norm]
        images, points, epsilon = random_cases(norm)
        raw = jax.jit(ball.project)(points, images, epsilon)
        settled = np.asarray(jax.jit(ball.settle)(raw, images))
        self.assertTrue((settled >= 0).all() and (settled <= 1).all())
        np.testing.assert_array_less(np.abs(settled - raw), 2e-6)  # only rounding is removed
        norms = norm_in_float64(settled - np.asarray(images, np.float64), norm)
        np.testing.assert_array_less(norms, epsilon.astype(float) * (1 + 1e-5) + 1e-6)
        np.testing.assert_array_equal(settled[epsilon == 0], images[epsilon == 0])

    @sweeps.rows(*NORMS)
    def test_projection_keeps_points_inside(self, norm):
        ball = GEOMETRIES[norm]
        images, points, epsilon = random_cases(norm, 200)
        project = jax.jit(ball.project)
        inside = project(points, images, epsilon)
        again = project(inside, images, epsilon)
        np.testing.assert_allclose(again, inside, atol=2e-6)  # the norm's own rounding

    @sweeps.rows(*NORMS)
    def test_samples(self, norm):
        ball = GEOMETRIES[norm]
        images = jax.random.uniform(jax.random.key(0), (8, 8, 8, 3))
        epsilon = jnp.linspace(0.0, {"linf": 0.1, "l2": 1.0, "l1": 8.0}[norm], 8)
        keys = jax.random.split(jax.random.key(1), 8)
        sample = jax.jit(ball.sample)
        points = sample(keys, images, epsilon)
        self.assertTrue((points >= 0).all() and (points <= 1).all())
        norms = norm_in_float64(np.asarray(points, np.float64) - images, norm)
        np.testing.assert_array_less(norms, epsilon * (1 + 1e-5) + 2e-5)
        # The draw is the image's own, whatever its place in the batch.
        np.testing.assert_array_equal(sample(keys[::-1], images[::-1], epsilon[::-1]), points[::-1])
        other = sample(keys[::-1], images, epsilon)
        self.assertFalse((points[1:] == other[1:]).all(axis=(1, 2, 3)).any())

    def test_linf_sample_reaches_the_border(self):
        images = jnp.full((4, 8, 8, 3), 0.5)
        keys = jax.random.split(jax.random.key(1), 4)
        points = jax.jit(GEOMETRIES["linf"].sample)(keys, images, jnp.full(4, 0.125))
        np.testing.assert_array_equal(jnp.abs(points - images).max(axis=(1, 2, 3)), 0.125)

    def test_linf_start_of_a_draw(self):
        """AutoAttack's: from [-1, 1), stretched until the largest entry is at the border."""
        uniform = jnp.array([0.0, 0.25, 0.5, 0.875, 0.25, 0.5, 0.5, 0.625]).reshape(2, 2, 2, 1)
        start = place_linf(uniform, jnp.full_like(uniform, 0.5), jnp.array([0.25, 0.125]))
        expected = [0.25, 0.375, 0.5, 0.6875, 0.375, 0.5, 0.5, 0.5625]
        np.testing.assert_allclose(start.ravel(), expected, atol=1e-7)

    def test_l1_ascent_keeps_the_largest(self):
        gradient = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 4, 3)), jnp.float32)
        kept = jnp.array([0.0, 0.05, 0.2, 0.5, 1.0])
        ascend, zeros = jax.jit(GEOMETRIES["l1"].ascend), jnp.zeros_like(gradient)
        moved = np.asarray(ascend(zeros, gradient, jnp.full(5, 2.0), kept))
        gradient, kept = np.asarray(gradient), np.asarray(kept)
        for i in range(5):
            size = np.sort(np.abs(gradient[i]).ravel())
            limit = size[min(max(int((np.float32(1) - kept[i]) * 48), 0), 47)]
            expected = np.where(np.abs(gradient[i]) >= limit, np.sign(gradient[i]), 0)
            np.testing.assert_array_equal(np.sign(moved[i]), expected)
            np.testing.assert_allclose(np.abs(moved[i]).sum(), 2, rtol=1e-5)

    def test_l1_ascent_keeps_all_of_equals(self):
        gradient = jnp.full((1, 2, 2, 3), -3.0).at[0, 0, 0, 0].set(0.0)
        ascend = jax.jit(GEOMETRIES["l1"].ascend)
        moved = ascend(jnp.zeros_like(gradient), gradient, jnp.ones(1), jnp.zeros(1))
        self.assertEqual(int((moved < 0).sum()), 11)

    @sweeps.fast("l2")
    @parameterized.parameters(*NORMS)
    def test_float64_stays(self, norm):
        with jax.enable_x64(True):
            images, points, epsilon = (
                jnp.asarray(np.asarray(a, np.float64)) for a in random_cases(norm, 8)
            )
            projected = GEOMETRIES[norm].project(points, images, epsilon)
            moved = GEOMETRIES[norm].ascend(projected, points, epsilon, jnp.full(8, 0.1))
            self.assertEqual({projected.dtype, moved.dtype}, {jnp.dtype("float64")})
            norms = norm_in_float64(projected - images, norm)
            np.testing.assert_array_less(norms, np.asarray(epsilon) * (1 + 1e-13) + 1e-13)

    def test_nan_has_no_sign(self):
        gradient = jnp.array([[jnp.nan, 1.0, -0.0, -2.0]])
        moved = GEOMETRIES["linf"].ascend(jnp.zeros((1, 4)), gradient, jnp.ones(1), None)
        np.testing.assert_array_equal(moved, [[0, 1, 0, -1]])
