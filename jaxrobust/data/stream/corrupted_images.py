"""Images of a source, corrupted as they are read, and the photographs that frost needs."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.data.source import DataError, Record, Source
from jaxrobust.data.sources import cifar_c, registry
from jaxrobust.data.splits import storage
from jaxrobust.data.stream import loading
from jaxrobust.data.transforms import decoding
from jaxrobust.data.transforms.corruptions import SIDES, Corruption, corrupt, draws

_PHOTOGRAPHS = 5  # frost draws from the first five of a folder
_PICTURES = (".png", ".jpg", ".jpeg")


class Photographs(NamedTuple):
    """Pictures of frost, and the hash of their files."""

    pixels: tuple[np.ndarray, ...]  # uint8[H,W,3]
    sha256: str


def photographs(folder: str | os.PathLike, side: int) -> Photographs:
    """Read the first five pictures of a folder by name, for images of this side.

    For 32 pixels, every fifth pixel of each line is taken, as in the published files.
    """
    place = storage.place(folder)
    there = storage.entries(place)
    if there is None:
        raise DataError(f"the folder of frost photographs {place} does not exist; check --frost")
    names = [name for name in there.files if name.lower().endswith(_PICTURES)][:_PHOTOGRAPHS]
    if not names:
        raise DataError(
            f"{place} has no photographs of frost; copy the files frost1.png through "
            "frost5.jpg there, from hendrycks/robustness (ImageNet-C/create_c)"
        )
    digest, images = hashlib.sha256(), []
    for name in names:
        (data,) = storage.read_files([os.fspath(place / name)], "copy it again")
        digest.update(data)
        try:
            pixels = decoding.decode(data, channels=3)
        except ValueError as error:
            raise DataError(f"{place / name} is {error}; copy it again") from error
        pixels = pixels[2::5, 2::5] if side == SIDES[0] else pixels
        if min(pixels.shape[:2]) <= side:
            least = 5 * (side + 1) if side == SIDES[0] else side + 1
            small = f"{place / name} is too small for frost on images of {side} px"
            raise DataError(f"{small}; give photographs of at least {least} px")
        images.append(np.ascontiguousarray(pixels))
    return Photographs(tuple(images), digest.hexdigest())


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads records of a source, prepares their images and corrupts them; picklable."""

    prepared: loading.Evaluated
    corruption: Corruption
    seed: int
    photographs: tuple[np.ndarray, ...]

    def __call__(self, indices: Sequence[int]) -> list[Record]:
        records = []
        for index, (image, label) in zip(indices, self.prepared(indices), strict=True):
            assert image is not None, "strict"
            rng = draws(self.seed, self.corruption, index)
            changed = corrupt(image, self.corruption, rng, photographs=self.photographs)
            records.append(Record(decoding.encode(changed), label))
        return records


def each(
    source: Source,
    wished: Sequence[Corruption],
    *,
    image_size: int,
    preprocessing: str,
    seed: int,
    frost: Photographs | None = None,
    num_classes: int | None = None,
    classes: str | None = None,
) -> dict[str, Source]:
    """Open the images of a source under each corruption, as a map from its name.

    Published files are used where they exist, and `num_classes` and `classes` select from them as
    from any source. Other corruptions are computed, with draws from a seed.
    """
    if source.name.startswith(cifar_c.PREFIX):
        return {
            str(one): registry.open_source(
                source.name, str(one), classes=classes, num_classes=num_classes
            )
            for one in wished
        }
    settings: dict[str, Any] = {"image_size": image_size, "preprocessing": preprocessing}
    settings |= {"seed": seed, "frost": frost}
    return {str(one): corrupted(source, one, **settings) for one in wished}


def corrupted(
    source: Source,
    corruption: Corruption,
    *,
    image_size: int,
    preprocessing: str,
    seed: int,
    frost: Photographs | None = None,
) -> Source:
    """Return the images of a source, prepared for evaluation and then corrupted."""
    if image_size not in SIDES or source.channels != 3:
        raise DataError(
            f"corruptions are defined for color images of 32 or 224 px, not {image_size} px with "
            f"{source.channels} channels; give --image_size 32 or 224, or other data"
        )
    if corruption.kind == "frost" and frost is None:
        raise DataError(
            "the corruption frost needs photographs; give --frost FOLDER with frost1.png to "
            "frost5.jpg from hendrycks/robustness (ImageNet-C/create_c), or name other corruptions"
        )
    prepared = loading.Evaluated(source, image_size, preprocessing)
    pixels = frost.pixels if frost and corruption.kind == "frost" else ()
    reader = _Reader(prepared, corruption, seed, pixels)
    return dataclasses.replace(source, read=reader, image_shape=prepared.shape)
