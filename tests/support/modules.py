"""Modules that a test replaces, or that it needs."""

import contextlib
import importlib.util
import sys
import unittest


@contextlib.contextmanager
def replaced(modules):
    """`import NAME` gives a module of these inside, and fails where that is None.

    Every other module stays, those first imported inside too. `mock.patch.dict(sys.modules)` drops
    these, of which Python then makes second copies, or refuses to.
    """
    old_modules = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(old_modules)


def hidden(*names):
    """`import NAME` fails inside."""
    return replaced(dict.fromkeys(names))


def needs(name, command):
    """Skips a test where a module is not installed, and says how it is."""
    missing = importlib.util.find_spec(name) is None
    return unittest.skipIf(missing, f"needs {name}: {command}")
