"""Rows of attacks whose functions are watched."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from jaxrobust import attacks


@contextlib.contextmanager
def making(name: str, **settings: Any) -> Iterator[mock.Mock]:
    """Put a mock in the place of the function that makes an attack."""
    made = mock.Mock(**settings)
    with mock.patch.dict(attacks.ROWS, {name: attacks.ROWS[name]._replace(make=made)}):
        yield made
