"""Images of a source, prepared when they are read, so that any number needs little memory."""

import functools
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxrobust.data.source import Source, content_hashes
from jaxrobust.data.splits import spread
from jaxrobust.data.stream import loading

_READ = 256  # records at a time, where only their labels are wanted
_THREADS = min(8, os.cpu_count() or 1)  # decoding holds no lock


class Prepared:
    """N images of a source as an evaluation takes them, an `evaluation.ImageSet`.

    `prepared[which]` makes the images of the rows i[n] anew: f32[n,H,W,C] in [0, 1]. `ids` int64[N]
    are their places in the split, and `choice` names the rule that chose them (`spread.choice`).
    """

    def __init__(
        self,
        source: Source,
        *,
        image_size: int,
        preprocessing: str,
        images: int = 0,
        places: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        """Take `images` of a source, spread over its classes (0: all), or those at some places.

        `preprocessing` is a resolved id.
        """
        self._prepared = loading.Evaluated(source, image_size, preprocessing)
        self.ids = np.asarray(spread.places(source, images) if places is None else places)
        self.choice = spread.choice(source, images) if places is None else None
        self.shape = (len(self.ids), *self._prepared.shape)
        self._pool = ThreadPoolExecutor(_THREADS)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: Any) -> np.ndarray:
        """Return the images of these rows, in their order."""
        places = self.ids[which]
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
        content, each = content_hashes(self._prepared.source, self.ids.tolist())
        made = f"{content} {self._prepared.preprocessing} {self.shape}"
        shortened = [f"f{sha256[:8]}" for sha256 in each]
        return hashlib.sha256(made.encode()).hexdigest(), np.array(shortened, str)

    def content_sha256(self) -> str:
        """Hash the images' bytes, their labels and how they are prepared; nothing is decoded."""
        return self._hashes[0]

    def image_hashes(self) -> np.ndarray:
        """Hash the encoded bytes of each image by itself, str[N]: f and 8 digits."""
        return self._hashes[1]

    def labels(self) -> np.ndarray:
        """Read i32[N], for which no image is decoded."""
        known = self._prepared.source.labels
        if known is not None:
            return np.asarray(known[self.ids], np.int32)
        values: list[int] = []
        for start in range(0, len(self), _READ):
            part = self.ids[start : start + _READ].tolist()
            values += [record.label for record in self._prepared.source.read(part)]
        return np.array(values, np.int32)
