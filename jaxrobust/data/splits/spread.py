"""Which n images of a split stand for all of them: spread over its classes by a fixed rule.

Records of a folder are sorted by class, so that its first ones are of one class. The rule takes
the images of each class in the order of a hash of their place in the split: each class has one
image before any has two, then as many as its share of the split. The n images are among the m, for
every m > n. RobustBench's numbers are of the first n of its lists, whose order stays.
"""

import numpy as np

from jaxrobust.data.source import Source
from jaxrobust.data.splits import balance, subsets

ALL, HASH, ROBUSTBENCH = "all", "hash", "robustbench"
_PUBLISHED = "cifar10-c:"  # whose files RobustBench reads from their first image on
_BLOCK = 4096  # records whose labels are read at least, where a source does not list them
_CHUNK = 1 << 22  # hashes in memory at a time


def places(source: Source, n: int | None) -> np.ndarray:
    """Choose `n` images of a split by their places, int64[n], ascending; 0 or None: all of them.

    Where the source does not list its labels, those of `max(4096, n)` records at most are read.
    """
    size = len(source)
    n = min(n or size, size)
    if choice(source, n) != HASH:
        return np.arange(n)
    if source.labels is not None:
        return balance.rows(source.labels, n)
    # The order of hashes, in blocks that double; by class in the last one, all of the others.
    start, end = 0, _BLOCK
    while end < n:
        start, end = end, 2 * end
    nearest = _smallest(size, min(end, size))
    complete, last = nearest[:start], np.sort(nearest[start:])
    labels = np.array([record.label for record in source.read(last.tolist())], np.int64)
    return np.sort(np.concatenate([complete, last[balance.rows(labels, n - start, last)]]))


def choice(source: Source, n: int | None) -> str:
    """Name the rule by which `n` images of a split are chosen."""
    if not n or n >= len(source):
        return ALL
    lists = (subsets.ROBUSTBENCH_SHA256, subsets.CIFAR_SHA256)
    fixed = source.ids_sha256 in lists if source.ids_sha256 else source.name.startswith(_PUBLISHED)
    return ROBUSTBENCH if fixed else HASH


def _smallest(size: int, count: int) -> np.ndarray:
    """Return the `count` of `size` places with the smallest hashes, by their hashes."""
    places = np.zeros(0, np.int64)
    for start in range(0, size, _CHUNK):
        places = np.concatenate([places, np.arange(start, min(start + _CHUNK, size))])
        if len(places) > count:
            places = places[np.argpartition(balance.hash_of(places), count - 1)[:count]]
    return places[np.argsort(balance.hash_of(places))]


def choice_flags(source: Source, labels: np.ndarray, chosen_by: str | None) -> dict[str, str]:
    """Flag the labels i[N] of images of a source, which the rule `chosen_by` chose (`choice`)."""
    classes, counts = source.num_classes, source.split_counts
    if chosen_by == HASH:
        counts = None  # which the rule follows only roughly where images are few
    elif counts is None and source.labels is not None:
        counts = np.bincount(source.labels, minlength=classes)
    elif counts is None and "[" not in source.split:  # the whole split stands for itself
        counts = np.bincount(labels, minlength=classes)
    return balance.flags(labels, classes, counts)
