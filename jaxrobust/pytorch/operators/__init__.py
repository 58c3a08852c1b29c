"""PyTorch's operators after `run_decompositions`, one row each."""

import operator

from jaxrobust.pytorch.operators import (
    elementwise,
    normalization,
    ordering,
    products,
    random_numbers,
    reductions,
    resampling,
    shapes,
)
from jaxrobust.pytorch.program import OperatorRule

# Of sizes, which are known when a program is traced.
_SIZES = {
    **{n: OperatorRule(getattr(operator, n)) for n in ("add", "sub", "mul", "floordiv", "mod")},
    "aten.sym_size.int": OperatorRule(lambda x, dim: x.shape[dim]),
}
TABLE: dict[str, OperatorRule] = {
    **_SIZES,
    **elementwise.TABLE,
    **shapes.TABLE,
    **reductions.TABLE,
    **products.TABLE,
    **normalization.TABLE,
    **resampling.TABLE,
    **ordering.TABLE,
}
DRAWS: dict[str, OperatorRule] = random_numbers.TABLE  # which take a key before PyTorch's operands
TRAINING: dict[str, OperatorRule] = normalization.TRAINING  # which look at all images of a batch
