"""Batches of `uint8` images, by grain: shuffled for training, in order for evaluation.

The training stream is one global sequence; a position in it is one integer, examples consumed.
With N records and a global batch of B, an epoch has S = N // B steps and consumes S * B examples:
position q is example q % (S * B) of epoch q // (S * B). The last N - S * B records of an epoch's
permutation are left out, other ones in every epoch.
The permutation is a function of (seed, epoch), an augmentation of (seed, epoch, record). Batches
are consecutive positions, and process p of P takes rows [p * B / P, (p + 1) * B / P) of each.
Neither processes nor workers change the sequence, and any position can be its start.
"""

import functools
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from absl import flags

from jaxrobust.data import augmentations, decoding, transforms
from jaxrobust.data.sources import DataError, Source

CACHE_BYTES = 400 * 2**20  # a data set whose decoded images fit is decoded once per process


class TrainBatch(NamedTuple):
    """`images` uint8[B,H,W,C] and `labels` int32[B], of one process."""

    images: np.ndarray
    labels: np.ndarray


class EvaluationBatch(NamedTuple):
    """`images` uint8[B,H,W,C], `labels` int32[B], `mask` bool[B] (False: padding), `ids` int32[B].

    An id is the record's index in its split; padding is black, with label 0 and id -1.
    """

    images: np.ndarray
    labels: np.ndarray
    mask: np.ndarray
    ids: np.ndarray


class Batches(Protocol):
    """An iterator over batches; `close()` stops its threads and worker processes."""

    def __iter__(self) -> Iterator[Any]: ...
    def __next__(self) -> Any: ...
    def close(self) -> None:
        """Stop reading ahead; the iterator cannot be used any more."""


def steps_per_epoch(source: Source, batch_size: int) -> int:
    """Steps of `batch_size` (global) in an epoch; the remainder of the records is left out.

    Raises:
      DataError: `batch_size` is larger than the source, or not positive.
    """
    if not 1 <= batch_size <= len(source):
        raise DataError(
            f"batch_size={batch_size} must be between 1 and the {len(source)} records of "
            f"{source.where()}"
        )
    return len(source) // batch_size


def train_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    augmentation: str,
    image_size: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> Batches:
    """Endless `TrainBatch`es of this process, shuffled and augmented (see the head of this file).

    Args:
      source: what to read.
      batch_size: examples per step over all processes.
      seed: of order and augmentation, in [0, 2**63).
      augmentation: a preset or a chain of `augmentations.chain`.
      image_size: pixels, H and W of the batches.
      start: global examples consumed so far. A multiple of `batch_size` unless that has changed;
        batches then may hold the end of one epoch and the beginning of the next.
      process_index, process_count: which rows of each global batch to return.
      workers: processes that read, decode and augment; 0: threads of this process.
    Returns:
      an iterator with `close()`; it reads a few batches ahead.
    Raises:
      DataError: arguments that do not fit the source or each other, now; a damaged record, a bad
        image or label, at the step that reads it.
    """
    import grain

    local = _local_batch(batch_size, process_index, process_count)
    examples = steps_per_epoch(source, batch_size) * batch_size
    try:
        chain = augmentations.chain(augmentation, image_size)
    except ValueError as error:
        raise DataError(str(error)) from error
    if not 0 <= seed < 2**63:
        raise DataError(f"seed={seed} must be in [0, 2**63)")
    if start < 0 or workers < 0:
        raise DataError(f"start={start} and workers={workers} must not be negative")
    if not chain.resizes and not _has_size(source, image_size):
        raise DataError(
            f"{source.where()} has {_sizes(source)} images, and the augmentation {augmentation!r} "
            f"does not resize them to image_size={image_size}; set image_size to theirs or begin "
            "with resized-crop"
        )
    load = functools.partial(
        _load_train,
        images=_Images(source, CACHE_BYTES),
        ops=chain.ops,
        image_size=image_size,
        seed=seed,
        start=start,
        rows=local,
        examples=examples,
    )
    # Block k * P + p is this process' part of global batch k.
    dataset = grain.MapDataset.range(process_index, sys.maxsize, process_count).map(load)
    return _read_ahead(dataset, workers)


