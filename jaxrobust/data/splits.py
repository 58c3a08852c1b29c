"""The grammar of splits: `NAME`, `NAME[:90%]`, `NAME@IDS`, `NAME@IDS[:1000]`."""

import re
from collections.abc import Container
from typing import NamedTuple

from jaxrobust.data.types import DataError

_SPLIT = re.compile(r"(?P<name>[^@\[\]/+\s]+)(?:@(?P<ids>.+?))?(?P<part>\[[^\[\]]*\])?")
_BOUND = r"(-?\d+(?:\.\d+)?%|-?\d+)?"
_PART = re.compile(rf"\[{_BOUND}:{_BOUND}\]")
WRITTEN = "parts are written train[:90%], train[90%:], train[:1000]"
SAME = {"val": "validation", "validation": "val"}  # which data sets write in either way


class Asked(NamedTuple):
    """A split in its pieces; `ids` and `part` are None where they are not written."""

    name: str
    ids: str | None
    part: str | None


def parse(split: str) -> Asked | None:
    """Return the pieces of a split, or None if it is not of this grammar."""
    if match := _SPLIT.fullmatch(split):
        return Asked(match["name"], match["ids"], match["part"])
    return None


def present(name: str, there: Container[str]) -> str | None:
    """Return which of the splits that are there has the name, or the name that means the same."""
    return next((split for split in (name, SAME.get(name)) if split in there), None)


def rows(part: str | None, total: int, where: str) -> range:
    """Return the records of a part such as `[10%:-5]` among `total`, with TFDS' meaning.

    A percentage is rounded to the closest record, a negative bound counts from the end.

    Raises:
      DataError: not a part, beyond the records, or empty.
    """
    if part is None:
        return range(total)
    if not (match := _PART.fullmatch(part)) or not (match[1] or match[2]):
        raise DataError(f"{where}: {part} is not a part; {WRITTEN}")
    percent = "%" in part  # as in TFDS, [10:20%] is [10%:20%]

    def bound(text: str | None, default: int) -> int:
        if not text:
            return default
        value = float(text.rstrip("%"))
        return round(value * total / 100) if percent else int(value)

    start, stop = bound(match[1], 0), bound(match[2], total)
    if max(abs(start), abs(stop)) > total:
        raise DataError(f"{where}: the part {part} goes beyond the {total} records that are there")
    start, stop = (value + total if value < 0 else value for value in (start, stop))
    if stop <= start:
        raise DataError(f"{where}: the part {part} holds no record; {total} are there")
    return range(start, stop)


_MANY = 10**9  # records: more than any split has


def overlap(one: str, other: str) -> bool:
    """Tell whether two splits of a data set hold some of the same images, as far as their names
    say: of lists of ids nobody knows here, and `[:1000]` beside `[90%:]` may.
    """
    a, b = parse(one), parse(other)
    if one == other or not a or not b:
        return one == other
    if a.name not in (b.name, SAME.get(b.name)):
        return False
    if a.ids != b.ids:
        return a.ids is None or b.ids is None
    parts = [a.part, b.part]
    if None in parts or len({"%" in str(part) for part in parts}) > 1:
        return True
    first, second = (rows(part, _MANY, one) for part in parts)
    return max(first.start, second.start) < min(first.stop, second.stop)
