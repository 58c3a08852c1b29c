"""A split as arrays in memory, or as images prepared on demand."""

import contextlib
import functools
import hashlib
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.data.source import content_hashes
from jaxrobust.data.sources import registry
from jaxrobust.data.splits import spread
from jaxrobust.data.stream import loading, pipeline
from jaxrobust.data.transforms import preparing

_BATCH = 256
_USUAL_SIZE = 224  # of photographs, unless specified otherwise
_READ = 256  # records per read, if only labels are needed
_THREADS = min(8, os.cpu_count() or 1)  # decoding releases the GIL


class ImageArrays(NamedTuple):
    """Images and their labels, ids and class names.

    Attributes:
      images: f32[N,H,W,C] in [0, 1]; RGB, or gray with C=1.
      labels: i32[N].
      ids: i32[N], the images' places in their split: `image_ids` of `autoattack`.
      classes: the class names in the order of labels; empty if there are none.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    classes: tuple[str, ...]


def load(
    name: str,
    *,
    split: str = "test",
    n: int | None = None,
    preprocessing: str | None = None,
    image_size: int | None = None,
    data_dir: str | os.PathLike | None = None,
    classes: str | None = None,
    strict: bool = True,
) -> ImageArrays:
    """Return images of a split as arrays prepared for evaluation, in the order of the split.

    >>> from jaxrobust import data
    >>> digits = data.load("digits", split="test", n=100)
    >>> digits.images.shape, digits.images.dtype, float(digits.images.max())
    ((100, 8, 8, 1), dtype('float32'), 1.0)
    >>> digits.labels[:3], digits.ids[:3]
    (array([3, 1, 4], dtype=int32), array([2, 4, 6], dtype=int32))

    Args:
      name: `cifar10`, `folder:PATH`, `npz:PATH`, `hf:NAME`, ...: as in `open_source`.
      split: `test`, `train[:10%]`, `val@robustbench`, ...: as in `open_source`.
      n: number of images, spread over the classes by a fixed rule; default: all. A thousand images
        of 224x224 pixels take 0.6 GB.
      preprocessing: an id of `evaluation_transform`, such as `Res256Crop224`; default: none if all
        images have the size `image_size`, else `bicubic-0.875`.
      image_size: pixels, H and W; default: the output of `preprocessing`, else the size of the data
        set's images if they share one, else 224; 224 also for larger images that are not square.
      data_dir: the directory of prepared data sets; default: as in `open_source`.
      classes: only these, as in `open_source`.
      strict: whether a damaged image is an error; if not, it is left out, as `ids` shows.
    Raises:
      DataError: as in `open_source`; a damaged image; an image size that does not fit.
      ValueError: an unknown preprocessing.
    """
    source = registry.open_source(name, split, data_dir=data_dir, classes=classes)
    size = image_size or _size(source, preprocessing)
    batches = pipeline.evaluation_batches(
        source,
        batch_size=min(_BATCH, n or len(source), len(source)),
        image_size=size,
        preprocessing=preprocessing,
        limit=n,
        strict=strict,
    )
    with contextlib.closing(batches):
        loaded: list[loading.EvaluationBatch] = list(batches)
    is_image = np.concatenate([batch.mask for batch in loaded])
    images = np.empty((int(is_image.sum()), size, size, source.channels), np.float32)
    row = 0
    for batch in loaded:
        part = batch.images[batch.mask]
        np.divide(part, np.float32(255), out=images[row : row + len(part)])
        row += len(part)
    labels, ids = (np.concatenate([batch[i] for batch in loaded])[is_image] for i in (1, 3))
    for words in spread.choice_flags(source, labels, spread.choice(source, n)).values():
        warnings.warn(f"{source.where()}: {words}", stacklevel=2)
    return ImageArrays(images, labels, ids, source.classes)


def _size(source: registry.Source, preprocessing: str | None) -> int:
    """Return the side of the images that a preprocessing returns, or of the source's own."""
    shape = source.image_shape or (_USUAL_SIZE, _USUAL_SIZE, source.channels)
    if shape[0] != shape[1] and min(shape[:2]) > _USUAL_SIZE:  # photographs of one size
        shape = (_USUAL_SIZE, _USUAL_SIZE, source.channels)
    if preprocessing is None:
        return shape[0]
    transform = preparing.evaluation_transform(preparing.resolve(preprocessing, shape[0]))
    return transform(np.zeros(shape, np.uint8)).shape[0]


class Prepared:
    """N images of a source, prepared for evaluation; an `evaluation.ImageSet`.

    `prepared[rows]` decodes the rows i[n] at each call: f32[n,H,W,C] in [0, 1]. `ids` int64[N] are
    the images' places in the split; `choice` names the rule that chose them (`spread.choice`).
    """

    def __init__(
        self,
        source: registry.Source,
        *,
        image_size: int,
        preprocessing: str,
        images: int = 0,
        places: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        """Take `images` of a source, spread over its classes (0: all), or those at given places.

        `preprocessing` is an id without placeholders.
        """
        self._prepared = loading.Evaluated(source, image_size, preprocessing)
        self.ids = np.asarray(spread.places(source, images) if places is None else places)
        self.choice = spread.choice(source, images) if places is None else None
        self.shape = (len(self.ids), *self._prepared.shape)
        self._pool = ThreadPoolExecutor(_THREADS)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Return the images of these rows, in this order."""
        places = self.ids[rows]
        if not len(places):
            return np.zeros((0, *self.shape[1:]), np.float32)
        read = self._pool.map(self._read, places.tolist())
        return np.stack([np.divide(image, np.float32(255), dtype=np.float32) for image in read])

    def _read(self, index: int) -> np.ndarray:
        ((image, _),) = self._prepared([index])
        assert image is not None, "strict"
        return image

    @functools.cached_property
    def _hashes(self) -> tuple[str, np.ndarray]:
        content, hashes = content_hashes(self._prepared.source, self.ids.tolist())
        identity = f"{content} {self._prepared.preprocessing} {self.shape}"
        shortened = [f"f{sha256[:8]}" for sha256 in hashes]
        return hashlib.sha256(identity.encode()).hexdigest(), np.array(shortened, str)

    def content_sha256(self) -> str:
        """Hash the images' bytes, labels and preprocessing, without decoding."""
        return self._hashes[0]

    def image_hashes(self) -> np.ndarray:
        """Hash the encoded bytes of each image separately, str[N]: f and 8 digits."""
        return self._hashes[1]

    def labels(self) -> np.ndarray:
        """Read i32[N] without decoding images."""
        source = self._prepared.source
        if source.labels is not None:
            return np.asarray(source.labels[self.ids], np.int32)
        parts = (self.ids[i : i + _READ].tolist() for i in range(0, len(self), _READ))
        return np.array([record.label for part in parts for record in source.read(part)], np.int32)
