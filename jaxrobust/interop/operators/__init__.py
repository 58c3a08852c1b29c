"""PyTorch's operators, one row each: what is left of a module after `run_decompositions`."""

import math
import operator
from collections.abc import Callable
from typing import Any

from jaxrobust.interop.operators import (
    convolutions,
    elementwise,
    normalization,
    pooling,
    reductions,
    shapes,
)
from jaxrobust.interop.program import Row

# Of sizes, which are known when a program is traced.
_OF_SIZES: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "mod")},
    **{name: getattr(operator, name) for name in ("truediv", "pow", "neg", "eq", "ne", "lt", "le")},
    **{"floor": math.floor, "ceil": math.ceil, "trunc": math.trunc},
    **{"sym_min": min, "sym_max": max, "sym_float": float, "sym_int": int},
}
_SIZES = {
    **{name: Row(function) for name, function in _OF_SIZES.items()},
    "aten.sym_size.int": Row(lambda x, dim: x.shape[dim]),
    "aten.sym_numel.default": Row(lambda x: x.size),
}
TABLE: dict[str, Row] = {
    **_SIZES,
    **elementwise.TABLE,
    **shapes.TABLE,
    **reductions.TABLE,
    **convolutions.TABLE,
    **normalization.TABLE,
    **pooling.TABLE,
}
