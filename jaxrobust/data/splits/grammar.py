"""The grammar of splits: `NAME`, `NAME[:90%]`, `NAME@IDS`, `NAME@IDS[:1000]`."""

import itertools
import os
import re
from collections.abc import Container, Mapping
from typing import NamedTuple

from jaxrobust.data.source import KINDS, DataError
from jaxrobust.data.splits import subsets

_SPLIT = re.compile(r"(?P<name>[^@\[\]/+\s]+)(?:@(?P<ids>.+?))?(?P<part>\[[^\[\]]*\])?")
_BOUND = r"(-?\d+(?:\.\d+)?%|-?\d+)?"
_PART = re.compile(rf"\[{_BOUND}:{_BOUND}\]")
WRITTEN = "write parts as train[:90%], train[90%:] or train[:1000]"
SAME = {"val": "validation", "validation": "val"}  # names that data sets use interchangeably


class SplitExpression(NamedTuple):
    """The parts of a split expression; `ids` and `part` are None if absent."""

    name: str
    ids: str | None
    part: str | None


def parse(split: str) -> SplitExpression | None:
    """Return the parts of a split, or None if it does not match this grammar."""
    if match := _SPLIT.fullmatch(split):
        return SplitExpression(match["name"], match["ids"], match["part"])
    return None


def present(name: str, there: Container[str]) -> str | None:
    """Return the existing split of this name, or of its synonym."""
    return next((split for split in (name, SAME.get(name)) if split in there), None)


def find(name: str, split: str, sizes: Mapping[str, object]) -> tuple[SplitExpression, str]:
    """Parse a split of a data set, and find which key of `sizes` it means."""
    parsed = parse(split)
    part = parsed and present(parsed.name, sizes)
    if not parsed or not part:
        raise no_split(name, split, ", ".join(f"{key} ({size})" for key, size in sizes.items()))
    return parsed, part


def no_split(name: str, split: str, there: str) -> DataError:
    """Return the error for a split that a data set does not have; `there` lists those it has."""
    return DataError(f"data set {name!r} has no split {split!r}: it has {there}; {WRITTEN}")


def rows(part: str | None, total: int, where: str) -> range:
    """Return the records of a part such as `[10%:-5]` of `total`, as TFDS defines it.

    Percentages are rounded to the closest record; negative bounds count from the end.
    """
    if part is None:
        return range(total)
    if not (match := _PART.fullmatch(part)) or not (match[1] or match[2]):
        raise DataError(f"{where}: {part} is not a valid part; {WRITTEN}")
    percent = "%" in part  # as in TFDS, [10:20%] is [10%:20%]

    def bound(text: str | None, default: int) -> int:
        if not text:
            return default
        value = float(text.rstrip("%"))
        return round(value * total / 100) if percent else int(value)

    start, stop = bound(match[1], 0), bound(match[2], total)
    if max(abs(start), abs(stop)) > total:
        raise DataError(f"{where}: the part {part} exceeds the {total} available records")
    start, stop = (value + total if value < 0 else value for value in (start, stop))
    if stop <= start:
        raise DataError(f"{where}: the part {part} is empty; {total} records are available")
    return range(start, stop)


_MANY = 10**9  # more records than any split has
_PREPARED = re.compile(r"(?:tfds:)?([\w-]+(?:/[\w-]+)?)(?::[\d.*]+)?")
_HUB = re.compile(r"hf:(?:.*/)?([\w.-]+)(?:[:@#].*)?")


def overlap(one: str, other: str, data_set: str = "") -> bool:
    """Return whether two splits of a data set may share images, judging by their names.

    Uncertain cases count as shared: `[:1000]` next to `[90%:]`, or an unreadable list. TFDS joins
      splits with a plus.
    """
    pieces = itertools.product(one.split("+"), other.split("+"))
    return any(_share(a.strip(), b.strip(), data_set) for a, b in pieces)


def same_images(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Return whether two splits, each as (data set, split), may share images."""
    return same_data(one[0], other[0]) and overlap(one[1], other[1], other[0])


def same_data(one: str, other: str) -> bool:
    """Return whether two names mean one data set, whatever its version, revision or provider."""
    return _plain(one) == _plain(other)


def _plain(name: str) -> str:
    kind, colon, path = name.partition(":")
    if colon and kind in KINDS and KINDS[kind].is_path:
        return f"{kind}:{os.path.realpath(path) if '://' not in path else path}"
    if match := _HUB.fullmatch(name) or _PREPARED.fullmatch(name):
        return match[1].lower()
    return name


def _share(one: str, other: str, data_set: str) -> bool:
    a, b = parse(one), parse(other)
    if one == other or not a or not b:
        return one == other
    if a.name != b.name and "all" in (a.name, b.name):  # TFDS's `all` joins all splits
        return True
    if a.name not in (b.name, SAME.get(b.name)):
        return False
    if a.ids and b.ids and a.ids != b.ids:
        return subsets.common(a.ids, b.ids, data_set)
    if a.ids != b.ids or a.part is None or b.part is None:
        return True
    if any((sign in a.part) != (sign in b.part) for sign in "%-"):
        return True  # it depends on the number of records
    try:
        first, second = (rows(part, _MANY, part) for part in (a.part, b.part))
    except DataError:  # TFDS has other parts, such as shards
        return True
    return max(first.start, second.start) < min(first.stop, second.stop)
