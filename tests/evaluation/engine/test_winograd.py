"""Winograd's convolutions are XLA's, values and gradients, and weights are transformed once."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax

from jaxrobust.evaluation.engine import slots
from jaxrobust.models.kernels import convolutions, winograd
from jaxrobust.models.kernels.cpu.rewriting import before_a_loop, fast_formulas
from jaxrobust.types import VERDICT_PRECISION
from tests.support import sweeps

LAYOUT = ("NHWC", "HWIO", "NHWC")
SAME = ((1, 1), (1, 1))


def drawn(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def plain(padding, x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=LAYOUT)


class ConvolveTest(parameterized.TestCase):
    @sweeps.fast(2, 3)
    @parameterized.product(
        (
            {"size": (8, 8), "padding": SAME},
            {"size": (7, 5), "padding": SAME},
            {"size": (6, 9), "padding": ((0, 2), (2, 1))},
            {"size": (4, 4), "padding": ((0, 0), (0, 0))},
        ),
        batch=(5, 16),  # tiles of 2x2 and of 4x4
    )
    def test_is_a_convolution(self, size, padding, batch):
        with jax.enable_x64(True):
            x, kernel = jnp.asarray(drawn(batch, *size, 5)), jnp.asarray(drawn(3, 3, 5, 6))

            def of(function):
                value, back = jax.vjp(lambda x, kernel: function(padding, x, kernel), x, kernel)
                return value, *back(jnp.cos(value))

            for ours, theirs in zip(of(winograd.convolve), of(plain), strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-12)

    @sweeps.rows((7, 3, 2), (7, 1, 1), (12, 5, 4), (7, 50, 7))
    def test_a_few_images_at_a_time(self, batch, fit, at_once):
        """Those that fill the last of equal parts change nothing."""
        with jax.enable_x64(True):
            x, kernel = jnp.asarray(drawn(batch, 8, 8, 5)), jnp.asarray(drawn(3, 3, 5, 6))
            weights = winograd.transformed(4, kernel)
            image = 36 * 4 * (5 + 6) * 8  # bytes of 36 points and products of four tiles
            for changed in (
                {"CACHE": fit * image, "ROWS_AT_ONCE": 1},
                {"CACHE": 0, "ROWS_AT_ONCE": 4 * fit},
            ):
                with mock.patch.multiple(winograd, **changed):
                    self.assertEqual(winograd._images_at_once(SAME, x, weights), at_once)
                    own = lambda *given: winograd.values(SAME, *given)  # noqa: E731
                    parts = str(jax.make_jaxpr(own)(x, kernel))
                    ours = own(x, kernel)
                self.assertEqual("scan" in parts, at_once < batch)
                np.testing.assert_allclose(ours, plain(SAME, x, kernel), atol=1e-12)

    def test_values_alone_transform_the_weights_once(self):
        x, kernel = drawn(8, 8, 8, 64), drawn(3, 3, 64, 64)
        count = lambda form: str(jax.make_jaxpr(form, static_argnums=0)(SAME, x, kernel)).count(  # noqa: E731
            "f32[36,64,64] = reshape"
        )
        self.assertEqual((count(winograd.values), count(winograd.convolve)), (1, 2))

    @sweeps.rows(2, 4)
    def test_weights_by_the_papers_formula(self, m):
        with jax.enable_x64(True):
            kernel, g = drawn(3, 3, 5, 6), winograd.TILES[m].weights
            found = winograd.transformed(m, jnp.asarray(kernel))
        wanted = np.einsum("ai,ijco,bj->baco", g, kernel, g).reshape(-1, 5, 6)
        np.testing.assert_allclose(found, wanted, atol=1e-13)


class LayoutTest(parameterized.TestCase):
    @sweeps.rows((2, False), (8, True))
    def test_maps_are_measured_where_they_are(self, side, expected):
        """Channels in front are not height."""
        numbers = ("NCHW", "OIHW", "NCHW")

        def network(x, kernel):
            return lax.conv_general_dilated(x, kernel, (1, 1), SAME, dimension_numbers=numbers)

        x, kernel = jnp.ones((8, 64, side, side)), jnp.ones((64, 64, 3, 3))
        jaxpr = str(jax.make_jaxpr(fast_formulas(network, tiles=winograd.convolve))(x, kernel))
        self.assertEqual("dot_general" in jaxpr, expected)


class AttackTest(absltest.TestCase):
    def test_our_networks_are_in_tiles_where_they_guide_and_not_where_they_decide(self):
        kernel = jnp.asarray(drawn(3, 3, 64, 64).astype("f4"))

        def logits_fn(x):
            return convolutions.conv(x, kernel, padding=1).mean((1, 2))

        points, keys = jnp.ones((8, 8, 8, 64)), jnp.zeros((8, 2), jnp.uint32)
        make, rest = slots._seeker(False, "cpu", logits_fn, None, points, keys)
        self.assertEqual({w.shape for w in make()}, {(36, 64, 64)})
        decider = slots._network(logits_fn, False, "cpu", VERDICT_PRECISION)
        for network, tiles in ((functools.partial(rest, make()), True), (decider, False)):
            traced = str(jax.make_jaxpr(network)(points, keys))
            self.assertEqual("_inputs" in traced, tiles)
        np.testing.assert_allclose(rest(make(), points, keys), decider(points, keys), atol=1e-4)


class LoopTest(absltest.TestCase):
    def test_weights_are_transformed_before_it(self):
        x, kernel = drawn(4, 8, 8, 128).astype("f4"), drawn(3, 3, 128, 128).astype("f4") / 34
        bias = drawn(128).astype("f4")

        def network(x, kernel, bias):
            return (plain(SAME, x, kernel) + bias[None, None, None]).mean((1, 2))

        def looped(x, kernel, bias):
            one = fast_formulas(lambda x: network(x, kernel, bias), tiles=winograd.convolve)
            make, rest = before_a_loop(one, x)
            one = functools.partial(rest, make())

            def step(_, x):
                return x + jax.grad(lambda x: jnp.sin(one(x)).sum())(x)

            return lax.fori_loop(0, 3, step, x)

        def expected(x, kernel, bias):
            for _ in range(3):
                x = x + jax.grad(lambda x: jnp.sin(network(x, kernel, bias)).sum())(x)
            return x

        jaxpr = jax.make_jaxpr(looped)(x, kernel, bias).jaxpr
        (loop,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
        before = [eqn.primitive.name for eqn in jaxpr.eqns]
        self.assertGreaterEqual(before.count("dot_general") + before.count("jit"), 2)
        inside = str(loop.params["jaxpr"])
        self.assertNotIn("f32[3,3,128,128] = rev", inside)
        # The bias for all pixels is not made before it: it would be larger than the bias.
        self.assertFalse([e for e in jaxpr.eqns if e.outvars[0].aval.shape == x.shape])
        # Rounding of float32, whose largest value here is about 4.
        np.testing.assert_allclose(
            jax.jit(looped)(x, kernel, bias), expected(x, kernel, bias), atol=1e-5
        )
