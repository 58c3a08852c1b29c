"""Adversarially robust image classifiers in JAX.

`models` builds networks, and `load` (or `from_pretrained`) loads them with weights. `attacks`
attacks them, `evaluation.autoattack` measures their robust accuracy, and `tasks` defines tasks
other than classification. `convert` exchanges weights with PyTorch, `push_to_hub` publishes them,
and `data` reads images. `python -m jaxrobust` lists the commands. Images are f32[B, H, W, C] in
[0, 1]; radii are in the same units.
"""

import importlib
import sys
from typing import Any

from jaxrobust.runtime.text import patience

__version__ = "0.2.0"
_MODULES = ("attacks", "convert", "data", "evaluation", "models", "tasks")
_FUNCTIONS = {
    "load": "weights.load",
    "from_pretrained": "weights.load",  # the same, by the hub's words
    "push_to_hub": "convert",
}
__all__ = [*_MODULES, *_FUNCTIONS, "__version__"]

# `python -m` imports the packages above a command before the command itself, with this as argv[0].
if sys.argv[:1] == ["-m"] and any(word.startswith("jaxrobust") for word in sys.orig_argv):
    patience.begin(patience.LOADING)


def __getattr__(name: str) -> Any:
    """Import a subpackage, or the module of a function, when it is first used."""
    if name in _MODULES:
        return importlib.import_module(f"jaxrobust.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"jaxrobust.{_FUNCTIONS[name]}"), name)
    raise AttributeError(f"module 'jaxrobust' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
