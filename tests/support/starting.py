"""What a process does before it collects tests: shapes are checked, compiled programs kept on disk.

Not in `tests/__init__.py`: processes that tests start have neither (see
`compilation.use_persistent_cache`). And not in `conftest.py`, which pytest-xdist's main process
reads too, and that one runs no test.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, get_args

import jax
import jaxtyping
from beartype import beartype

from jaxrobust.runtime.devices.compilation import use_persistent_cache
from jaxrobust.runtime.text import patience

# The modules whose every call is compared with the shapes of its annotations.
SHAPED = (
    "jaxrobust.attacks",
    "jaxrobust.evaluation.engine.accuracy",
    "jaxrobust.evaluation.network.checks",
    "jaxrobust.evaluation.records.comparisons",
    "jaxrobust.models.interface.network_inputs",
    "jaxrobust.training.update.mixing",
    "jaxrobust.training.update.objectives",
)


def shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with beartype's checks of the annotations that name a shape.

    Of no others: what is not a number, no array or no known name the package itself refuses, and
      the
    tests read its messages.
    """
    hints = {k: v for k, v in function.__annotations__.items() if _names_shape(v)}
    function.__annotations__ = hints
    return beartype(function) if hints else function


def _names_shape(hint: Any) -> bool:
    shape = isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)
    return shape or any(map(_names_shape, get_args(hint)))


def start() -> None:
    """Compare shapes, keep programs, and be patient; before the first import of `SHAPED`."""
    jaxtyping.install_import_hook(SHAPED, f"{__name__}.shapes")
    # What tests read on stderr does not depend on how busy the machine is.
    patience.AFTER_S = 1e6
    # Three quarters of a test's time are XLA's, and many tests compile the same program. Small ones
    # are kept too: there are ten of them for each large one, and reading one costs a tenth.
    use_persistent_cache()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def export_quickly() -> None:
    """Let `torch.export` look for new operators once: no test adds one, and it looks 55 times.

    A fifth of the time that an export of a small module takes.
    """
    utils = importlib.import_module("torch._export.utils")
    if look := getattr(utils, "_materialize_cpp_cia_ops", None):  # private: may be gone
        utils._materialize_cpp_cia_ops = functools.cache(look)
