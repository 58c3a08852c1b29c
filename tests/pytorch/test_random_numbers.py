"""What operators draw of a key: the distribution, its numbers, shapes and types."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from jaxrobust.pytorch.operators import DRAWS

N = 20_000
KEY = jax.random.key(7)
LIKE = jnp.zeros((N // 100, 100), jnp.float16)

# Operator, its operands behind the key, by name -> mean, deviation, least and largest value.
CASES = {
    "aten.rand.default": (([N],), {}, 0.5, 12**-0.5, 0, 1),
    "aten.randn.default": (([N],), {}, 0, 1, -6, 6),
    "aten.randint.low": ((3, 7, [N]), {}, 4.5, 1.25**0.5, 3, 6),
    "aten.randint.default": ((4, [N]), {}, 1.5, 1.25**0.5, 0, 3),
    "aten.rand_like.default": ((LIKE,), {}, 0.5, 12**-0.5, 0, 1),
    "aten.randn_like.default": ((LIKE,), {"dtype": jnp.float32}, 0, 1, -6, 6),
    "aten.randint_like.default": ((LIKE, 4), {}, 1.5, 1.25**0.5, 0, 3),
    "aten.randint_like.low_dtype": ((LIKE, 3, 7), {}, 4.5, 1.25**0.5, 3, 6),
    "aten.uniform.default": ((LIKE, -1.0, 3.0), {}, 1, 4 * 12**-0.5, -1, 3),
    "aten.normal_functional.default": ((LIKE, 2.0, 0.5), {}, 2, 0.5, -1, 5),
    "aten.normal.float_float": ((2.0, 0.5, [N]), {}, 2, 0.5, -1, 5),
    "aten.normal.float_Tensor": ((2.0, jnp.full((N,), 0.5)), {}, 2, 0.5, -1, 5),
    "aten.normal.Tensor_float": ((jnp.full((N,), 2.0), 0.5), {}, 2, 0.5, -1, 5),
    "aten.normal.Tensor_Tensor": ((jnp.full((N, 1), 2.0), jnp.full((1,), 0.5)), {}, 2, 0.5, -1, 5),
    "aten.bernoulli.p": ((LIKE, 0.2), {}, 0.2, 0.4, 0, 1),
    "aten.bernoulli.Tensor": ((LIKE, jnp.full((100,), 0.2)), {}, 0.2, 0.4, 0, 1),
    "aten.bernoulli.default": ((jnp.full((N,), 0.2),), {}, 0.2, 0.4, 0, 1),
    "aten.exponential.default": ((LIKE, 2.0), {}, 0.5, 0.5, 0, 20),
    "aten.log_normal.default": ((LIKE, 0.0, 0.25), {}, 1.0317, 0.2620, 0, 5),
    "aten.geometric.default": ((LIKE, 0.25), {}, 4, 12**0.5, 1, 100),
    "aten.poisson.default": ((jnp.full((N,), 3.0),), {}, 3, 3**0.5, 0, 20),
}
TYPES = {
    "aten.rand.default": "float32",
    "aten.randint.low": "int32",
    "aten.rand_like.default": "float16",
}
TYPES |= {"aten.randn_like.default": "float32", "aten.bernoulli.p": "float16"}
TYPES |= {"aten.poisson.default": "float32", "aten.normal.float_Tensor": "float32"}


def drawn(name, *operands, **named):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return DRAWS[name].plain(KEY, *operands, **named)


class DrawsTest(absltest.TestCase):
    def test_distributions(self):
        run = jax.jit(lambda: {name: drawn(name, *c[0], **c[1]) for name, c in CASES.items()})
        found = jax.device_get(run())
        for name, (_, _, mean, deviation, least, largest) in CASES.items():
            draws = found[name].astype(np.float64)
            self.assertEqual(draws.size, N, name)
            self.assertLess(abs(draws.mean() - mean), 4 * deviation / N**0.5 + 5e-4, name)
            self.assertLess(abs(draws.std() / deviation - 1), 0.06, name)
            self.assertBetween(draws.min(), least, least + deviation * 3, name)
            self.assertBetween(draws.max(), mean, largest, name)
            if name in TYPES:
                self.assertEqual(found[name].dtype, TYPES[name], name)
        self.assertEqual({*np.unique(found["aten.randint.low"])}, {3, 4, 5, 6})
        self.assertEqual({*np.unique(found["aten.randint_like.default"])}, {0, 1, 2, 3})
        self.assertEqual(found["aten.rand_like.default"].shape, LIKE.shape)
        cauchy = np.asarray(drawn("aten.cauchy.default", LIKE, 1.0, 2.0), np.float64)
        quarters = np.quantile(cauchy, (0.25, 0.5, 0.75))
        np.testing.assert_allclose(quarters, (-1, 1, 3), atol=0.15)

    def test_permutations_and_choices(self):
        order = np.asarray(drawn("aten.randperm.default", 50))
        self.assertEqual(sorted(order.tolist()), list(range(50)))
        self.assertNotEqual(order.tolist(), list(range(50)))
        self.assertEqual(drawn("aten.randperm.default", 5, dtype=jnp.int16).dtype, jnp.int16)
        weights = jnp.float32([[1.0, 0.0, 3.0, 4.0]] * 4000)
        once = np.asarray(drawn("aten.multinomial.default", weights, 3))
        self.assertEqual(once.shape, (4000, 3))
        self.assertTrue(all(set(row) == {0, 2, 3} for row in once.tolist()))
        shares = np.bincount(once[:, 0], minlength=4) / 4000
        np.testing.assert_allclose(shares, [1 / 8, 0, 3 / 8, 1 / 2], atol=0.03)
        again = np.asarray(drawn("aten.multinomial.default", weights, 5, True))
        self.assertEqual(again.shape, (4000, 5))
        shares = np.bincount(again.ravel(), minlength=4) / 20000
        np.testing.assert_allclose(shares, [1 / 8, 0, 3 / 8, 1 / 2], atol=0.02)

    def test_dropout(self):
        x = jnp.arange(1.0, 1001)
        kept, mask = drawn("aten.native_dropout.default", x, 0.25, True)
        np.testing.assert_allclose(kept, np.where(mask, x / 0.75, 0), rtol=1e-6)
        self.assertBetween(float(mask.mean()), 0.7, 0.8)
        slope = jax.grad(lambda x: drawn("aten.native_dropout.default", x, 0.25, None)[0].sum())(x)
        np.testing.assert_allclose(slope, np.where(mask, 1 / 0.75, 0), rtol=1e-6)
        same, mask = drawn("aten.native_dropout.default", x, 0.25, False)
        np.testing.assert_array_equal(same, x)
        self.assertTrue(bool(mask.all()))
        gone, mask = drawn("aten.native_dropout.default", x, 1.0, True)
        self.assertFalse(bool(gone.any() | mask.any()))

    def test_no_gradient_passes(self):
        """Through what a distribution is told, as in PyTorch."""
        operands = {
            "aten.bernoulli.default": lambda x: (x,),
            "aten.poisson.default": lambda x: (x,),
            "aten.normal.Tensor_Tensor": lambda x: (x, x),
            "aten.normal_functional.default": lambda x: (x, x[0], 1.0),
        }

        def total(x):
            return sum(drawn(name, *of(x)).sum() for name, of in operands.items())

        slope = jax.jit(jax.grad(total))(jnp.full((3,), 0.5))
        np.testing.assert_array_equal(slope, 0)