def evaluation_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    preprocessing: str | None = None,
    process_index: int = 0,
    process_count: int = 1,
    limit: int | None = None,
    workers: int = 0,
) -> Batches:
    """`EvaluationBatch`es of this process, in the order of the source, the last one padded.

    Every process gets the same number of batches, all of the same shape.

    Args:
      source: what to read.
      batch_size: examples per step over all processes.
      image_size: pixels, H and W of the batches.
      preprocessing: an id of `transforms.evaluation_transform`; default: the images as they are
        when all have `image_size`, else bicubic resizing to image_size / 0.875 and a central crop.
      process_index, process_count: which rows of each global batch to return.
      limit: only the first `limit` records.
      workers: processes that read and decode; 0: threads of this process.
    Raises:
      DataError: arguments that do not fit, now; a damaged record, a bad image or label, or a
        preprocessing that gives another size, at the step that meets it.
    """
    import grain

    local = _local_batch(batch_size, process_index, process_count)
    if batch_size < 1 or (limit is not None and limit < 1):
        raise DataError(f"batch_size={batch_size} and limit={limit} must be at least 1")
    preprocessing = preprocessing or preprocessing_id(source, image_size)
    load = functools.partial(
        _load_in_order,
        images=_Images(source, 0),
        transform=transforms.evaluation_transform(preprocessing),
        preprocessing=preprocessing,
        shape=(image_size, image_size, source.channels),
        rows=local,
        size=min(len(source), limit or len(source)),
    )
    steps = -(-min(len(source), limit or len(source)) // batch_size)
    dataset = grain.MapDataset.range(process_index, steps * process_count, process_count).map(load)
    return _read_ahead(dataset, workers)


def preprocessing_id(source: Source, image_size: int) -> str:
    """How evaluation makes the images of a source `image_size`, if nothing else is asked for.

    "none" when all have that size, else bicubic resizing to image_size / 0.875 and a central crop,
    as the main paper tests at any resolution.
    """
    if _has_size(source, image_size):
        return "none"
    return f"bicubic-{int(image_size / 0.875)}-crop-{image_size}"


def _local_batch(batch_size: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise DataError(
            f"process_index={process_index} must be at least 0 and below "
            f"process_count={process_count}"
        )
    if batch_size % process_count:
        raise DataError(
            f"batch_size={batch_size} is the batch over all processes and must be a multiple of "
            f"process_count={process_count}"
        )
    return batch_size // process_count


def _has_size(source: Source, image_size: int) -> bool:
    return source.image_shape is not None and source.image_shape[:2] == (image_size, image_size)


def _sizes(source: Source) -> str:
    return "x".join(map(str, source.image_shape[:2])) if source.image_shape else "differently sized"


def _read_ahead(dataset: Any, workers: int) -> Batches:
    """The iterator over a grain `MapDataset` of batches; its memory is bounded by the buffers."""
    import grain

    cores = os.cpu_count() or 1
    threads = min(4, cores) if workers == 0 else 1
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    iterable = dataset.to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads absl flags; a library's caller has none
            flags.FLAGS.mark_as_parsed()
        iterable = iterable.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
            worker_init_fn=_ignore_interrupt,
        )
    return iter(iterable)


def _ignore_interrupt(index: int, count: int) -> None:
    """In a worker: Ctrl-C reaches it too, but only the main process has something to say."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Images:
    """Decoded records of a source; those of a small data set are decoded once and kept.

    `images(indices)` is a list of (uint8[H,W,C], label); the arrays are read-only.
    The cache fills as records are read and stays in its process.
    """

    def __init__(self, source: Source, cache_bytes: int):
        self.source = source
        self._cache_bytes = cache_bytes
        shape = source.image_shape
        self._keep = shape is not None and len(source) * math.prod(shape) <= cache_bytes
        self._kept: dict[int, tuple[np.ndarray, int]] = {}

    def __reduce__(self):
        return _Images, (self.source, self._cache_bytes)

    def __call__(self, indices: Sequence[int]) -> list[tuple[np.ndarray, int]]:
        kept = self._kept
        missing = [index for index in indices if index not in kept]
        if not missing:
            return [kept[index] for index in indices]
        found = {
            index: (self._decode(index, record.image), record.label)
            for index, record in zip(missing, self.source.read(missing), strict=True)
        }
        if self._keep:
            kept.update(found)
        return [found[index] if index in found else kept[index] for index in indices]

    def _decode(self, index: int, data: bytes) -> np.ndarray:
        source = self.source
        try:
            image = decoding.decode(data, channels=source.channels)
        except ValueError as error:
            raise DataError(
                f"{source.where()}: the image of record {index} does not decode ({error}); "
                f"{source.remedy}"
            ) from error
        if source.image_shape not in (None, image.shape):
            raise DataError(
                f"{source.where()}: the image of record {index} has the shape {image.shape}, not "
                f"{source.image_shape} as the data set says; {source.remedy}"
            )
        return image


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, 0, epoch]))
    return generator.permutation(size)


def _load_train(
    block: int,
    *,
    images: _Images,
    ops: Sequence[augmentations.Op],
    image_size: int,
    seed: int,
    start: int,
    rows: int,
    examples: int,
) -> TrainBatch:
    """The `rows` examples at position `start + block * rows`; an epoch has `examples`."""
    source = images.source
    epochs, offsets = np.divmod(start + block * rows + np.arange(rows), examples)
    indices = np.concatenate(
        [
            _permutation(seed, epoch, len(source))[offsets[epochs == epoch]]
            for epoch in np.unique(epochs).tolist()
        ]
    )
    batch = TrainBatch(
        images=np.empty((rows, image_size, image_size, source.channels), np.uint8),
        labels=np.empty(rows, np.int32),
    )
    bits = np.random.Philox(key=[seed, 1])
    rng = np.random.Generator(bits)
    examples_in_order = zip(
        epochs.tolist(), indices.tolist(), images(indices.tolist()), strict=True
    )
    for row, (epoch, index, (image, label)) in enumerate(examples_in_order):
        if ops:
            _restart(bits, epoch, index)
        for op in ops:
            image = op(image, rng)
        batch.images[row], batch.labels[row] = image, label
    return batch


def _restart(bits: np.random.Philox, epoch: int, index: int) -> None:
    """Put `bits` at the beginning of the numbers of (epoch, record), whatever was drawn before."""
    state: Any = bits.state
    state["state"]["counter"] = np.array([0, 0, epoch, index], np.uint64)
    state["buffer_pos"] = 4  # nothing buffered
    state["has_uint32"] = 0
    bits.state = state


def _load_in_order(
    block: int,
    *,
    images: _Images,
    transform: transforms.Transform,
    preprocessing: str,
    shape: tuple[int, int, int],
    rows: int,
    size: int,
) -> EvaluationBatch:
    """Records `block * rows` onwards, `rows` of them, padded where the records end."""
    indices = list(range(block * rows, min((block + 1) * rows, size)))
    batch = EvaluationBatch(
        images=np.zeros((rows, *shape), np.uint8),
        labels=np.zeros(rows, np.int32),
        mask=np.arange(rows) < len(indices),
        ids=np.full(rows, -1, np.int32),
    )
    for row, (index, (image, label)) in enumerate(zip(indices, images(indices), strict=True)):
        image = transform(image)
        if image.shape != shape:
            raise DataError(
                f"{images.source.where()}: the preprocessing {preprocessing!r} makes record "
                f"{index} {image.shape}, not {shape}; set image_size to the size it gives"
            )
        batch.images[row], batch.labels[row], batch.ids[row] = image, label, index
    return batch
