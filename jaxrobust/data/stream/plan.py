"""Which image is in which row of the training stream: order, views, a second source.

A batch of B rows holds E = floor(share * B) rows of a second source, if there is one, and R = B - E
of the first. The first source has R / V different images in the batch, each in V views: rows 0 to R
/ V - 1 are the first views, the next R / V the second views. With a second source, all rows are
then shuffled by a function of (seed, step of the whole run). An epoch ends when either source runs
out of records; the next epoch permutes both again. For more than `HELD` records, the permutation is
computed in blocks and never stored.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxrobust.data.source import DataError, Source

_ORDER, _ROWS = 0, 4  # second word of Philox's key; augmentations use 1 and 3
HELD = 1 << 22  # above this many records, a permutation would take more than 32 MB per epoch
_ROUNDS, _BLOCK = 8, 4096


class Placed(NamedTuple):
    """What some rows of the stream hold, in order."""

    epochs: np.ndarray
    source: np.ndarray  # 0 or 1
    record: np.ndarray
    view: np.ndarray  # from 0


class BatchPlan(NamedTuple):
    """How many rows of a batch come from each source, and in how many views."""

    seed: int
    batch_size: int
    sizes: tuple[int, ...]  # records in each source
    rows: tuple[int, ...]  # rows per batch from each source
    views: tuple[int, ...]

    @property
    def steps(self) -> int:
        """Count the steps in an epoch."""
        return min(size // images for size, images in self._images() if images)

    @property
    def examples(self) -> int:
        """Count the rows in an epoch."""
        return self.steps * self.batch_size

    def _images(self) -> Iterator[tuple[int, int]]:
        """Yield, for each source, its number of records and how many of them a batch has."""
        for size, rows, views in zip(self.sizes, self.rows, self.views, strict=True):
            yield size, rows // views

    def place(self, position: int, count: int) -> Placed:
        """Compute source, record and view of `count` rows, starting at a position of the stream."""
        steps, rows = np.divmod(position + np.arange(count), self.batch_size)
        epochs, steps_within = np.divmod(steps, self.steps)
        if len(self.rows) > 1:
            for step in np.unique(steps).tolist():
                here = steps == step
                rows[here] = _permutation((self.seed, _ROWS), step, self.batch_size)[rows[here]]
        source, record, view = (np.zeros(count, np.int64) for _ in range(3))
        begin = 0
        for number, (size, images) in enumerate(self._images()):
            here = (begin <= rows) & (rows < begin + self.rows[number])
            source[here] = number
            if images:
                view[here], within = np.divmod(rows[here] - begin, images)
                within += steps_within[here] * images
                record[here] = self._records(number, epochs[here], within, size)
            begin += self.rows[number]
        return Placed(epochs, source, record, view)

    def _records(self, number: int, epochs: np.ndarray, within: np.ndarray, size: int):
        drawn = np.zeros(len(within), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            key = (self.seed, _ORDER + 2 * number)
            if size <= HELD:
                drawn[here] = _permutation(key, epoch, size)[within[here]]
            else:
                drawn[here] = permuted(key, epoch, size, within[here])
        return drawn


@functools.lru_cache(maxsize=8)
def _permutation(key: tuple[int, int], number: int, size: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, number]))
    return generator.permutation(size)


def permuted(key: tuple[int, int], number: int, size: int, places: np.ndarray) -> np.ndarray:
    """Compute elements of a permutation of `size` numbers at some places, in constant memory.

    A Feistel network permutes the numbers with as many bits as `size - 1`. A result outside [0,
    size) is encrypted again until it is inside, which permutes [0, size).

    Args:
      key, number: identify the permutation, as in `_permutation`.
      places: i64[N] in [0, size).
    Returns:
      i64[N] in [0, size).
    Source: Black and Rogaway 2002 (Ciphers with Arbitrary Finite Domains), the cycle-walking
    cipher; its rounds mix as SplitMix64 does (Steele et al. 2014).
    """
    records = np.empty(len(places), np.int64)
    blocks, inside = np.divmod(places, _BLOCK)
    for block in np.unique(blocks).tolist():
        here = blocks == block
        records[here] = _permuted_block(key, number, size, block)[inside[here]]
    return records


@functools.lru_cache(maxsize=32)
def _permuted_block(key: tuple[int, int], number: int, size: int, block: int) -> np.ndarray:
    """Compute places [block * _BLOCK, (block + 1) * _BLOCK) together: as fast as a few, in
    NumPy."""
    bits = max(2, (size - 1).bit_length())
    low, rounds = bits // 2, _round_keys(key, number)
    places = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, size), dtype=np.uint64)
    records = _ciphered(places, rounds, low, bits - low)
    while (outside := np.flatnonzero(records >= size)).size:
        records[outside] = _ciphered(records[outside], rounds, low, bits - low)
    return records.astype(np.int64)


@functools.lru_cache(maxsize=8)
def _round_keys(key: tuple[int, int], number: int) -> tuple[np.uint64, ...]:
    # The counter's second word separates these draws from those of `_permutation`.
    return tuple(np.random.Philox(key=key, counter=[0, 1, 0, number]).random_raw(_ROUNDS))


def _ciphered(values: np.ndarray, rounds: tuple[np.uint64, ...], low: int, high: int) -> np.ndarray:
    """Permute u64[N] below 2^(low + high); each round changes one half by the other half."""
    masks = np.uint64((1 << high) - 1), np.uint64((1 << low) - 1)
    halves = [values >> np.uint64(low), values & masks[1]]
    for number, key in enumerate(rounds):
        changed = number % 2
        mixed = (halves[1 - changed] + key) * np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(31)
        mixed *= np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(29)
        halves[changed] = halves[changed] ^ (mixed & masks[changed])
    return (halves[0] << np.uint64(low)) | halves[1]


def plan(
    source: Source,
    *,
    batch_size: int,
    seed: int = 0,
    views: int = 1,
    extra: Source | None = None,
    extra_share: float = 0.5,
) -> BatchPlan:
    """Plan a training stream; `extra` gets `extra_share` of each batch.

    Raises:
      DataError: numbers that do not fit each other or the sources; sources that do not match.
    """
    if not 0 <= extra_share <= 1:
        raise DataError(f"data.extra_share={extra_share} must be between 0 and 1")
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size} must be at least 1")
    # Round down the decimal value: in binary, 0.29 times 100 is 28.999999999999996.
    second = 0 if extra is None else math.floor(round(extra_share * batch_size, 6))
    rows = batch_size - second
    if extra is not None and rows < 1:
        raise DataError(
            f"data.extra_share={extra_share} leaves no image of {source.where()} in a batch of "
            f"{batch_size}; use at most {1 - 1 / batch_size:g}, or use data.extra as data.name"
        )
    if views < 1 or rows % views:
        near = [n for n in range(1, rows + 1) if rows % n == 0]
        of = f"the {rows} rows of data.name in a batch"
        raise DataError(f"data.views={views} does not divide {of}; use one of {near}")
    for one, images in ((source, rows // views), (extra, second)):
        if one is not None and images > len(one):
            raise DataError(
                f"a batch of {batch_size} needs {images} images of {one.where()}, which has "
                f"{len(one)}; use a smaller batch_size"
            )
    if extra is None:
        return BatchPlan(seed, batch_size, (len(source),), (rows,), (views,))
    _check_alike(source, extra)
    return BatchPlan(seed, batch_size, (len(source), len(extra)), (rows, second), (views, 1))


def _check_alike(source: Source, extra: Source) -> None:
    for field in ("num_classes", "channels"):
        second, first = getattr(extra, field), getattr(source, field)
        if second != first:
            words = field.replace("num_", "")
            raise DataError(
                f"data.extra: {extra.where()} has {second} {words}, but {source.where()} has "
                f"{first}; give a data set with the same classes and channels"
            )
    if source.classes and extra.classes and source.classes != extra.classes:
        raise DataError(
            f"data.extra: {extra.where()} names its classes differently from {source.where()} "
            f"({extra.classes[0]!r}, ... and {source.classes[0]!r}, ...), so labels differ; use "
            "a data set with the same names in the same order"
        )
