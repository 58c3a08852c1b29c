"""Synthetic learnable images, computed from their index: `fake:32x32x3:10`."""

import functools
import re
from collections.abc import Sequence

import numpy as np

from jaxrobust.data.source import KINDS, DataError, Record, Source
from jaxrobust.data.splits import grammar, subsets
from jaxrobust.data.transforms import decoding

NAME = re.compile(KINDS["fake"].pattern)
_SPLITS = {"train": 1024, "test": 256}


def open_fake(name: str, split: str, choice: subsets.SubsetChoice) -> Source:
    """Open the split `split` of the synthetic data set `name`, which must match `NAME`."""
    if choice.classes is not None:
        raise DataError(f"data set {name!r} is synthetic: it has no classes to choose from")
    match = NAME.fullmatch(name)
    assert match is not None
    numbers = zip(match.groups(), (32, 32, 3, 10), strict=True)
    height, width, channels, classes = (int(group or default) for group, default in numbers)
    shape = (height, width, channels)
    parsed, _ = grammar.find(name, split, _SPLITS)
    if parsed.ids:
        raise DataError(f"data set {name!r} is synthetic: it has no files that ids could select")
    where = f"data set {name!r}, split {parsed.name!r}"
    rows = grammar.rows(parsed.part, _SPLITS[parsed.name], where)
    first = (list(_SPLITS).index(parsed.name) << 32) + rows.start
    return Source(
        name=name,
        split=split,
        size=len(rows),
        num_classes=classes,
        channels=channels,
        image_shape=shape,
        read=functools.partial(_read, first=first, shape=shape, num_classes=classes),
        labels=((first + np.arange(len(rows))) % classes).astype(np.int32),
    )


def _read(
    indices: Sequence[int], *, first: int, shape: tuple[int, int, int], num_classes: int
) -> list[Record]:
    """Draw noise over a 4x4 pattern of the class: learnable, cheap, exact."""
    height, width, channels = shape
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    records = []
    for index in indices:
        label = (first + index) % num_classes
        of_class, of_image = np.random.Philox(label), np.random.Philox(key=[first + index, 1])
        pattern = np.random.Generator(of_class).integers(0, 192, (4, 4, channels))
        noise = np.random.Generator(of_image).integers(0, 64, shape, np.uint8)
        image = pattern.astype(np.uint8)[rows[:, None], columns] + noise
        records.append(Record(decoding.encode(image), label))
    return records
