"""Which library multiplies matrices on a CPU with AVX2 alone, and that the results are the same."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from jaxrobust.models.kernels.primitives import matmul
from jaxrobust.runtime.devices import cpus
from tests.support import sweeps

AVX2 = next(row for row in cpus.KINDS if row.name == "avx2")
OTHER = next(row for row in cpus.KINDS if row.name == "avx512")
FEW, MANY = (64, 128), (1024, 512)  # weights: below and above the limit


def gradients(x, kernel):
    return jax.grad(lambda x, kernel: (matmul(x, kernel) ** 2).sum(), argnums=(0, 1))(x, kernel)


def product_of(row, function, x, kernel):
    """Compile a fresh function, which no cache of another row knows."""
    with mock.patch.object(cpus, "kind", return_value=row):
        fresh = jax.jit(lambda *operands: function(*operands), compiler_options=dict(row.step))
        return fresh.lower(x, kernel).compile()


class ProductsTest(parameterized.TestCase):
    def operands(self, size, rows=96):
        draw = np.random.default_rng(0).standard_normal
        x, kernel = draw((rows, size[0])), draw(size) / size[0] ** 0.5
        return jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)

    @parameterized.product(size=(FEW, MANY, MANY[::-1]), rows=(1, 96))
    def test_values_and_gradients_are_those_of_every_cpu(self, size, rows):
        x, kernel = self.operands(size, rows)
        for function in (matmul, gradients):
            one, other = (product_of(row, function, x, kernel)(x, kernel) for row in (AVX2, OTHER))
            for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
                largest = np.abs(b).max()  # 1e-6: sums of up to 1024 terms in another order
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * largest)

    @sweeps.rows((FEW, 0), (MANY, 1))
    def test_who_multiplies(self, size, by_ynn):
        text = product_of(AVX2, matmul, *self.operands(size)).as_text()
        self.assertEqual(text.count("__ynn_fusion"), by_ynn, text)
        self.assertNotIn(" convolution(", text)

    @sweeps.rows((MANY, 2), (MANY[::-1], 3))
    def test_ynnpack_makes_the_gradient_of_many_weights_where_it_pays(self, size, by_ynn):
        text = product_of(AVX2, gradients, *self.operands(size)).as_text()
        self.assertEqual(text.count("__ynn_fusion"), by_ynn, text)

    def test_a_step_in_bfloat16_is_as_on_every_cpu(self):
        operands = [a.astype(jnp.bfloat16) for a in self.operands(FEW)]
        with mock.patch.object(cpus, "kind", return_value=AVX2):
            text = str(jax.make_jaxpr(lambda x, k: gradients(x, k))(*operands))
        self.assertNotIn("conv_general_dilated", text)
