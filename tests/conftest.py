"""Markers of tests, and what a process that runs tests does before and after it collects them."""

import gc
import sys
from pathlib import Path

import pytest

import tests

# Lists of tests with a marker, as rows of a table cannot be marked where they stand: the longest
# ones whose like another test of their folder makes too, and those that a change need not wait for.
LISTS = {name: Path(__file__).with_name(f"{name}.txt") for name in ("slow", "landing")}


def pytest_configure(config: pytest.Config) -> None:
    """Start JAX, but in the main process of pytest-xdist, for which its workers would wait."""
    # JAX's profiler makes types without this; from Python 3.13 on that warns, and its bindings
    # abort the process where a warning is an error.
    known = "ignore:builtin type .* has no __module__ attribute:DeprecationWarning"
    config.addinivalue_line("filterwarnings", known)
    if config.getoption("dist", "no") == "no" or hasattr(config, "workerinput"):
        tests.start_jax()
        _start(config)


def _start(config: pytest.Config) -> None:
    """Compile the programs of the fast and the slow tests quickly; the matrix's as users do."""
    from tests.support import compiling, starting

    gc.disable()  # imports leave no garbage; until all tests are collected
    starting.start()
    if "matrix" not in config.getoption("markexpr").replace("not matrix", ""):
        compiling.quickly()


@pytest.hookimpl(tryfirst=True)  # before pytest looks which tests have which marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests that `slow.txt` and `landing.txt` list their markers."""
    lists = {name: set(path.read_text().splitlines()) for name, path in LISTS.items()}
    for item in items:
        file, of, *_ = item.nodeid.removeprefix("tests/").split("::")
        for name in lists:
            if not {f"{file}::{of}", item.nodeid.removeprefix("tests/")}.isdisjoint(lists[name]):
                item.add_marker(name)


def pytest_collection_finish() -> None:
    """Keep Python from looking for garbage in a million imported objects, a fifth of the time."""
    gc.freeze()
    gc.set_threshold(50_000)
    gc.enable()
    if "torch" in sys.modules:
        from tests.support import starting

        starting.export_quickly()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Optimize the programs of tests that compute much, before their class is set up."""
    from tests.support import compiling

    compiling.for_test(computes=item.get_closest_marker("computes") is not None)
