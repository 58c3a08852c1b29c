"""Chooses n images to represent a split: spread over its classes by a fixed rule.

Records of a folder are sorted by class, so the first ones all have the same class. The rule takes
the images of each class in the order of a hash of their place in the split. Each class gets one
image before any gets two, then its share of the split. The n images are among the m, for every m >
n. RobustBench's numbers use the first n of its lists, whose order is kept.
"""

import numpy as np

from jaxrobust.data.source import Source
from jaxrobust.data.splits import balance, subsets

ALL, HASH, ROBUSTBENCH = "all", "hash", "robustbench"
_PUBLISHED = "cifar10-c:"  # RobustBench reads these files from their first image on
_BLOCK = 4096  # records whose labels are read at least, if a source does not list them
_CHUNK = 1 << 22  # hashes in memory at a time


def places(source: Source, n: int | None) -> np.ndarray:
    """Choose `n` images of a split: their places, int64[n], ascending; 0 or None: all.

    If the source does not list its labels, those of at most `max(4096, n)` records are read.
    """
    size = len(source)
    n = min(n or size, size)
    if choice(source, n) != HASH:
        return np.arange(n)
    if source.labels is not None:
        return balance.rows(source.labels, n)
    # In the order of hashes, in blocks that double: all of each block, but the last by class.
    start, end = 0, _BLOCK
    while end < n:
        start, end = end, 2 * end
    nearest = _smallest(size, min(end, size))
    complete, last = nearest[:start], np.sort(nearest[start:])
    labels = np.array([record.label for record in source.read(last.tolist())], np.int64)
    return np.sort(np.concatenate([complete, last[balance.rows(labels, n - start, last)]]))


def choice(source: Source, n: int | None) -> str:
    """Name the rule that chooses `n` images of a split."""
    if not n or n >= len(source):
        return ALL
    lists = (subsets.ROBUSTBENCH_SHA256, subsets.CIFAR_SHA256)
    fixed = source.ids_sha256 in lists if source.ids_sha256 else source.name.startswith(_PUBLISHED)
    return ROBUSTBENCH if fixed else HASH


def _smallest(size: int, count: int) -> np.ndarray:
    """Return the `count` of `size` places with the smallest hashes, sorted by hash."""
    places = np.zeros(0, np.int64)
    for start in range(0, size, _CHUNK):
        places = np.concatenate([places, np.arange(start, min(start + _CHUNK, size))])
        if len(places) > count:
            places = places[np.argpartition(balance.hash_of(places), count - 1)[:count]]
    return places[np.argsort(balance.hash_of(places))]


def choice_flags(source: Source, labels: np.ndarray, chosen_by: str | None) -> dict[str, str]:
    """Flag the labels i[N] of images of a source that were chosen by the rule `chosen_by`."""
    classes, counts = source.num_classes, source.split_counts
    if chosen_by == HASH:
        counts = None  # for few images, the rule follows these only roughly
    elif counts is None and source.labels is not None:
        counts = np.bincount(source.labels, minlength=classes)
    elif counts is None and "[" not in source.split:  # a full split represents itself
        counts = np.bincount(labels, minlength=classes)
    return balance.flags(labels, classes, counts)
