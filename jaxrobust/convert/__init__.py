"""Weights from timm and from RobustBench's files, and back; more is in `jaxrobust.publish`."""

import importlib
from typing import Any

_CONVERT = "jaxrobust.weights.naming.convert"
_NAMES = {
    "from_torch": _CONVERT,
    "to_torch": _CONVERT,
    "push_to_hub": "jaxrobust.publish.export_torch",
}
__all__ = ["from_torch", "push_to_hub", "to_torch"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Import a function when it is first used."""
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'jaxrobust.convert' has no attribute {name!r}")
