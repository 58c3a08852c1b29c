"""Shapes are checked in tests, and compiled programs are kept on disk.

Not in `__init__.py`: processes that tests start have neither (see
`compilation.use_persistent_cache`).
"""

import functools
import gc
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax
import jaxtyping
import pytest
from beartype import beartype

from jaxrobust.runtime import moved
from jaxrobust.runtime.devices.compilation import use_persistent_cache
from jaxrobust.runtime.text import patience
from tests.support import compiling

# The modules whose every call is compared with the shapes of its annotations.
SHAPED = (
    "jaxrobust.attacks",
    "jaxrobust.evaluation.engine.accuracy",
    "jaxrobust.evaluation.network.checks",
    "jaxrobust.evaluation.records.pairs",
    "jaxrobust.models.interface.network_inputs",
    "jaxrobust.training.update.mixing",
    "jaxrobust.training.update.objectives",
)


def shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with beartype's checks of the annotations that name a shape.

    Of no others: what is no number, no array or no known name the package itself refuses, and the
    tests read its messages.
    """
    hints = {k: v for k, v in function.__annotations__.items() if _names_shape(v)}
    function.__annotations__ = hints
    return beartype(function) if hints else function


def _names_shape(hint: Any) -> bool:
    shape = isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)
    return shape or any(map(_names_shape, get_args(hint)))


jaxtyping.install_import_hook(SHAPED, "tests.conftest.shapes")  # before the first import of them
sys.meta_path.sort(key=lambda finder: type(finder).__module__ != moved.__name__)  # as for users

# What tests read on stderr does not depend on how busy the machine is.
patience.AFTER_S = 1e6

# Three quarters of a test's time are XLA's, and many tests compile the same program. Small ones are
# kept too: there are ten of them for each large one, and reading one costs a tenth.
use_persistent_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_configure(config: pytest.Config) -> None:
    """Compile the programs of the fast and the slow tests quickly; the matrix's as users do."""
    # JAX's profiler makes types without this; from Python 3.13 on that warns, and its bindings
    # abort the process where a warning is an error.
    known = "ignore:builtin type .* has no __module__ attribute:DeprecationWarning"
    config.addinivalue_line("filterwarnings", known)
    if "matrix" not in config.getoption("markexpr").replace("not matrix", ""):
        compiling.quickly()


# Lists of tests with a marker, as rows of a table cannot be marked where they stand: the longest
# ones whose like another test of their folder makes too, and those that a change need not wait for.
LISTS = {name: Path(__file__).with_name(f"{name}.txt") for name in ("slow", "landing")}


@pytest.hookimpl(tryfirst=True)  # before pytest looks which tests have which marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests that `slow.txt` and `landing.txt` list their markers."""
    lists = {name: set(path.read_text().split()) for name, path in LISTS.items()}
    for item in items:
        file, of, *_ = item.nodeid.removeprefix("tests/").split("::")
        for name in lists:
            if not {f"{file}::{of}", item.nodeid.removeprefix("tests/")}.isdisjoint(lists[name]):
                item.add_marker(name)


def pytest_collection_finish() -> None:
    """Keep Python from looking for garbage in a million imported objects, a fifth of the time."""
    gc.freeze()
    gc.set_threshold(50_000)
    if "torch" in sys.modules:
        _export_quickly()


def _export_quickly() -> None:
    """Let `torch.export` look for new operators once: no test adds one, and it looks 55 times.

    A fifth of the time that an export of a small module takes.
    """
    utils = importlib.import_module("torch._export.utils")
    if look := getattr(utils, "_materialize_cpp_cia_ops", None):  # private: may be gone
        utils._materialize_cpp_cia_ops = functools.cache(look)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Optimise the programs of tests that compute much, before their class is set up."""
    compiling.for_test(computes=item.get_closest_marker("computes") is not None)
