"""Modules under the names that they had: what imports them goes on working, and is told once.

`moved.txt` has a line for each: the old name and the one of today, without `jaxrobust.`; a colon
stands before a name inside a module. Python
asks here before it looks elsewhere, which costs a look into a dictionary.
"""

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = __name__.partition(".")[0]


@functools.cache
def names() -> dict[str, str]:
    """Map the full old name of each module to the one of today."""
    lines = Path(__file__).with_suffix(".txt").read_text().splitlines()
    return {f"{PACKAGE}.{old}": f"{PACKAGE}.{new}" for old, new in map(str.split, lines)}


def follow() -> None:
    """Let imports of old names find the modules of today."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # else a folder's new name is found under its old one


def attribute(package: str, name: str) -> Any:
    """Look a name up where it is today; for the `__getattr__` of a module that had it.

    Raises:
      AttributeError: there never was such a name.
    """
    unknown = AttributeError(f"module {package!r} has no attribute {name!r}")
    has_modules = "__path__" in vars(sys.modules[package])
    if name.startswith("__") or (has_modules and importlib.util.find_spec(f"{package}.{name}")):
        raise unknown  # which lets Python import a module of the package
    old = f"{package}.{name}"
    module, _, known = names().get(old, f"{names().get(package, '')}:{name}").partition(":")
    if not module or not hasattr(importlib.import_module(module), known):
        raise unknown
    _warn(old, f"{module}.{known}")
    return getattr(importlib.import_module(module), known)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        del path, target
        new = fullname.startswith(f"{PACKAGE}.") and names().get(fullname)
        if not new or ":" in new or new.startswith(f"{fullname}."):  # `attribute` finds these
            return None
        today = importlib.util.find_spec(new)
        return importlib.machinery.ModuleSpec(
            fullname,
            _Loader(new),
            origin=today.origin if today else None,  # for `python -m`
        )


class _Loader(importlib.abc.Loader):
    """Gives the module of today under its old name, to `import` and to `python -m`."""

    def __init__(self, new: str):
        self.new = new

    def create_module(self, spec: Any) -> ModuleType:
        """Return the module of today."""
        _warn(spec.name, self.new)
        found = importlib.import_module(self.new)
        self.own = found.__spec__
        return found

    def exec_module(self, module: ModuleType) -> None:
        """Leave the module as it was: it is complete, and it is called what it is called."""
        module.__spec__ = self.own

    def get_code(self, fullname: str) -> Any:
        """Return the code, which `python -m` runs."""
        spec = importlib.util.find_spec(self.new)
        assert spec and isinstance(spec.loader, importlib.abc.InspectLoader)
        _warn(fullname, self.new)
        return spec.loader.get_code(self.new)


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is {new} today; write that", FutureWarning, stacklevel=2)
