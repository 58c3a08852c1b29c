"""What is kept of an evaluation: records, verdicts image by image, what compares."""

from typing import Any

from jaxrobust.runtime import moved


def __getattr__(name: str) -> Any:
    """Look up a name of the module that this package was."""
    return moved.attribute(__name__, name)
