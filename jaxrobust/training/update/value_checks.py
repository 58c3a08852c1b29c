"""How to reject values of a config."""

from collections.abc import Iterable
from typing import Any


def one_of(key: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise `ValueError` for a value that is not one of the choices."""
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{key}={value!r}; one of {', '.join(map(repr, allowed))}")


def must_be(key: str, value: Any, inside: bool, wanted: str) -> None:
    """Raise `ValueError`, with the allowed range, for a value outside it."""
    if not inside:
        raise ValueError(f"{key}={value} must be {wanted}")
