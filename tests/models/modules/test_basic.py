"""Modules alone: what they hold at first, what they compute, how running statistics move."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from jaxrobust.models.families import residual
from jaxrobust.models.interface import architecture_checks
from jaxrobust.models.modules import basic, norms
from jaxrobust.models.modules.basic import ACTIVATIONS
from jaxrobust.models.modules.draws import Draws, Drop, branches, dropouts, torch_default
from jaxrobust.zoo.shared import transformer
from tests.support import sweeps

RNG = np.random.default_rng(0)
X = RNG.standard_normal((4, 3, 3, 2)).astype(np.float32)


def draws(seed: int = 0) -> Draws:
    return Draws(jax.random.key(seed))


class InitTest(parameterized.TestCase):
    def test_by_default_a_kernel_is_narrow_and_a_bias_zero(self):
        made = basic.Linear(300, 200, rngs=draws())
        self.assertAlmostEqual(float(made.kernel[...].std()), 0.02, delta=1e-3)
        self.assertFalse(np.asarray(made.bias[...]).any())
        self.assertIsNone(basic.Linear(3, 2, bias=False, rngs=draws()).bias)

    def test_pytorchs_are_uniform_with_the_bound_of_what_comes_in(self):
        made = basic.Conv(32, 64, 3, groups=2, init=torch_default, rngs=draws())
        self.assertEqual(made.kernel[...].shape, (3, 3, 16, 64))
        for array in (made.kernel[...], made.bias[...]):
            bound = 1 / math.sqrt(3 * 3 * 16)
            self.assertLessEqual(float(jnp.abs(array).max()), bound)
            self.assertAlmostEqual(float(array.std()) / (bound / math.sqrt(3)), 1, delta=0.2)

    def test_each_draw_is_another(self):
        one, rngs = draws(), draws()
        first, second = (basic.Linear(4, 4, rngs=rngs).kernel[...] for _ in range(2))
        self.assertGreater(float(jnp.abs(first - second).max()), 1e-3)
        np.testing.assert_array_equal(first, basic.Linear(4, 4, rngs=one).kernel[...])


class BatchNormTest(parameterized.TestCase):
    def test_begins_as_the_identity_of_normal_maps(self):
        for made in (basic.BatchNorm(2), basic.BatchNorm(2, affine=False)):
            np.testing.assert_array_equal(made.mean[...], [0, 0])
            np.testing.assert_array_equal(made.var[...], [1, 1])
            self.assertEqual((made.group, made.momentum), (0, 0.1))
            np.testing.assert_allclose(made(jnp.asarray(X), False), X, rtol=1e-4)
        self.assertIsNone(made.scale or made.bias)
        for made in (basic.BatchNorm(2, group=3, momentum=0.5), basic.LayerNorm(2, eps=0.5)):
            np.testing.assert_array_equal(made.scale[...], [1, 1])
            np.testing.assert_array_equal(made.bias[...], [0, 0])
        self.assertEqual((made.eps, basic.LayerNorm(2).eps), (0.5, 1e-6))

    @sweeps.rows(0.1, 0.25, 1.0)
    def test_running_statistics_move_by_the_momentum(self, momentum):
        norm = basic.BatchNorm(2, momentum=momentum)
        norm.mean[...], norm.var[...] = jnp.array([1.0, -1.0]), jnp.array([4.0, 9.0])
        out = norm(jnp.asarray(X), train=True)
        own = X.reshape(-1, 2).astype(np.float64)
        normal = (own - own.mean(0)) / np.sqrt(own.var(0) + 1e-5)
        np.testing.assert_allclose(np.reshape(out, (-1, 2)), normal, atol=1e-5)
        for running, before, new in (
            (norm.mean, [1, -1], own.mean(0)),
            (norm.var, [4, 9], own.var(0, ddof=1)),
        ):
            moved = (1 - momentum) * np.array(before) + momentum * new
            np.testing.assert_allclose(running[...], moved, rtol=1e-5)

    def test_otherwise_they_normalise_and_stay(self):
        norm = basic.BatchNorm(2)
        norm.mean[...], norm.var[...] = jnp.array([1.0, -1.0]), jnp.array([4.0, 9.0])
        norm.scale[...], norm.bias[...] = jnp.array([2.0, 3.0]), jnp.array([0.5, 0.0])
        expected = (X - [1, -1]) / np.sqrt([4 + 1e-5, 9 + 1e-5]) * [2, 3] + [0.5, 0]
        np.testing.assert_allclose(
            norm(jnp.asarray(X), train=False), expected, rtol=1e-5, atol=1e-6
        )
        np.testing.assert_array_equal(norm.mean[...], [1, -1])

    def test_a_mean_that_is_not_finite_goes_with_a_momentum_of_1(self):
        norm = basic.BatchNorm(2, momentum=1.0, affine=False)
        norm.mean[...] = jnp.array([np.nan, np.inf])
        norm.move(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))
        np.testing.assert_array_equal(norm.mean[...], [1, 2])


class FunctionsTest(parameterized.TestCase):
    def test_the_first_layer_normalises(self):
        made = basic.Normalize(2)
        np.testing.assert_array_equal(made(jnp.asarray(X)), X)
        made.mean[...], made.std[...] = jnp.array([0.5, 0.25]), jnp.array([2.0, 4.0])
        np.testing.assert_allclose(made(jnp.asarray(X)), (X - [0.5, 0.25]) / [2, 4], rtol=1e-6)

    @parameterized.parameters(
        ("relu", lambda x: np.maximum(x, 0)),
        ("silu", lambda x: x / (1 + np.exp(-x))),
        ("softplus", lambda x: np.log1p(np.exp(x))),
        ("gelu", lambda x: np.array([v * (1 + math.erf(v / 2**0.5)) / 2 for v in x])),
        ("hard_swish", lambda x: x * np.clip(x + 3, 0, 6) / 6),
    )
    def test_activations_and_their_slopes(self, name, formula):
        x = np.array([-90, -3.5, -2.9, -0.3, 0.2, 2.9, 3.5, 19.5, 20.5, 90.0])
        function = ACTIVATIONS[name]
        np.testing.assert_allclose(function(jnp.float32(x)), formula(x), rtol=1e-5, atol=1e-6)
        slopes = jax.grad(lambda x: function(x).sum())(jnp.float32(x))
        with np.errstate(over="ignore"):
            by_hand = (formula(x + 1e-5) - formula(x - 1e-5)) / 2e-5
        np.testing.assert_allclose(slopes, by_hand, rtol=1e-3, atol=1e-4)

    def test_slopes_at_kinks_are_pytorchs(self):
        for name, at, expected in (
            ("relu", [0.0], [0.0]),
            ("hard_swish", [-3.0, 0.0, 3.0], [0.0, 0.5, 1.0]),
            ("softplus", [20.0], [1 / (1 + np.exp(-20))]),
        ):
            slopes = jax.grad(lambda x, f=ACTIVATIONS[name]: f(x).sum())(jnp.float32(at))
            np.testing.assert_allclose(slopes, expected, rtol=1e-6, err_msg=name)

    def test_an_mlp_is_four_times_as_wide(self):
        made = basic.Mlp(2, draws())
        made.fc1.bias[...] = jnp.arange(8.0)
        made.fc2.bias[...] = jnp.array([1.0, -1.0])
        hidden = ACTIVATIONS["gelu"](
            X.reshape(-1, 2) @ made.fc1.kernel[...] + jnp.arange(8.0)[None]
        )
        expected = hidden @ made.fc2.kernel[...] + jnp.array([[1.0, -1.0]])
        np.testing.assert_allclose(made(jnp.asarray(X.reshape(-1, 2))), expected, atol=1e-6)


class SharedTest(parameterized.TestCase):
    @sweeps.rows((8, 64, [0, 4]), (64, 64, [4]), (64, 256, [0, 4]))
    def test_which_shortcuts_have_a_convolution(self, stem, first, having):
        names = list(residual.block_names((4, 2), stem, first))
        expected = [f"layer1.{j}" for j in range(4)] + ["layer2.0", "layer2.1"]
        self.assertEqual([name for name, _ in names], expected)
        self.assertEqual([i for i, (_, conv) in enumerate(names) if conv], having)

    @sweeps.rows((32, 4, 8), (32, 32, 1), (30, 5, 6))
    def test_a_grid(self, size, patch, side):
        self.assertEqual(transformer.grid_of(size, patch), side)

    @sweeps.rows((30, 4, "use patch=3 or 5,"), (30, 0, "use patch=1,"), (6, 7, "use patch=6,"))
    def test_no_grid(self, size, patch, said):
        with self.assertRaisesRegex(ValueError, said):
            transformer.grid_of(size, patch)

    def test_an_image_is_halved_down_to_a_pixel(self):
        architecture_checks.check_halvings(32, 5)
        with self.assertRaisesRegex(ValueError, "halved 5 times, so use at least 32"):
            architecture_checks.check_halvings(31, 5)


# of the images f[B,H,W,C]: the axes that a norm averages over, channels in groups of 8
AXES = {"group": (1, 2, 4), "layer": (3, 4), "instance": (1, 2)}


class NormsTest(parameterized.TestCase):
    @sweeps.rows(*AXES)
    def test_mean_and_variance(self, name):
        """Far from a mean of zero, where the variance is not the mean square."""
        images = 3 + 2 * np.random.default_rng(0).normal(size=(2, 4, 5, 16)).astype(np.float32)
        found = norms.NORMS[name](16, 2, 0.1)(jnp.asarray(images), True)
        wide = images.astype(np.float64).reshape(2, 4, 5, 2, 8)
        axes = {"keepdims": True, "axis": AXES[name]}
        expected = (wide - wide.mean(**axes)) / np.sqrt(wide.var(**axes) + 1e-5)
        np.testing.assert_allclose(found, expected.reshape(images.shape), atol=3e-6)  # float32

    def test_groups_of_another_number(self):
        with self.assertRaisesRegex(ValueError, "12 channels cannot form 5 equal groups"):
            norms.GroupNorm(12, groups=5)


class KeysTest(parameterized.TestCase):
    @sweeps.rows(False, True)
    def test_all_places_draw_apart(self, of_images):
        key = jax.random.key(0)
        drop = Drop(jax.random.split(key, 3) if of_images else key, 0.5)
        places = [*branches(drop, 2), *dropouts(drop, 3, 0.1, paths=2)]
        keys = [np.asarray(jax.random.key_data(place.keywords["key"])) for place in places]
        for one, other in itertools.combinations(keys, 2):
            self.assertTrue((one != other).any(-1).all())
        self.assertEqual([place.keywords["rate"] for place in places], [0.5, 0.5, 0.1, 0.1, 0.1])

    def test_nothing_is_drawn_in_evaluation_or_at_rate_zero(self):
        drop = Drop(jax.random.key(0), 0.5)
        x = np.ones((2, 3), np.float32)
        for place in (*branches(None, 2), *dropouts(None, 1, 0.1, paths=2)):
            self.assertIs(place(x), x)
        self.assertIs(dropouts(drop, 1, 0, paths=2)[0](x), x)
