"""A split as arrays in memory, for notebooks and for whoever brings a network of his own."""

import contextlib
import os
import warnings
from typing import NamedTuple

import numpy as np

from jaxrobust.data.sources import registry
from jaxrobust.data.splits import spread
from jaxrobust.data.stream import loading, pipeline
from jaxrobust.data.transforms import preparing

_BATCH = 256
_USUAL_SIZE = 224  # of photographs, where nothing says another one


class ImageArrays(NamedTuple):
    """Images and what belongs to them.

    Attributes:
      images: f32[N,H,W,C] in [0, 1]; RGB, or grey with C=1.
      labels: i32[N].
      ids: i32[N], the numbers of the images in their split: `image_ids` of `autoattack`.
      classes: the classes' names in the order of labels; empty where they have none.
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
    """Return images of a split as arrays, in the order of the split, prepared for evaluation.

    >>> from jaxrobust import data
    >>> digits = data.load("digits", split="test", n=100)
    >>> digits.images.shape, digits.images.dtype, float(digits.images.max())
    ((100, 8, 8, 1), dtype('float32'), 1.0)
    >>> digits.labels[:3], digits.ids[:3]
    (array([3, 1, 4], dtype=int32), array([2, 4, 6], dtype=int32))

    Args:
      name: `cifar10`, `folder:PATH`, `npz:PATH`, `hf:NAME`, ...: as in `open_source`.
      split: `test`, `train[:10%]`, `val@robustbench`, ...: as in `open_source`.
      n: so many images, spread over the classes by a rule that is always the same; default: all. A
        thousand images of 224x224 pixels need 0.6 GB.
      preprocessing: an id of `evaluation_transform`, such as `Res256Crop224`; default: none where
        all images have the size `image_size`, else `bicubic-0.875`.
      image_size: pixels, H and W; default: what `preprocessing` gives, else that of the data set's
        images where they have one, else 224; so of larger ones that are not squares.
      data_dir: the directory of prepared data sets; default: as in `open_source`.
      classes: only these, as in `open_source`.
      strict: whether a damaged image is an error; else it is left out, which `ids` shows.
    Raises:
      DataError: as in `open_source`; a damaged image; an image size that does not fit.
      ValueError: not a preprocessing.
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
    kept = np.concatenate([batch.mask for batch in loaded])
    images = np.empty((int(kept.sum()), size, size, source.channels), np.float32)
    row = 0
    for batch in loaded:
        part = batch.images[batch.mask]
        np.divide(part, np.float32(255), out=images[row : row + len(part)])
        row += len(part)
    labels, ids = (np.concatenate([batch[i] for batch in loaded])[kept] for i in (1, 3))
    for words in spread.choice_flags(source, labels, spread.choice(source, n)).values():
        warnings.warn(f"{source.where()}: {words}", stacklevel=2)
    return ImageArrays(images, labels, ids, source.classes)


def _size(source: registry.Source, preprocessing: str | None) -> int:
    """Return the side of the images that a preprocessing gives, or that they have."""
    shape = source.image_shape or (_USUAL_SIZE, _USUAL_SIZE, source.channels)
    if shape[0] != shape[1] and min(shape[:2]) > _USUAL_SIZE:  # photographs of one format
        shape = (_USUAL_SIZE, _USUAL_SIZE, source.channels)
    if preprocessing is None:
        return shape[0]
    transform = preparing.evaluation_transform(preparing.resolve(preprocessing, shape[0]))
    return transform(np.zeros(shape, np.uint8)).shape[0]
