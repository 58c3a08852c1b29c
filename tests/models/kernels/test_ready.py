"""Networks in the attacks of a training step on CPU: 3x3 convolutions in tiles."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.models.kernels import convolutions, winograd
from jaxrobust.models.kernels.cpu import rewriting
from tests.support import sweeps


def network(width):
    """(logits of images, parameters) of two 3x3 convolutions, of which the first is too narrow."""
    first, second, third = (
        jax.random.normal(jax.random.key(n), shape) / 20
        for n, shape in enumerate([(3, 3, 3, width), (3, 3, width, width), (width, 10)])
    )

    def logits(images):
        x = jax.nn.relu(convolutions.conv(images, first, padding=1))
        x = convolutions.conv(x, second, padding=1)
        return jax.nn.relu(x).mean((1, 2)) @ third

    return logits


SAME = ((1, 1), (1, 1))


class RulesTest(parameterized.TestCase):
    """Which convolutions are computed in which way, by their shapes alone."""

    def applies(self, x=(8, 16, 16, 64), kernel=(3, 3, 64, 64), dtype=jnp.float32, **changes):
        ones = ("window_strides", "lhs_dilation", "rhs_dilation")
        settings = dict.fromkeys(ones, (1, 1)) | {"padding": SAME, "feature_group_count": 1}
        settings |= {"preferred_element_type": None} | changes
        shapes = jax.ShapeDtypeStruct(x, dtype), jax.ShapeDtypeStruct(kernel, dtype)
        return winograd.applies(settings, *shapes)

    @sweeps.rows(
        {},
        {"dtype": np.dtype("float64")},
        {"preferred_element_type": jnp.float32},
        {"padding": ((0, 0), (0, 0))},
        {"padding": ((2, 2), (0, 1))},
        {"kernel": (3, 3, 48, 100)},
    )
    def test_in_tiles(self, **given):
        with jax.enable_x64(True):
            self.assertTrue(self.applies(**given))

    @sweeps.rows(
        {"dtype": jnp.bfloat16},
        {"preferred_element_type": np.dtype("float64")},
        {"kernel": (5, 5, 64, 64)},
        {"kernel": (3, 1, 64, 64)},
        {"kernel": (3, 3, 47, 64)},
        {"kernel": (3, 3, 64, 47)},
        {"feature_group_count": 2},
        {"window_strides": (2, 2)},
        {"window_strides": (1, 2)},
        {"lhs_dilation": (2, 2)},
        {"rhs_dilation": (2, 2)},
        {"padding": ((3, 3), (1, 1))},
        {"padding": ((1, 1), (1, -1))},
        {"x": (1, 4, 4, 64)},
    )
    def test_not_in_tiles(self, **given):
        with jax.enable_x64(True):
            self.assertFalse(self.applies(**given))

    @sweeps.rows(
        ((1, 16, 16), SAME, 4),  # 16 tiles of 4 x 4 are enough
        ((1, 12, 16), SAME, 2),
        ((1, 13, 13), SAME, 4),  # a tile that is begun is one
        ((1, 14, 14), ((0, 0), (0, 0)), 2),  # of 12 x 12 outputs, nine tiles of 4 x 4
        ((4, 8, 8), SAME, 4),
        ((1, 8, 8), SAME, 2),
        ((1, 6, 8), SAME, None),
    )
    def test_the_largest_tile_of_which_there_are_enough(self, shape, padding, side):
        self.assertEqual(winograd.side(padding, (*shape, 64)), side)

    @sweeps.rows(4, 2)
    def test_a_tile_is_a_correlation(self, m):
        """Along one axis, as Lavin and Gray write it: A^T ((G g) * (B^T d))."""
        g, d = np.array([2.0, -1.0, 3.0]), np.arange(m + 2.0) ** 2 - 4
        tile = winograd.TILES[m]
        found = tile.outputs @ ((tile.weights @ g) * (tile.inputs @ d))
        np.testing.assert_allclose(found, np.correlate(d, g), atol=1e-12)

    def test_more_weights_are_those_of_both_directions(self):
        self.assertEqual([winograd.growth(m) for m in (4, 2)], [8, 32 / 9])  # 36 and 16 for 9

    @sweeps.rows(
        (3, (3, 3), True),
        (4, (5, 5), True),
        (4, (1, 5), True),
        (5, (3, 3), False),
        (4, (1, 1), False),
        (4, (7, 7), False),
    )
    def test_few_channels(self, channels, window, few):
        x = np.zeros((1, 8, 8, channels))
        self.assertEqual(convolutions.few_channels(x, np.zeros((*window, channels, 8))), few)

    @sweeps.rows(
        ((4, 4), 4, True),
        ((2, 2), 4, True),
        ((4, 4), 2, False),  # they overlap
        ((4, 2), 4, False),
        ((4, 4), 5, False),  # 32 pixels are not multiple
    )
    def test_windows_side_by_side(self, window, stride, grid):
        x, kernel = np.zeros((1, 32, 32, 3)), np.zeros((*window, 3, 8))
        self.assertEqual(convolutions._is_grid(x, kernel, stride), grid)
        self.assertFalse(convolutions._is_grid(np.zeros((1, 32, 30, 3)), kernel, 4))

    def test_tiles_within_tiles_end_alone(self):
        with convolutions.in_tiles() as outer:
            with convolutions.in_tiles(winograd.values) as inner:
                form, kernels = convolutions._tiles.get()
                self.assertIs(kernels, inner)
                self.assertIs(form, winograd.values)
            form, kernels = convolutions._tiles.get()
            self.assertIs(kernels, outer)
            self.assertIs(form, winograd.convolve)
        self.assertIsNone(convolutions._tiles.get())


class ReadyTest(absltest.TestCase):
    images = jax.random.uniform(jax.random.key(5), (8, 16, 16, 3))

    def test_values_and_gradients_change_by_rounding_only(self):
        logits = network(winograd.CHANNELS)
        fast = jax.jit(lambda x: rewriting.ready(logits, x)(x))
        labels = jnp.arange(8)

        def loss(function):
            return lambda x: jnp.take_along_axis(function(x), labels[:, None], 1).sum()

        pairs = [(fast(self.images), logits(self.images))]
        pairs += [tuple(jax.grad(loss(f))(self.images) for f in (fast, logits))]
        for ours, plain in pairs:
            largest = np.abs(plain).max()
            self.assertLess(np.abs(ours - plain).max(), 1e-5 * largest)  # 2e-6 of a convolution's
            self.assertGreater(np.abs(ours - plain).max(), 0)  # it is another formula

    def test_weights_are_transformed_once_before_the_loop(self):
        logits = network(winograd.CHANNELS)

        def steps(x):
            fast = rewriting.ready(logits, x)
            move = lambda x, _: (x + jax.grad(lambda x: fast(x).sum())(x), None)  # noqa: E731
            return jax.lax.scan(move, x, None, length=7)[0]

        with mock.patch.object(winograd, "transformed", wraps=winograd.transformed) as made:
            jaxpr = jax.make_jaxpr(steps)(self.images).jaxpr
        self.assertEqual(made.call_count, 2)  # for the values, and for the image's gradient
        (loop,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
        shapes = [variable.aval.shape for variable in loop.invars]
        width = winograd.CHANNELS
        self.assertLen([shape for shape in shapes if shape == (36, width, width)], 2)

    def test_a_network_without_such_convolutions_is_the_same_function(self):
        logits = network(winograd.CHANNELS // 2)
        self.assertIs(rewriting.ready(logits, self.images), logits)
        net = models.create("convnext_n", image_size=32)
        params, stats = net.init(jax.random.key(0))
        logits = lambda x: net.apply(params, stats, x)[0]  # noqa: E731
        shape = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        self.assertIs(rewriting.ready(logits, shape), logits)

    def test_weights_that_would_be_too_many(self):
        logits = network(winograd.CHANNELS)
        bytes_of_weights = 8 * 9 * winograd.CHANNELS**2 * 4 * jax.local_device_count()
        for memory, fits in ((4 * bytes_of_weights, True), (4 * bytes_of_weights - 4, False)):
            with mock.patch.object(
                rewriting.os, "sysconf", lambda of, m=memory: m if "PHYS" in of else 1
            ):
                ready = rewriting.ready(logits, self.images)
                canonical = rewriting.fast_formulas(logits, tiles=winograd.convolve)
                traced = str(jax.make_jaxpr(canonical)(self.images))
            self.assertEqual(ready is not logits, fits)
            self.assertEqual("_inputs" in traced, fits)

    def test_images_of_another_number(self):
        logits = network(winograd.CHANNELS)
        fast = rewriting.ready(logits, self.images)
        np.testing.assert_array_equal(fast(self.images[:3]), logits(self.images[:3]))

    def test_what_is_traced_elsewhere_is_not_in_tiles(self):
        logits = network(winograd.CHANNELS)
        before = str(jax.make_jaxpr(logits)(self.images))
        rewriting.ready(logits, self.images)
        self.assertEqual(str(jax.make_jaxpr(logits)(self.images)), before)
