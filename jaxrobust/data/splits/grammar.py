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
WRITTEN = "parts are written train[:90%], train[90%:], train[:1000]"
SAME = {"val": "validation", "validation": "val"}  # which data sets write in either way


class SplitExpression(NamedTuple):
    """A split in its pieces; `ids` and `part` are None where they are not written."""

    name: str
    ids: str | None
    part: str | None


def parse(split: str) -> SplitExpression | None:
    """Return the pieces of a split, or None if it is not of this grammar."""
    if match := _SPLIT.fullmatch(split):
        return SplitExpression(match["name"], match["ids"], match["part"])
    return None


def present(name: str, there: Container[str]) -> str | None:
    """Find the existing split of a name, or of the name that means the same."""
    return next((split for split in (name, SAME.get(name)) if split in there), None)


def find(name: str, split: str, sizes: Mapping[str, object]) -> tuple[SplitExpression, str]:
    """Parse a split of a data set, and find which of those with these `sizes` it is."""
    parsed = parse(split)
    part = parsed and present(parsed.name, sizes)
    if not parsed or not part:
        raise no_split(name, split, ", ".join(f"{key} ({size})" for key, size in sizes.items()))
    return parsed, part


def no_split(name: str, split: str, there: str) -> DataError:
    """Return the refusal of a split that a data set does not have, and `there` what it has."""
    return DataError(f"data set {name!r} has no split {split!r}: it has {there}; {WRITTEN}")


def rows(part: str | None, total: int, where: str) -> range:
    """Return the records of a part such as `[10%:-5]` among `total`, with TFDS' meaning.

    A percentage is rounded to the closest record, a negative bound counts from the end.
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
_PREPARED = re.compile(r"(?:tfds:)?([\w-]+(?:/[\w-]+)?)(?::[\d.*]+)?")
_HUB = re.compile(r"hf:(?:.*/)?([\w.-]+)(?:[:@#].*)?")


def overlap(one: str, other: str, data_set: str = "") -> bool:
    """Tell whether two splits of a data set hold some of the same images, as far as names say.

    What they leave open counts as shared: `[:1000]` next to `[90%:]`, or a list that cannot be
      read.
    TFDS joins splits with a plus.
    """
    pieces = itertools.product(one.split("+"), other.split("+"))
    return any(_share(a.strip(), b.strip(), data_set) for a, b in pieces)


def same_images(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Tell whether two splits, each as (data set, split), may hold some of the same images."""
    return same_data(one[0], other[0]) and overlap(one[1], other[1], other[0])


def same_data(one: str, other: str) -> bool:
    """Tell whether two names are of one data set, whatever its version, revision or provider."""
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
    if a.name != b.name and "all" in (a.name, b.name):  # TFDS' joins all splits
        return True
    if a.name not in (b.name, SAME.get(b.name)):
        return False
    if a.ids and b.ids and a.ids != b.ids:
        return subsets.common(a.ids, b.ids, data_set)
    if a.ids != b.ids or a.part is None or b.part is None:
        return True
    if any((sign in a.part) != (sign in b.part) for sign in "%-"):
        return True  # how many records there are would tell
    try:
        first, second = (rows(part, _MANY, part) for part in (a.part, b.part))
    except DataError:  # TFDS knows other parts, such as those in shards
        return True
    return max(first.start, second.start) < min(first.stop, second.stop)
