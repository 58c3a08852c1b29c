"""Parameterized tests of many rows: a few of them are fast tests, and the others slow ones."""

import re
from collections.abc import Callable, Iterable

import pytest

Row = Callable[..., None]


def fast(*rows: int | str) -> Callable[[Iterable[Row]], list[Row]]:
    """Mark all rows slow but these, which are named by their number or by one of their words.

    To be written above `@parameterized.parameters(...)`, whose rows can have no marks themselves.
    """

    def marked(sweep: Iterable[Row]) -> list[Row]:
        tests = list(sweep)
        names = [{i, *re.findall(r"\w+", test.__x_params_repr__)} for i, test in enumerate(tests)]
        for row in rows:
            if not any(row in found for found in names):
                raise ValueError(f"no row is named {row!r}")
        return [
            test if found.intersection(rows) else pytest.mark.slow(test)
            for test, found in zip(tests, names, strict=True)
        ]

    return marked
