"""Batches of `uint8` images, made by grain: shuffled for training, in order for evaluation.

The training stream is one global sequence; a position in it is one integer, examples consumed. With
N records and a global batch of B, an epoch has S = N // B steps and consumes S * B examples:
position q is example q % (S * B) of epoch q // (S * B). Each epoch leaves out the last N - S * B
records of its permutation, which differ between epochs.
The permutation is a function of (seed, epoch), an augmentation of (seed, epoch, record). With views
or a second source, `plan.py` defines the epoch and what is at each position. Batches are
consecutive positions, and process p of P takes rows [p * B / P, (p + 1) * B / P) of each. The
numbers of processes and workers do not change the sequence; it can start at any position.
"""

import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from absl import flags

from jaxrobust.data.sources.registry import DataError, Source
from jaxrobust.data.splits import spread
from jaxrobust.data.stream import loading
from jaxrobust.data.stream.plan import plan
from jaxrobust.data.transforms import augmentations, preparing

CACHE_BYTES = 400 * 2**20  # a data set whose decoded images fit is decoded once per process
_PART = 64  # maximum rows per thread or worker task: bounds latency and read-ahead memory


class Batches(Iterator[Any], Protocol):
    """An iterator over batches; `close()` stops its threads and worker processes."""

    def close(self) -> None:
        """Stop reading ahead; the iterator is unusable afterwards."""


def steps_per_epoch(source: Source, batch_size: int) -> int:
    """Count the steps of `batch_size` (global) in an epoch, dropping the remaining records.

    Raises:
      DataError: `batch_size` is larger than the source, or not positive.
    """
    if not 1 <= batch_size <= len(source):
        there = f"{len(source)} records of {source.where()}"
        raise DataError(f"{batch_size=} must be between 1 and the {there}")
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
    strict: bool = True,
    views: int = 1,
    first_view: str | None = None,
    extra: Source | None = None,
    extra_share: float = 0.5,
) -> Batches:
    """Return an endless iterator of this process's `TrainBatch`es, shuffled and augmented.

    Args:
      source: the records to read.
      batch_size: examples per step over all processes.
      seed: of order and augmentation, in [0, 2**63).
      augmentation: a preset or a chain of `augmentations.chain`.
      image_size: pixels, H and W of the batches.
      start: global examples consumed so far. A multiple of `batch_size`, unless that has changed;
        then a batch may hold the end of one epoch and the beginning of the next.
      process_index, process_count: which rows of each global batch to return.
      workers: processes that read, decode and augment; 0: use threads of this process.
      strict: whether a damaged image is an error; otherwise the next intact record replaces it, as
        `TrainBatch.damaged` reports (pass it to `Damage`). In `extra` it is always an error.
      views: how often an image appears in its batch, each time with another augmentation.
      first_view: augmentation of an image's first view; default: the same as for all views.
      extra: a second source, with `extra_share` of each batch; see `plan.plan`.
    Returns:
      an iterator with `close()`; it reads a few batches ahead.
    Raises:
      DataError: immediately for arguments that do not fit the source or each other; at the step
        that reads it for an unreadable record, a bad label or (if `strict`) a damaged image.
    """
    local = _local_batch(batch_size, process_index, process_count)
    if extra is None and views == 1:
        steps_per_epoch(source, batch_size)
    try:
        chain = augmentations.chain(augmentation, image_size)
        first_chain = augmentations.chain(first_view or augmentation, image_size)
    except ValueError as error:
        raise DataError(str(error)) from error
    if not 0 <= seed < 2**63:
        raise DataError(f"seed={seed} must be in [0, 2**63)")
    if start < 0 or workers < 0:
        raise DataError(f"start={start} and workers={workers} must not be negative")
    sources = (source,) if extra is None else (source, extra)
    for one in sources:
        if not ((chain.resizes and first_chain.resizes) or _has_size(one, image_size)):
            sizes = "x".join(map(str, (one.image_shape or ())[:2])) or "differently sized"
            raise DataError(
                f"{one.where()} has {sizes} images, but the augmentation {augmentation!r} "
                f"does not resize them to image_size={image_size}; set image_size to their size, "
                "or begin the augmentation with resized-crop"
            )
    placed = plan(
        source, batch_size=batch_size, seed=seed, views=views, extra=extra, extra_share=extra_share
    )
    load = functools.partial(
        loading.load_train,
        images=tuple(
            loading.DecodedImages(one, CACHE_BYTES, strict or one is extra, soft=True)
            for one in sources
        ),
        augment=chain.augment,
        first_view=first_chain.augment,
        image_size=image_size,
        plan=placed,
    )
    first = start + process_index * local
    return _batches(load, first, batch_size, local, steps=None, workers=workers)


