"""Weights of PyTorch's convolutions, transposed for ours, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust.models.interface import torch_kernels


class TapsTest(parameterized.TestCase):
    @parameterized.parameters((5, 4, 3, 3), (5, 4, 1, 1), (6, 1, 7, 7), (1, 2, 2, 3))
    def test_there_and_back(self, *shape):
        weight = jnp.asarray(np.random.default_rng(0).random(shape, np.float32))
        kernel, back = jax.vjp(torch_kernels._taps_first, weight)
        np.testing.assert_array_equal(kernel, np.transpose(weight, (2, 3, 1, 0)))
        np.testing.assert_array_equal(back(kernel)[0], weight)

    def test_two_steps_on_cpu_alone(self):
        weight = jnp.ones((5, 4, 3, 3))
        lowered = {
            platform: jax.jit(torch_kernels._taps_first)
            .trace(weight)
            .lower(lowering_platforms=(platform,))
            .as_text()
            for platform in ("cpu", "tpu")
        }
        steps = {platform: text.count("stablehlo.transpose") for platform, text in lowered.items()}
        self.assertEqual(steps, {"cpu": 2, "tpu": 1})


if __name__ == "__main__":
    absltest.main()
