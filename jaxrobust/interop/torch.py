"""PyTorch modules as functions of images in JAX, from `jaxrobust.pytorch.torch`."""

import importlib
from typing import Any

_NAMES = ("from_file", "from_module")
__all__ = [*_NAMES]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Import a function when it is first used."""
    if name in _NAMES:
        return getattr(importlib.import_module("jaxrobust.pytorch.torch"), name)
    raise AttributeError(f"module 'jaxrobust.interop.torch' has no attribute {name!r}")
