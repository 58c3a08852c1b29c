"""Tests of many rows: cheap rows are one test, and of long sweeps a few rows are fast tests."""

import functools
import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

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


def rows(*given: Any) -> Callable[[Row], Row]:
    """Make one test of rows as of `@parameterized.parameters`, each in a `subTest` of its own.

    For rows that are cheap and leave nothing behind: `setUp` is called once for all of them.
    """

    def of(test: Row) -> Row:
        @functools.wraps(test)
        def each(self: Any) -> None:
            for row in given:
                with self.subTest(row):
                    if isinstance(row, dict):
                        test(self, **row)
                    else:
                        test(self, *(row if isinstance(row, tuple) else (row,)))

        del each.__wrapped__  # whose arguments would be those of fixtures
        return each

    return of


def product(**choices: Iterable[Any]) -> list[dict[str, Any]]:
    """All combinations, as rows of `rows`."""
    return [dict(zip(choices, row, strict=True)) for row in itertools.product(*choices.values())]
