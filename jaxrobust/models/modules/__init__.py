"""NNX modules: the parameters of the kernels, named as in timm."""

from typing import Any

from jaxrobust.runtime import moved


def __getattr__(name: str) -> Any:
    """Look up a name of the module that this package was."""
    return moved.attribute(__name__, name)
