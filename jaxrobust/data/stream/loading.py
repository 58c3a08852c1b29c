"""Turns records into arrays: the examples at a position of the training stream, or in order.

An image is damaged if it does not decode or has another shape than the data set declares. Training
replaces it by the next intact record; evaluation leaves it out.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.data.sources.registry import DataError, Source
from jaxrobust.data.stream.plan import BatchPlan
from jaxrobust.data.transforms import augmentations, decoding, preparing


class TrainBatch(NamedTuple):
    """`images` uint8[B,H,W,C] and `labels` int32[B] of one process; labels are f32[B,classes] for
    all rows if one of the sources has probabilities.

    `damaged` int32[B] is the damaged record that the row should have held, else -1.
    """

    images: np.ndarray
    labels: np.ndarray
    damaged: np.ndarray


class EvaluationBatch(NamedTuple):
    """`images` uint8[B,H,W,C], `labels` int32[B], `mask` bool[B] (False: padding), `ids` int32[B].

    An id is the record's index in its split. Padding is black, with label 0 and id -1. So is a
    damaged image; `damaged` int32[B] then holds its record, elsewhere -1.
    """

    images: np.ndarray
    labels: np.ndarray
    mask: np.ndarray
    ids: np.ndarray
    damaged: np.ndarray


class DecodedImages:
    """Decodes records of a source; those of a small data set are decoded once and kept.

    `images(indices)` yields (uint8[H,W,C], label), read-only. A damaged image is None, or raises a
    DataError if `strict`. If `soft`, a label is f32[classes] if the source has probabilities. The
    cache fills as records are read and is local to its process.
    """

    def __init__(self, source: Source, cache_bytes: int, strict: bool, soft: bool = False) -> None:
        self.source, self.strict = source, strict
        self.soft = soft and source.soft
        self._cache_bytes = cache_bytes
        shape = source.image_shape
        fits = shape is not None and len(source) * math.prod(shape) <= cache_bytes
        self._keep = source.held and fits
        self._kept: dict[int, tuple[np.ndarray | None, Any]] = {}

    def __reduce__(self) -> tuple[type["DecodedImages"], tuple[Source, int, bool, bool]]:
        return DecodedImages, (self.source, self._cache_bytes, self.strict, self.soft)

    def __call__(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray | None, Any]]:
        """Yield the images and labels of these records: read in one batch, decoded one by one."""
        missing = [index for index in indices if index not in self._kept]
        records = dict(zip(missing, self.source.read(missing), strict=True)) if missing else {}
        for index in indices:
            if index not in records:
                yield self._kept[index]
                continue
            record = records[index]
            label: Any = record.label
            label = label.probabilities if self.soft else label
            example = self._decode(index, record.image), label
            if self._keep:
                self._kept[index] = example
            yield example

    def _decode(self, index: int, data: bytes) -> np.ndarray | None:
        try:
            image = decoded(self.source, data)
            if self._keep:  # as 3 bytes per pixel
                image = np.ascontiguousarray(image)
                image.flags.writeable = False
            return image
        except ValueError as error:
            if self.strict:
                raise DataError(
                    f"{self.source.where()}: the image of {self.source.describe(index)} is "
                    f"damaged: {error}; {self.source.remedy}"
                ) from error
            return None


def decoded(source: Source, data: bytes) -> np.ndarray:
    """Decode a record of `source` to uint8[H,W,C]; a `ValueError` describes any damage."""
    image = decoding.decode(data, channels=source.channels, clips=False)
    if source.image_shape not in (None, image.shape):
        raise ValueError(f"its shape is {image.shape}, not {source.image_shape} like the others")
    return image


def load_train(
    position: int,
    *,
    images: tuple[DecodedImages, ...],
    augment: augmentations.Op,
    first_view: augmentations.Op,
    image_size: int,
    plan: BatchPlan,
    rows: int,
) -> TrainBatch:
    """Make the `rows` examples that `plan` places; `first_view` augments first views."""
    placed = plan.place(position, rows)
    first, soft = images[0].source, any(one.soft for one in images)
    batch = TrainBatch(
        images=np.empty((rows, image_size, image_size, first.channels), np.uint8),
        labels=np.zeros((rows, first.num_classes), np.float32)
        if soft
        else np.empty(rows, np.int32),
        damaged=np.full(rows, -1, np.int32),
    )
    for number, decoded_images in enumerate(images):
        bits = np.random.Philox(key=[plan.seed, 1 + 2 * number])
        rng = np.random.Generator(bits)
        rows_here = np.flatnonzero(placed.source == number)
        columns = (rows_here, *(values[rows_here] for values in (placed.epochs, placed.view)))
        indices = placed.record[rows_here].tolist()
        read = zip(*(c.tolist() for c in columns), indices, decoded_images(indices), strict=True)
        for row, epoch, view, index, (image, label) in read:
            if image is None:
                batch.damaged[row] = index
                image, label = _next_whole(decoded_images, index)
            _restart(bits, epoch, index, view)
            change = augment if view else first_view
            batch.images[row] = change(image, rng)
            if soft and not decoded_images.soft:
                batch.labels[row, label] = 1
            else:
                batch.labels[row] = label
    return batch


def _next_whole(images: DecodedImages, index: int) -> tuple[np.ndarray, Any]:
    """Return the next intact record after a damaged one, the same for every caller."""
    size = len(images.source)
    for other in range(index + 1, index + min(size, 1000)):
        ((image, label),) = images([other % size])
        if image is not None:
            return image, label
    raise DataError(
        f"{images.source.where()}: the image of {images.source.describe(index)} and all its "
        f"possible replacements are damaged; {images.source.remedy}"
    )


def _restart(bits: np.random.Philox, epoch: int, index: int, view: int) -> None:
    """Set `bits` to the start of the random numbers of (epoch, record, view)."""
    state: Any = bits.state
    state["state"]["counter"] = np.array([0, view, epoch, index], np.uint64)
    state["buffer_pos"] = 4  # nothing buffered
    state["has_uint32"] = 0
    bits.state = state


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """Reads the images of a source, prepared for evaluation: `read(indices)`; picklable."""

    source: Source
    image_size: int
    preprocessing: str  # an id of `preparing.evaluation_transform`
    strict: bool = True

    def __post_init__(self) -> None:
        preparing.evaluation_transform(self.preprocessing)  # rejects an unknown id

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return H, W and channels of each image."""
        return (self.image_size, self.image_size, self.source.channels)

    def __call__(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray | None, int]]:
        """Yield (uint8[H,W,C], label); a damaged image is None or, if `strict`, a DataError."""
        transform = preparing.evaluation_transform(self.preprocessing)
        images = DecodedImages(self.source, 0, self.strict)
        for index, (image, label) in zip(indices, images(indices), strict=True):
            prepared = None if image is None else transform(image)
            if prepared is not None and prepared.shape != self.shape:
                fault = f"gives record {index} the shape {prepared.shape}, not {self.shape}"
                raise DataError(
                    f"{self.source.where()}: the preprocessing {self.preprocessing!r} {fault}; set "
                    "image_size to its output size"
                )
            yield prepared, label


def load_in_order(
    first: int, *, read: Evaluated, rows: int, places: Sequence[int]
) -> EvaluationBatch:
    """Load `rows` of the records at `places`, from `first` onwards, padded at the end."""
    indices = list(places[first : first + rows])
    batch = EvaluationBatch(
        images=np.zeros((rows, *read.shape), np.uint8),
        labels=np.zeros(rows, np.int32),
        mask=np.zeros(rows, bool),
        ids=np.full(rows, -1, np.int32),
        damaged=np.full(rows, -1, np.int32),
    )
    for row, (index, (image, label)) in enumerate(zip(indices, read(indices), strict=True)):
        if image is None:
            batch.damaged[row] = index
            continue
        batch.images[row], batch.labels[row] = image, label
        batch.mask[row], batch.ids[row] = True, index
    return batch
