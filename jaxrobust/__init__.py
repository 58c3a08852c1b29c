"""Adversarially robust image classifiers in JAX."""

import importlib

_MODULES = ("attacks", "convert", "data", "evaluation", "models")


def __getattr__(name: str):
    """Return the subpackages, imported when they are first used."""
    if name in _MODULES:
        return importlib.import_module(f"jaxrobust.{name}")
    raise AttributeError(f"module 'jaxrobust' has no attribute {name!r}")
