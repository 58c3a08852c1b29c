"""What the command asks: a target, images, one threat or several, corruptions."""

from typing import Any

from jaxrobust.runtime import moved


def __getattr__(name: str) -> Any:
    """Look up a name of the module that this package was."""
    return moved.attribute(__name__, name)
