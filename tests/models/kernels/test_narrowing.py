"""Products in bfloat16 where no precision is named, wherever they stand in a program."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from jax import lax

from jaxrobust.models.kernels import winograd
from jaxrobust.models.kernels.cpu.narrowing import narrow_products
from jaxrobust.models.kernels.primitives import matmul
from jaxrobust.runtime.devices import cpus
from tests.support import sweeps


def drawn(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def by_hand(x, w):
    """The product of rounded numbers; in float64, where it and its sum are exact but for 1e-15."""
    return np.matmul(*(np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, w)))


@jax.custom_vjp
def own_gradient(x, w):
    return x @ w


own_gradient.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))

WHERE = {
    "plain": jnp.matmul,
    "jit": jax.jit(jnp.matmul),
    "checkpoint": jax.checkpoint(jnp.matmul),
    "own gradient": own_gradient,
    "ours": matmul,
    "loop": lambda x, w: lax.fori_loop(0, 1, lambda i, y: y @ w, x),
    "scan": lambda x, w: lax.scan(lambda y, _: (y @ w, None), x, None, length=1)[0],
    "condition": lambda x, w: lax.cond(x[0, 0] < 9, lambda: x @ w, lambda: x),
    "platforms": lambda x, w: lax.platform_dependent(x, w, default=jnp.matmul),
    "default": lambda x, w: jnp.matmul(x, w, precision="default"),
}


class NarrowTest(parameterized.TestCase):
    @sweeps.rows(*WHERE)
    def test_values(self, name):
        x, w = drawn(4, 8), drawn(8, 8)
        narrowed = mock.patch.object(cpus, "kind", return_value=cpus.KINDS[0])
        with jax.numpy_dtype_promotion("standard"), narrowed:  # CPUs with AMX alone narrow
            found = jax.jit(narrow_products(WHERE[name]))(x, w)
        # Sums of 8 exact products in float32: 8 roundings of 2^-24 of at most 20.
        np.testing.assert_allclose(found, by_hand(x, w), rtol=0, atol=1e-5)
        self.assertGreater(abs(found - x @ w).max(), 1e-3)

    def test_gradients_that_are_taken_inside(self):
        x, w, g = drawn(4, 8), drawn(8, 8), drawn(4, 8)

        def pulled(x, w, g):
            return jax.vjp(lambda x: own_gradient(x, w), x)[1](g)[0]

        found = jax.jit(narrow_products(pulled))(x, w, g)
        np.testing.assert_allclose(found, by_hand(g, w.T), rtol=0, atol=1e-5)

    @sweeps.rows("high", "highest")
    def test_a_precision_that_is_named_is_kept(self, precision):
        x, w = drawn(4, 8), drawn(8, 8)
        found = narrow_products(lambda x, w: jnp.matmul(x, w, precision=precision))(x, w)
        np.testing.assert_array_equal(found, jnp.matmul(x, w))

    def test_that_of_the_caller_too(self):
        with jax.default_matmul_precision("highest"):
            text = jax.jit(narrow_products(jnp.matmul)).lower(drawn(4, 8), drawn(8, 8)).as_text()
        self.assertNotIn("bf16", text)

    def test_other_types_are_left_alone(self):
        x = np.arange(6, dtype=np.int32).reshape(2, 3)
        np.testing.assert_array_equal(narrow_products(jnp.matmul)(x, x.T), x @ x.T)

    def test_tiles_are_left_alone(self):
        x, kernel = drawn(16, 8, 8, 4), drawn(3, 3, 4, 4)

        # Transforms of weights are products of no named precision: `before_a_loop` makes them.
        weights = winograd.transformed(4, jnp.asarray(kernel))
        of = functools.partial(winograd._tiled, ((1, 1), (1, 1)), weights=weights)
        np.testing.assert_array_equal(jax.jit(narrow_products(of))(x), jax.jit(of)(x))

    def test_a_function_of_pytrees(self):
        def function(pair):
            return {"product": pair[0] @ pair[1], "none": None, "sum": pair[0] + 1}

        found = narrow_products(function)((drawn(4, 8), drawn(8, 8)))
        self.assertIsNone(found["none"])
        np.testing.assert_array_equal(found["sum"], drawn(4, 8) + 1)
