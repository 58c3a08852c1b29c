"""Warns of likely mistakes in any source: its pixels, its labels, its classes."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jaxrobust.data.source import DataError, Source, first_few

DARK = 127  # below half of white, as with 4 bits, or scikit-learn's digits (0 to 16)


def of_pixels(brightest: int, images: int, where: str) -> tuple[str, ...]:
    """Warn about dark images, judged by the brightest pixel of this many; 255 is white.

    Raises:
      DataError: pixels of 0 and 1 in place of 0 and 255.
    """
    looked = f"{where}: the {images} inspected images"
    if brightest == 1:
        raise DataError(
            f"{looked} have only pixel values 0 and 1, although white is 255, so a radius of "
            "8/255 would be eight times their range; save 255 * x instead of x"
        )
    if not images or brightest > DARK:
        return ()
    return (
        f"{looked} have no pixel above {brightest}, although white is 255; scale them to 0..255 "
        "unless they really are that dark, since radii are fractions of 255",
    )


def of_labels(source: Source) -> list[str]:
    """Name the classes without an image in a source, unless it is a list or has few images."""
    if source.labels is None or source.ids_sha256 or len(source) < 2 * source.num_classes:
        return []
    absent = np.setdiff1d(np.arange(source.num_classes), source.labels).tolist()
    if not absent:
        return []
    names = [source.classes[label] if source.classes else str(label) for label in absent]
    lines = f"{source.where()} has no images of {len(absent)} of its {source.num_classes} classes"
    every = not source.classes or source.split in ("train", "all")
    counted = "; if its labels start at 1, subtract 1" * (absent == [0] and every)
    return [f"{lines}: {first_few(names)}{counted}"]


def foreign(
    labels: np.ndarray, trained: np.ndarray, names: Sequence[str], where: str
) -> tuple[str, ...]:
    """Name the classes of a split without an image in the `train` next to it."""
    absent = np.setdiff1d(labels, trained).tolist()
    written = [names[label] if names else str(label) for label in absent]
    lines = f"{where} has images of classes that are absent from split 'train'"
    return (f"{lines}: {first_few(written)}",) if absent else ()


def of_names(source: Source) -> list[str]:
    """Warn about classes whose order, names or number look accidental."""
    names, notes = source.classes, []
    if source.num_classes == 1:
        notes.append(
            f"{source.where()} has only one class{f', {names[0]}' if names else ''}: a network "
            "with one output is always right; name a folder or labels with several classes"
        )
    numbers = sorted(names, key=_natural)
    if list(names) == sorted(names) and numbers != sorted(names, key=str.lower):
        place = next(i for i, name in enumerate(names) if name != numbers[i])
        notes.append(
            f"{source.where()} sorts its classes as text: label {place} is class {names[place]!r}, "
            f"but would be {numbers[place]!r} in numerical order, which timm uses; to change the "
            "order, set data.classes (--classes FILE)"
        )
    elif names and all(map(str.isdecimal, names)) and int(names[0]) != 0:
        notes.append(f"{source.where()} has label 0 for class {names[0]!r}: labels start at 0")
    same = Counter(name.strip().lower() for name in names)
    if twins := [name for name in names if same[name.strip().lower()] > 1]:
        notes.append(f"{source.where()} has classes that differ only in case: {first_few(twins)}")
    return notes


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Return a sort key that puts `2` before `10`."""
    parts = re.split(r"(\d+)", name.lower())
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]
