"""Modules that a test makes unimportable, or that it needs."""

import contextlib
import importlib.util
import sys
import unittest


@contextlib.contextmanager
def hidden(*names):
    """`import NAME` fails inside; every other module stays, those first imported inside too.

    `mock.patch.dict(sys.modules)` drops the latter, of which Python then makes second copies.
    """
    kept = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules.update(dict.fromkeys(names))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(kept)


def needs(name, command):
    """Skips a test where a module is not installed, and says how it is."""
    missing = importlib.util.find_spec(name) is None
    return unittest.skipIf(missing, f"needs {name}: {command}")
