"""PyTorch's operators, one row each: what is left of a module after `run_decompositions`."""

import operator

from jaxrobust.interop.operators import (
    convolutions,
    draws,
    elementwise,
    grouping,
    matrices,
    normalization,
    pooling,
    reductions,
    selection,
    shapes,
)
from jaxrobust.interop.program import Row

# Of sizes, which are known when a program is traced.
_SIZES = {
    **{n: Row(getattr(operator, n)) for n in ("add", "sub", "mul", "floordiv", "mod")},
    "aten.sym_size.int": Row(lambda x, dim: x.shape[dim]),
}
TABLE: dict[str, Row] = {
    **_SIZES,
    **elementwise.TABLE,
    **shapes.TABLE,
    **reductions.TABLE,
    **convolutions.TABLE,
    **normalization.TABLE,
    **pooling.TABLE,
    **selection.TABLE,
    **grouping.TABLE,
    **matrices.TABLE,
}
DRAWS: dict[str, Row] = draws.TABLE  # which take a key before PyTorch's operands
