"""Every row of the table of operators against PyTorch: values and gradients in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust.pytorch.operators import TABLE
from jaxrobust.pytorch.program import OperatorRule
from tests.support import paths, sweeps

torch = pytest.importorskip("torch", reason=paths.PARITY)
from tests.support import operator_cases, torch_operators  # noqa: E402

NAMES = (*torch_operators.COMPUTED, *torch_operators.MODULES)
EACH = 36  # at a time: one export and one compilation
_APART = (list(torch_operators.COMPOSED), list(torch_operators.OF_SIZES))
_FIXED = [name for name in NAMES if not any(name in names for names in _APART)]
_QUICK, _OTHERS = _FIXED[::3], [name for place, name in enumerate(_FIXED) if place % 3]
GROUPS = [_QUICK, *(_OTHERS[i : i + EACH] for i in range(0, len(_OTHERS), EACH)), *_APART]
# PyTorch's own gradient of digamma is 5e-10 off what mpmath says, ours 3e-16.
GRADIENTS = {"errors back": 1e-9}
# Of equal singular values any vectors are right, so LAPACK's and their gradients differ, on which
# images depends on the kind of CPU.
UNTIED = {"singular values": {"ones", "equal", "binary", "dark", "flat"}}


# (number of a group, whether of any number of images) -> what was found
KEPT: dict[tuple[int, bool], dict[str, operator_cases.Outcome | Exception]] = {}


def group(number: int, dynamic: bool) -> dict[str, operator_cases.Outcome | Exception]:
    if (number, dynamic) not in KEPT:
        names = [n for n in GROUPS[number] if not dynamic or n not in torch_operators.ALONE]
        KEPT[number, dynamic] = operator_cases.each(names, dynamic=dynamic)
    return KEPT[number, dynamic]


class OperatorsTest(parameterized.TestCase):
    def check(self, name: str, *, dynamic: bool) -> None:
        (number,) = [i for i, names in enumerate(GROUPS) if name in names]
        found = group(number, dynamic)[name]
        if isinstance(found, Exception):
            raise found
        self.assertLess(found.values, 1e-12, name)
        self.assertLess(found.gradients, GRADIENTS.get(name, 1e-10), name)
        self.assertContainsSubset(found.ties, UNTIED.get(name, set()), name)

    @sweeps.rows(*_QUICK)
    def test_every_third_is_pytorchs(self, name):
        self.check(name, dynamic=False)

    @sweeps.rows(*_OTHERS)
    @pytest.mark.landing
    def test_is_pytorchs(self, name):
        self.check(name, dynamic=False)

    @sweeps.rows(*torch_operators.OF_SIZES)
    @pytest.mark.landing
    def test_of_sizes_is_pytorchs(self, name):
        self.check(name, dynamic=True)

    @sweeps.rows(*torch_operators.COMPOSED)
    @pytest.mark.slow
    def test_composed_is_pytorchs(self, name):
        self.check(name, dynamic=False)

    @sweeps.rows(*(name for name in NAMES if name not in torch_operators.ALONE))
    @pytest.mark.slow
    def test_of_any_number_of_images(self, name):
        self.check(name, dynamic=True)

    def test_every_row_is_used(self):
        used: set[str] = set()
        fixed = range(len(GROUPS) - len(_APART))  # all other cases read what this one leaves
        found = operator_cases.in_turn([GROUPS[number] for number in fixed])
        KEPT.update({(number, False): outcomes for number, outcomes in enumerate(found)})
        for number in (*fixed, len(GROUPS) - 1):
            outcomes = group(number, number not in fixed).values()
            used.update(*(each.operators for each in outcomes if not isinstance(each, Exception)))
        self.assertEmpty(TABLE.keys() - used)


class RowsTest(parameterized.TestCase):
    def test_choices_in_float32(self):
        """What is chosen by order is the same number, and its gradient goes to the same place."""
        names = ["the middle", "equal ones", "unpooling"]
        for name, found in operator_cases.together(names, dtype="float32").items():
            self.assertLess(found.values, 3e-7, name)
            self.assertLess(found.gradients, 1e-6, name)

    @parameterized.parameters(
        lambda x, dims: jnp.flip(x, dims) * (1 + 1e-9),
        lambda x, dims: jnp.flip(x, dims) + 1e-9 * (x - jax.lax.stop_gradient(x)),  # the gradient's
        lambda x, dims: jnp.flip(x, dims)[:1],
        lambda x, dims: x.no_such_method(dims),
    )
    def test_a_wrong_row_is_caught_by_name(self, wrong):
        flip, names = "aten.flip.default", ["sums that stay", "rolls"]
        self.addCleanup(TABLE.__setitem__, flip, TABLE[flip])
        TABLE[flip] = OperatorRule(wrong)
        found = operator_cases.each(names)
        failed = [
            name
            for name, outcome in found.items()
            if isinstance(outcome, Exception)
            or not (outcome.values < 1e-12 and outcome.gradients < 1e-10)
        ]
        self.assertSequenceEqual(failed, ["rolls"])

    def test_exponential_units_with_all_their_scales(self):
        x = torch.linspace(-2, 2, 9, dtype=torch.float64)
        expected = torch.ops.aten.elu(x, 0.7, 1.3, 2.5)
        with jax.enable_x64(True):
            ours = TABLE["aten.elu.default"].plain(jnp.asarray(x.numpy()), 0.7, 1.3, 2.5)
        np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-12)

    def test_attention_of_rows_that_see_nothing(self):
        x = torch.rand(1, 1, 3, 2, dtype=torch.float64)
        mask = torch.tensor([[True, False, False], [False] * 3, [True] * 3])
        expected = torch.nn.functional.scaled_dot_product_attention(x, x, x, mask)
        with jax.enable_x64(True):
            array = jnp.asarray(x.numpy())
            attention = TABLE["aten.scaled_dot_product_attention.default"].plain
            ours = attention(array, array, array, jnp.asarray(mask.numpy()), 0.0, False)
        np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-12)
