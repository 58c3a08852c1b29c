"""Modules and names under the names that they had, which go on working and warn once.

`moved.txt` has a line for each: the old name and the one of today, without `jaxrobust.`; a colon
stands before a name inside a module.
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


@functools.cache
def _keepers() -> set[str]:
    """List the modules of today in which names of before are looked for."""
    return {
        old if ":" not in new else old.rpartition(".")[0]
        for old, new in names().items()
        if ":" in new or new.startswith(f"{old}.")
    }


def _attribute(package: str, name: str) -> Any:
    """Look a name up where it is today; `AttributeError`: there never was such a name."""
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
        if not fullname.startswith(f"{PACKAGE}."):
            return None
        if fullname in _keepers():
            spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
            if spec and spec.origin:
                spec.loader = _Keeper(fullname, spec.origin)
            return spec
        if not (new := names().get(fullname)) or ":" in new:
            return None
        today = importlib.util.find_spec(new)
        return importlib.machinery.ModuleSpec(
            fullname,
            _Loader(new),
            origin=today.origin if today else None,  # for `python -m`
        )


class _Keeper(importlib.machinery.SourceFileLoader):
    """Loads a module of today that also finds names of before."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, which looks up here what it does not define."""
        vars(module)["__getattr__"] = functools.partial(_attribute, module.__name__)
        super().exec_module(module)


class _Loader(importlib.abc.Loader):
    """Gives the module of today under its old name, to `import` and to `python -m`."""

    def __init__(self, new: str):
        self.new = new

    def create_module(self, spec: Any) -> ModuleType:
        _warn(spec.name, self.new)
        module = importlib.import_module(self.new)
        self.own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.own  # it is complete, and it is called what it is called

    def get_code(self, fullname: str) -> Any:
        spec = importlib.util.find_spec(self.new)
        assert spec and isinstance(spec.loader, importlib.abc.InspectLoader)
        _warn(fullname, self.new)
        return spec.loader.get_code(self.new)


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is {new} today; write that", FutureWarning, stacklevel=2)
