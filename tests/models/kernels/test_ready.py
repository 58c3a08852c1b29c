"""Networks in the attacks of a training step on CPU: 3x3 convolutions in tiles."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from jaxrobust import models
from jaxrobust.models.kernels import convolutions, winograd
from jaxrobust.models.kernels.cpu import rewriting


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
        with mock.patch.object(rewriting, "TRANSFORMED", 8 * 9 * winograd.CHANNELS**2 * 4 - 1):
            self.assertIs(rewriting.ready(logits, self.images), logits)

    def test_images_of_another_number(self):
        logits = network(winograd.CHANNELS)
        fast = rewriting.ready(logits, self.images)
        np.testing.assert_array_equal(fast(self.images[:3]), logits(self.images[:3]))

    def test_what_is_traced_elsewhere_is_not_in_tiles(self):
        logits = network(winograd.CHANNELS)
        before = str(jax.make_jaxpr(logits)(self.images))
        rewriting.ready(logits, self.images)
        self.assertEqual(str(jax.make_jaxpr(logits)(self.images)), before)


if __name__ == "__main__":
    absltest.main()
