"""The published files of CIFAR-10-C: `cifar10-c:DIR` with one array per corruption.

DIR holds labels.npy and KIND.npy, uint8[50000,32,32,3], whose first 10,000 images have severity 1
and last 10,000 severity 5. The splits are `fog-1` to `fog-5` and so on. The arrays stay on disk;
only the requested rows are read.
"""

import functools
import hashlib
import io
import zlib

import numpy as np

from jaxrobust.data.source import DataError, Source
from jaxrobust.data.sources.npz import ArrayRecords, parsing
from jaxrobust.data.splits import choosing, grammar, storage, subsets
from jaxrobust.data.transforms import corruptions

PREFIX = "cifar10-c:"
_IMAGES = 10_000  # per severity
_TOTAL = _IMAGES * len(corruptions.SEVERITIES)
_SHAPE = (32, 32, 3)
_REMEDY = "download CIFAR-10-C again (zenodo.org/records/2535967) and unpack it"
_CLASSES: tuple[str, ...] = ("airplane", "automobile", "bird", "cat", "deer")
_CLASSES += ("dog", "frog", "horse", "ship", "truck")


def open_cifar_c(name: str, split: str, choice: subsets.SubsetChoice) -> Source:
    """Return one corruption at one severity of `cifar10-c:DIR`, such as `fog-3[:1000]`."""
    folder = storage.place(name.removeprefix(PREFIX))
    listed = storage.entries(folder)
    if listed is None:
        raise DataError(f"data set {name!r}: there is no folder {folder}; check the path")
    parsed = grammar.parse(split)
    fault = f"data set {name!r} has no split {split!r}"
    if not parsed or "-" not in parsed.name or parsed.name.startswith("all") or "," in parsed.name:
        raise DataError(
            f"{fault}: name one corruption and severity, such as fog-3 or fog-3[:1000]; for all of "
            "them, use --corruptions all"
        )
    try:
        ((kind, severity),) = corruptions.chosen(parsed.name)
    except DataError as error:
        raise DataError(f"{fault}: {error}") from error
    for file in (f"{kind}.npy", "labels.npy"):
        if file not in listed.files:
            raise DataError(f"data set {name!r} has no {file} in {folder}; {_REMEDY}")
    path, labels_path = f"{folder}/{kind}.npy", f"{folder}/labels.npy"
    array = functools.partial(_array, path, storage.version(path))
    images, labels = array(), _array(labels_path, storage.version(labels_path))
    if images.shape != (_TOTAL, *_SHAPE) or images.dtype != np.uint8:
        raise DataError(
            f"{path} is {images.dtype}{list(images.shape)}, not "
            f"uint8{[_TOTAL, *_SHAPE]}, five severities of {_IMAGES} images; {_REMEDY}"
        )
    if labels.shape not in ((_IMAGES,), (_TOTAL,)) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{labels_path} is {labels.dtype}{list(labels.shape)}, not the {_IMAGES} or {_TOTAL} "
            f"labels of CIFAR-10-C; {_REMEDY}"
        )
    first = (severity - 1) * _IMAGES
    if len(labels) == _TOTAL:
        labels = labels[first : first + _IMAGES]
    if labels.min() < 0 or labels.max() >= len(_CLASSES):
        raise DataError(f"{labels_path} holds labels outside 0 to 9; {_REMEDY}")
    labels = np.array(labels, np.int32)
    sums = [zlib.crc32(part.tobytes()) for part in (images[first : first + _IMAGES], labels)]
    reader = ArrayRecords(array, labels, "row", path, first)
    source = Source(
        name=name,
        split=parsed.name,
        size=_IMAGES,
        num_classes=len(_CLASSES),
        channels=3,
        image_shape=_SHAPE,
        read=reader,
        remedy=_REMEDY,
        classes=_CLASSES,
        describe=reader.describe,
        files_sha256=hashlib.sha256(repr(sums).encode()).hexdigest(),
        labels=labels,
    )
    return choosing.choose(source, parsed, split, choice, lambda: (labels, None))


@functools.lru_cache(maxsize=3)  # one corruption and the labels at a time
def _array(path: str, version: str) -> np.ndarray:
    del version  # part of the cache key only: distinguishes files of the same name
    with storage.reading(path), parsing(path, ".npy", _REMEDY):
        if storage.is_remote(path):
            (content,) = storage.read_files([path], _REMEDY)
            return np.load(io.BytesIO(content), allow_pickle=False)
        return np.load(path, mmap_mode="r", allow_pickle=False)