def evaluation_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    preprocessing: str | None = None,
    process_index: int = 0,
    process_count: int = 1,
    limit: int | None = None,
    places: Sequence[int] | None = None,
    workers: int = 0,
    strict: bool = True,
) -> Batches:
    """Return this process's `EvaluationBatch`es, in the order of the source, the last one padded.

    Every process gets the same number of batches, and all have the same shape.

    Args:
      source: the records to read.
      batch_size: examples per step over all processes.
      image_size: pixels, H and W of the batches.
      preprocessing: an id of `preparing.evaluation_transform`; default: `preprocessing_id`.
      process_index, process_count: which rows of each global batch to return.
      limit: number of records, spread over the classes; None: all.
      places: only the records there, in this order; None: all, or as `limit` chooses.
      workers: processes that read and decode; 0: use threads of this process.
      strict: whether a damaged image is an error; otherwise it is left out.
    Raises:
      DataError: immediately for arguments that do not fit; at the step that reads it for an
        unreadable record, a bad label, a preprocessing that gives another size or (if `strict`) a
        damaged image.
    """
    local = _local_batch(batch_size, process_index, process_count)
    if batch_size < 1 or (limit is not None and limit < 1):
        raise DataError(f"batch_size={batch_size} and limit={limit} must be at least 1")
    preprocessing = preprocessing_id(source, image_size, preprocessing)
    taken = spread.places(source, limit).tolist() if places is None else places
    read = loading.Evaluated(source, image_size, preprocessing, strict)
    load = functools.partial(loading.load_in_order, read=read, places=taken)
    steps = -(-len(taken) // batch_size)
    return _batches(load, process_index * local, batch_size, local, steps=steps, workers=workers)


def preprocessing_id(source: Source, image_size: int, wanted: str | None = None) -> str:
    """Return the id, for records, of the preprocessing that makes evaluation images `image_size`.

    This is `wanted`, with a percentage resolved. Without it, "none" if all images have that size,
    else bicubic resizing to image_size / 0.875 and a central crop, as the main paper tests at every
    resolution.
    """
    if wanted is None and _has_size(source, image_size):
        return "none"
    return preparing.resolve(wanted or "bicubic-0.875", image_size)


def _local_batch(batch_size: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise DataError(f"{process_index=} must be at least 0 and below {process_count=}")
    if batch_size % process_count:
        raise DataError(
            f"{batch_size=} is the batch over all processes and must be a multiple of "
            f"{process_count=}"
        )
    return batch_size // process_count


def _has_size(source: Source, image_size: int) -> bool:
    return source.image_shape is not None and source.image_shape[:2] == (image_size, image_size)


def _batches(
    load: Callable[..., Any], first: int, stride: int, rows: int, *, steps: int | None, workers: int
) -> Batches:
    """Make batches from parts; batch k has the `rows` positions from `first + k * stride` on."""
    import grain

    parts = -(-rows // _PART)
    ends = [rows * part // parts for part in range(parts + 1)]  # parts differ by at most one row

    def load_part(number: int) -> Any:
        step, part = divmod(number, parts)
        return load(first + step * stride + ends[part], rows=ends[part + 1] - ends[part])

    dataset = grain.MapDataset.range(sys.maxsize if steps is None else steps * parts)
    threads = min(4, os.cpu_count() or 1) if workers == 0 else 1
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    iterable = dataset.map(load_part).to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain needs absl flags; library users have none
            flags.FLAGS.mark_as_parsed()
        iterable = iterable.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
            worker_init_fn=_obey_the_main_process,
        )
    iterable = iterable.batch(parts, batch_fn=_joined)
    return iter(grain.experimental.ThreadPrefetchIterDataset(iterable, prefetch_buffer_size=1))


def _joined(parts: list[Any]) -> Any:
    """Join parts to one batch in new memory; theirs is shared with the worker and gets freed."""
    return type(parts[0])(*map(np.concatenate, zip(*parts, strict=True)))


def _obey_the_main_process(index: int, count: int) -> None:
    """Ignore signals, so that only the main process handles them, in step with other hosts."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()


def _end_with_the_main_process() -> None:
    main = multiprocessing.parent_process()
    if main:  # killed with -9, it would otherwise leave its workers behind
        main.join()
        os._exit(1)


class Damage:
    """The damaged records of a source that a run has met; each is reported once.

    More than `limit` raise a DataError. `say` gets the sentence about a record, `note` each new
    record. Records in `known`, from earlier processes, count but are not reported again. `new` are
    those that this process added; `met` are all that this object met, known or new.
    """

    def __init__(
        self,
        source: Source,
        limit: int,
        say: Callable[[str], None],
        *,
        known: Iterable[int] = (),
        note: Callable[[int], None] = lambda record: None,
    ) -> None:
        self.known, self.new, self.met = frozenset(known), set[int](), set[int]()
        self._source, self._limit, self._say, self._note = source, limit, say, note

    def add(self, damaged: np.ndarray) -> None:
        """Add the `damaged` array of a batch."""
        source = self._source
        met = set(damaged[damaged >= 0].tolist())
        self.met |= met
        for index in sorted(met - self.known - self.new):
            fault = f"{source.where()}: the image of {source.describe(index)} is damaged"
            try:
                loading.decoded(source, source[index].image)
                reason = "it was damaged when read, but is intact now"
            except ValueError as error:
                reason = str(error)
            count = len(self.known) + len(self.new) + 1
            if count > self._limit:
                raise DataError(
                    f"{fault} ({reason}), one more than data.max_damaged={self._limit} allows; "
                    f"{source.remedy}"
                )
            self.new.add(index)
            self._note(index)
            self._say(f"{fault} ({reason}); {count} of at most {self._limit} damaged images")
