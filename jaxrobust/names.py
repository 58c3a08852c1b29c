"""Rows that map one naming of weights to another, and the array moves they need.

A converter is an ordered list of rows beside each architecture; `convert.py` runs them.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Transform = Callable[[np.ndarray], np.ndarray]


class Row(NamedTuple):
    """One renaming: source names that match `pattern` become `target`, through `transform`.

    `target` is None for a name that is deliberately left out; `reason` then says why.
    """

    pattern: re.Pattern[str]
    target: str | None
    transform: Transform
    reason: str = ""


def same(array: np.ndarray) -> np.ndarray:
    """The array itself."""
    return array


def conv_oihw(array: np.ndarray) -> np.ndarray:
    """[out, in, kh, kw] of torch as [kh, kw, in, out]; depthwise [C, 1, k, k] as [k, k, 1, C]."""
    return np.transpose(array, (2, 3, 1, 0))


def linear_oi(array: np.ndarray) -> np.ndarray:
    """[out, in] of torch as [in, out]."""
    return np.transpose(array)


def row(pattern: str, target: str, transform: Transform = same) -> Row:
    r"""A row whose `target` may use the groups of `pattern` as `\1`; the whole name must match."""
    return Row(re.compile(pattern), target, transform)


def drop(pattern: str, reason: str) -> Row:
    """A row that leaves matching names out, with the reason."""
    return Row(re.compile(pattern), None, same, reason)
