"""Kernels for NVIDIA's GPUs: cuDNN's, and ours; a layer imports them at its first use."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    return importlib.import_module(f"{__name__}.{name}")
