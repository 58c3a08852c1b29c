"""How to reject values of a config."""

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

_FOUND: ContextVar[list[str] | None] = ContextVar("_FOUND", default=None)


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """Yield a list to which these checks append their messages instead of raising."""
    found: list[str] = []
    token = _FOUND.set(found)
    try:
        yield found
    finally:
        _FOUND.reset(token)


def one_of(key: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise `ValueError` for a value that is not one of the choices."""
    allowed = list(allowed)
    if value not in allowed:
        _refuse(f"{key}={value!r} must be one of {', '.join(map(repr, allowed))}")


def must_be(key: str, value: Any, inside: bool, wanted: str) -> None:
    """Raise `ValueError`, with the allowed range, for a value outside it."""
    if not inside:
        _refuse(f"{key}={value} must be {wanted}")


def _refuse(message: str) -> None:
    found = _FOUND.get()
    if found is None:
        raise ValueError(message)
    found.append(message)
