"""Every row of the table of operators against PyTorch: values and gradients in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.interop import agreement
from jaxrobust.interop.operators import TABLE
from tests.support import paths, sweeps

torch = pytest.importorskip("torch", reason=paths.PARITY)
from tests.support import torch_operators  # noqa: E402
from tests.support.torch_side import converted, differences  # noqa: E402

IMAGE = (torch_operators.SIDE, torch_operators.SIDE, torch_operators.CHANNELS)

EACH = 12  # at a time: one export and one compilation
GROUPS = [
    names
    for cases in (torch_operators.COMPUTED, torch_operators.MODULES)
    for names in [list(cases)[i : i + EACH] for i in range(0, len(cases), EACH)]
]
# PyTorch's own gradient of hardsigmoid has 1/6 in float32, also in float64.
GRADIENTS = {"activation Hardsigmoid": 1e-7}


class OperatorsTest(parameterized.TestCase):
    @sweeps.fast(6, 7)
    @parameterized.parameters(range(len(GROUPS)))
    def test_is_pytorchs(self, number):
        network = converted(torch_operators.Several(GROUPS[number]).double(), IMAGE)
        images = np.random.default_rng(0).random((3, 9, 9, 4))
        images = images * 6 - 3 if GROUPS[number][0] in torch_operators.MODULES else images
        values, gradients = differences(network, images)
        first = agreement.first_difference(network, images) if values.max() > 1e-12 else ""
        self.assertLess(values.max(), 1e-12, first)
        bar = max(GRADIENTS.get(name, 1e-10) for name in GROUPS[number])
        self.assertLess(gradients.max(), bar)

    @pytest.mark.slow
    def test_every_row_is_used(self):
        used: set[str] = set()
        for names in GROUPS:
            steps = converted(torch_operators.Several(names).double(), IMAGE).program.steps
            used.update(step.operator for step in steps)
        self.assertEmpty(TABLE.keys() - used)

    def test_attention_of_rows_that_see_nothing(self):
        x = torch.rand(1, 1, 3, 2, dtype=torch.float64)
        mask = torch.tensor([[True, False, False], [False] * 3, [True] * 3])
        expected = torch.nn.functional.scaled_dot_product_attention(x, x, x, mask)
        with jax.enable_x64(True):
            array = jnp.asarray(x.numpy())
            attention = TABLE["aten.scaled_dot_product_attention.default"].plain
            ours = attention(array, array, array, jnp.asarray(mask.numpy()), 0.0, False)
        np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-12)


if __name__ == "__main__":
    absltest.main()
