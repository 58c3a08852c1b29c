"""Photographs as they are resized where no PIL is: as arrays, without antialiasing."""

import re

import numpy as np

from jaxrobust.data import Source
from jaxrobust.data.stream.loading import DecodedImages

_IMAGES = 200  # at most: fewer cannot tell a loss of 10 points from chance


def resized(
    source: Source,
    places: np.ndarray,
    *,
    preprocessing: str,
    image_size: int,
    at_most: int = _IMAGES,
) -> np.ndarray | None:
    """Resize the first of the images at some places, f32[M,H,W,C] in [0, 1]; None: the
    preprocessing resizes nothing.
    """
    numbers = [int(text) for text in re.findall(r"\d+", preprocessing)]
    if preprocessing == "none" or preprocessing.startswith("Crop") or not numbers:
        return None
    share, squashes = numbers[0], len(numbers) == 1
    arrays = []
    for image, _ in DecodedImages(source, 0, True)(places[:at_most].tolist()):
        assert image is not None, "strict"
        sides = image.shape[:2]
        rows, columns = (share if squashes else int(share * s / min(sides)) for s in sides)
        arrays.append(bilinear(image, rows, columns, image_size))
    return np.stack(arrays) / np.float32(255)


def bilinear(image: np.ndarray, rows: int, columns: int, crop: int) -> np.ndarray:
    """Return the central `crop` x `crop` pixels of an image resized to (rows, columns), f32.

    Source: PyTorch's `interpolate(mode="bilinear", align_corners=False)`, without antialiasing.
    """
    pixels = image.astype(np.float32)
    for axis, length in enumerate((rows, columns)):
        low, high, share = _between(image.shape[axis], length, crop)
        weight = share[:, None, None] if axis == 0 else share[None, :, None]
        pixels = pixels.take(low, axis) * (1 - weight) + pixels.take(high, axis) * weight
    return pixels


def _between(size: int, resized: int, crop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the neighbours of the central pixels along one side, and the share of the second."""
    first = round((resized - crop) / 2)
    at = (np.arange(first, first + crop) + 0.5) * (size / resized) - 0.5
    at = np.clip(at, 0, size - 1)
    low = np.floor(at).astype(int)
    return low, np.minimum(low + 1, size - 1), (at - low).astype(np.float32)
