"""Images of a source, prepared when they are asked for, so that any number of them needs little
memory.
"""

import functools
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxrobust.data.source import Source, content_sha256
from jaxrobust.data.stream import loading
from jaxrobust.data.transforms import preparing

_READ = 256  # records at a time, where only their labels are wanted
_THREADS = min(8, os.cpu_count() or 1)  # decoding holds no lock


class Prepared:
    """The first N images of a source as an evaluation takes them, an `evaluation.ImageSet`.

    `prepared[which]` makes the images at places i[n] anew: f32[n,H,W,C] in [0, 1].
    """

    def __init__(self, source: Source, *, image_size: int, preprocessing: str, images: int) -> None:
        """Take the first `images` of a source; `preprocessing` is a resolved id."""
        self.shape = (images, image_size, image_size, source.channels)
        self._images = loading.Images(source, 0, strict=True)
        self._transform = preparing.evaluation_transform(preprocessing)
        self._preprocessing = preprocessing
        self._pool = ThreadPoolExecutor(_THREADS)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: Any) -> np.ndarray:
        """Return the images at these places, in their order."""
        places = np.arange(len(self))[which]
        if not len(places):
            return np.zeros((0, *self.shape[1:]), np.float32)
        read = self._pool.map(self._read, places.tolist())
        return np.stack([np.divide(image, np.float32(255), dtype=np.float32) for image in read])

    def _read(self, index: int) -> np.ndarray:
        ((image, _),) = self._images([index])
        assert image is not None, "strict"
        return loading.prepare(
            image, index, self._images, self._transform, self._preprocessing, self.shape[1:]
        )

    @functools.cached_property
    def _content_sha256(self) -> str:
        source = self._images.source
        made = f"{content_sha256(source, len(self))} {self._preprocessing} {self.shape}"
        return hashlib.sha256(made.encode()).hexdigest()

    def content_sha256(self) -> str:
        """Hash the images' bytes, their labels and how they are prepared; nothing is decoded."""
        return self._content_sha256

    def labels(self) -> np.ndarray:
        """Return i32[N], for which no image is decoded."""
        known = self._images.source.labels
        if known is not None:
            return np.asarray(known[: len(self)], np.int32)
        return np.fromiter(self._labels(), np.int32, len(self))

    def _labels(self) -> Iterator[int]:
        for start in range(0, len(self), _READ):
            part = range(start, min(start + _READ, len(self)))
            yield from (record.label for record in self._images.source.read(part))
