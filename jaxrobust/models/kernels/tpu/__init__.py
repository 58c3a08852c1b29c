"""Kernels for TPUs in Pallas, each with the plain formula's name; they also run interpreted.

A kernel's module is imported when a layer first uses it, as `tpu.conv_stem`.
"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    return importlib.import_module(f"{__name__}.{name}")
