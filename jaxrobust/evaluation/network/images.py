"""Images that an evaluation reads lazily, a few at a time."""

import hashlib
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np

from jaxrobust.evaluation.network import checks
from jaxrobust.runtime.processes import hosts

_PART = 32  # images in memory during a pass over all


@runtime_checkable
class ImageSet(Protocol):
    """N images in [0, 1], which need not be in memory; an array f32[N,H,W,C] qualifies."""

    @property
    def shape(self) -> tuple[int, ...]:
        """N, H, W, C."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> np.ndarray:
        """Return f32[n,H,W,C] for places i[n], in their order."""


class ClippedPixels(TypedDict):
    """The pixels up to `checks.OVERSHOOT` outside [0, 1], which were clipped."""

    images: int
    pixels: int
    largest: float  # distance from [0, 1]


def clipped(images: np.ndarray) -> tuple[np.ndarray, ClippedPixels | None]:
    """Clip checked images f[N,H,W,C] to [0, 1], and summarize the clipped pixels, or None."""
    if not images.size or (images.min() >= 0 and images.max() <= 1):
        return images, None
    outside = (images < 0) | (images > 1)
    values = images[outside].astype(np.float64)
    pixels: ClippedPixels = {
        "images": int(outside.any(axis=(1, 2, 3)).sum()),
        "pixels": len(values),
        "largest": float(np.maximum(-values, values - 1).max()),
    }
    return np.clip(images, 0, 1), pixels


class InRange:
    """An image set that checks and clips the images of another as they are read."""

    def __init__(self, images: ImageSet) -> None:
        self._images, self.shape = images, tuple(images.shape)
        self._clipped: dict[int, ClippedPixels] = {}
        for name in ("content_sha256", "image_hashes"):
            if hasattr(images, name):
                setattr(self, name, getattr(images, name))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Read images; raise `ValueError` if one is too far outside [0, 1] to be clipped."""
        read = np.asarray(self._images[index])
        if not read.size or (read.min() >= 0 and read.max() <= 1):
            return read
        rows = read.reshape(-1, *self.shape[1:])
        checks.check_range(rows)
        places = np.atleast_1d(np.arange(len(self))[index]).tolist()
        for place, row in zip(places, rows, strict=True):
            if overshot := clipped(row[None])[1]:
                self._clipped[place] = overshot
        return np.asarray(np.clip(read, 0, 1))

    def overshot(self) -> ClippedPixels | None:
        """Summarize the clipped pixels of all processes; None if there are none."""
        images: dict[int, ClippedPixels] = {}
        for part in hosts.everyone(self._clipped):
            images |= part
        if not images:
            return None
        pixels = sum(image["pixels"] for image in images.values())
        largest = max(image["largest"] for image in images.values())
        return {"images": len(images), "pixels": pixels, "largest": largest}


class Adversarial:
    """An `ImageSet` of adversarial images from the ledger, or of the image itself."""

    def __init__(self, images: ImageSet, book: Any, fooled_by: np.ndarray) -> None:
        self._images, self._book, self._fooled_by = images, book, fooled_by
        self.shape = tuple(images.shape)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Any) -> np.ndarray:
        places = np.arange(len(self))[index]
        images = np.array(self._images[np.atleast_1d(places)])
        for row, place in enumerate(np.atleast_1d(places).tolist()):
            attack = str(self._fooled_by[place])
            if attack not in ("", "clean"):
                images[row] = self._book.adversarial(place, attack, self.shape[1:])
        return images if np.ndim(places) else images[0]


class Subset:
    """An image set of some images of another."""

    def __init__(self, images: ImageSet, places: np.ndarray) -> None:
        self._images, self._places = images, places
        self.shape = (len(places), *images.shape[1:])

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._images[self._places[index]]

    def content_sha256(self) -> str:
        """Hash the content of these images, for `hashes`."""
        content = f"{hashed(self._images)} {self._places.tolist()}"
        return hashlib.sha256(content.encode()).hexdigest()

    def image_hashes(self) -> np.ndarray:
        """Hash each of these images separately, as `hashes` does."""
        return np.asarray(hashes(self._images)[1][self._places])


def hashed(images: ImageSet, *arrays: np.ndarray) -> str:
    """Hash images and arrays together, as `hashes` does."""
    return hashes(images, *arrays)[0]


def hashes(images: ImageSet, *arrays: np.ndarray) -> tuple[str, np.ndarray]:
    """Hash type, shape and bytes of images f32[N,H,W,C] and arrays; also each image, str[N].

    An image set's `content_sha256()` replaces its bytes. It hashes the images' sources, such as the
    bytes of their files, and their preparation, so none needs decoding. The hash of an image is p
    (pixels) and 8 digits, or from `image_hashes()`: f (files) and 8 digits. For an image set with
    only `content_sha256()` it is "".
    """
    digest, image_hashes = hashlib.sha256(), list[str]()
    digest.update(f"float32 {tuple(images.shape)}".encode())
    if content := getattr(images, "content_sha256", None):
        digest.update(content().encode())
        by_files = getattr(images, "image_hashes", None)
        image_hashes = by_files().tolist() if by_files else [""] * len(images)
    else:
        for start in range(0, len(images), _PART):
            part = images[np.arange(start, min(start + _PART, len(images)))]
            rows = np.ascontiguousarray(part, np.float32).reshape(len(part), -1).view(np.uint8)
            digest.update(rows.reshape(-1).data)
            image_hashes += [f"p{hashlib.sha256(row.data).hexdigest()[:8]}" for row in rows]
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest(), np.array(image_hashes, str)
