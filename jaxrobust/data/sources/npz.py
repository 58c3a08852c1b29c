"""Arrays in a NumPy file: `npz:PATH`, as published by Keras and MedMNIST or saved by `np.savez`.

Each decoding process reads the images of a split when it needs the first one, and keeps them in
memory. Nothing in the file is unpickled.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NamedTuple, cast

import numpy as np

from jaxrobust.data.source import DataError, Record, Source
from jaxrobust.data.sources import plausibility
from jaxrobust.data.splits import choosing, grammar, storage, subsets
from jaxrobust.data.transforms import decoding

PREFIX = "npz:"
_SPLITS = ("train", "val", "validation", "test")
# Keys of images and labels, as in MedMNIST, Keras, Keras users' files, and files with one split.
_KEYS = (("{}_images", "{}_labels"), ("x_{}", "y_{}"), ("X_{}", "y_{}"))
WHOLE = (("images", "labels"), ("x", "y"), ("X", "y"), ("image", "label"))
_OVERSHOOT = 0.01  # how far resampling may take pixels outside [0, 1]
_CLASSES = ("classes", "class_names", "label_names")
REMEDY = "copy the file again"
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, NotImplementedError)


class ArrayFile(NamedTuple):
    """The arrays in a file: name -> (shape, dtype), and name -> CRC of its bytes."""

    path: str
    arrays: dict[str, tuple[tuple[int, ...], np.dtype]]
    sums: dict[str, int]


@dataclasses.dataclass(frozen=True)
class ArrayRecords:
    """Reads records of an array of images; picklable, calls `array` at first use."""

    array: Callable[[], np.ndarray]
    labels: np.ndarray
    word: str  # how messages call a record's place
    place: str
    first: int = 0  # row of the array

    def __call__(self, indices: Sequence[int]) -> list[Record]:
        """Read the records at these places."""
        images, first = self.array(), self.first
        return [Record(decoding.encode(images[first + i]), int(self.labels[i])) for i in indices]

    def describe(self, index: int) -> str:
        """Name a record for messages: its file and place."""
        return f"{self.word} {self.first + index} of {self.place}"


def open_npz(name: str, split: str, choice: subsets.SubsetChoice) -> Source:
    """Open the split `split` of `npz:PATH`.

    The images uint8[N,H,W] (gray) or uint8[N,H,W,1 or 3] and the labels int[N] or int[N,1] of a
    split such as train are train_images and train_labels, or x_train and y_train. The bare names
    images and labels, or image and label, mean the only split `all`. Class names are in `classes`,
    `class_names` or `label_names`; without them, the largest label determines their number. A list
    of ids names images by index, from 0.
    """
    file = opened(name)
    splits = _splits_of(file)
    sizes = {key: file.arrays[images][0][0] for key, (images, _) in splits.items()}
    parsed, part = grammar.find(name, split, sizes)
    images, labels_key = splits[part]
    shape = image_shape(file, images)
    names = _class_names(file)
    all_labels = {key: _labels(file, i, key) for i, key in set(splits.values())}
    largest = max(int(values.max()) for values in all_labels.values())
    if names and largest >= len(names):
        raise DataError(
            f"{file.path}: {labels_key} go up to {largest}, but the file names {len(names)} classes"
        )
    # The checksum makes sure that a replaced file is read again.
    array = functools.partial(_array, file.path, images, file.sums[images])
    labels = all_labels[labels_key]
    where = f"data set {name!r}, split {parsed.name!r}"
    trained = all_labels[splits["train"][1]] if "train" in splits else labels
    reader = ArrayRecords(array, labels, "image", f"{images} in {file.path}")
    identity = ([file.sums[key] for key in (images, labels_key)], shape, names)
    source = Source(
        name=name,
        split=parsed.name,
        size=len(labels),
        num_classes=len(names) or largest + 1,
        channels=shape[2],
        image_shape=shape,
        read=reader,
        remedy=REMEDY,
        classes=names,
        describe=reader.describe,
        files_sha256=hashlib.sha256(repr(identity).encode()).hexdigest(),
        labels=labels,
        notes=plausibility.foreign(labels, trained, names, where),
    )
    sha256 = source.files_sha256  # applies with ids too, since they are places and not file names
    places = map(str, range(len(labels)))
    source = choosing.choose(source, parsed, split, choice, lambda: (labels, places))
    # Reads the images; the checksum then reveals a damaged file.
    dark = plausibility.of_pixels(int(array().max()), len(labels), where)
    sha256 = source.files_sha256 or sha256
    return dataclasses.replace(source, files_sha256=sha256, notes=(*source.notes, *dark))


def only_split(name: str) -> str | None:
    """Return the split of a file that has a single one, else None."""
    first, *others = _splits_of(opened(name))
    return None if others else first


@contextlib.contextmanager
def parsing(path: str, ending: str, remedy: str) -> Iterator[None]:
    """Turn NumPy's error about a damaged file, or one in another format, into a DataError."""
    try:
        yield
    except DataError:
        raise
    except _DAMAGED as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path} is damaged, or not a {ending} file ({reason}); {remedy}"
        ) from error


def opened(name: str) -> ArrayFile:
    """Read the names, shapes and types of a file's arrays; raise `DataError` if it is truncated."""
    path = os.fspath(storage.place(name.removeprefix(PREFIX)))
    file = ArrayFile(path, {}, {})
    with storage.reading(path):
        if not storage.place(path).exists():
            raise DataError(f"data set {name!r}: {path} does not exist; check the path")
        with parsing(path, ".npz", REMEDY), zipfile.ZipFile(_content(path)) as members:
            for member in members.infolist():
                key = member.filename.removesuffix(".npy")
                with members.open(member) as array:
                    file.arrays[key] = read_header(array)
                file.sums[key] = member.CRC
    return file


def read_header(file: IO[bytes], *, in_rows: bool = False) -> tuple[tuple[int, ...], np.dtype]:
    """Read the shape and type that precede an array; `in_rows` rejects Fortran order."""
    stream = cast(Any, file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[np.lib.format.read_magic(stream)]
    shape, is_fortran, dtype = read(stream)
    if in_rows and is_fortran:
        raise ValueError("its array is in Fortran order")
    return shape, dtype


def _content(path: str) -> Any:
    """Prepare a file for NumPy and zipfile: its path, or its bytes if it is in a bucket."""
    return io.BytesIO(storage.place(path).read_bytes()) if storage.is_remote(path) else path


@functools.lru_cache(maxsize=3)  # train, selection and test
def _array(path: str, key: str, crc: int) -> np.ndarray:
    del crc  # part of the cache key only: detects replaced files
    with parsing(path, ".npz", REMEDY), np.load(_content(path), allow_pickle=False) as arrays:
        return arrays[key]


def _splits_of(file: ArrayFile) -> dict[str, tuple[str, str]]:
    """Return split -> the keys of its images and labels."""
    splits: dict[str, tuple[str, str]] = {}
    wanted = [(s, (i.format(s), y.format(s))) for s in _SPLITS for i, y in _KEYS]
    unlabelled = ""
    for split, (images, labels) in [*wanted, *(("all", keys) for keys in WHOLE)]:
        if images in file.arrays and labels in file.arrays:
            splits.setdefault(split, (images, labels))
        elif images in file.arrays:
            unlabelled = unlabelled or f"{file.path} has {images}, but no {labels}"
    if len(splits) > 1:
        splits.pop("all", None)
    if not splits:
        keys = ", ".join(file.arrays) or "nothing"
        raise DataError(
            f"{unlabelled or f'{file.path} holds {keys}'}; write images and labels with "
            "np.savez(PATH, train_images=..., train_labels=..., test_images=..., test_labels=...)"
        )
    return splits


def image_shape(file: ArrayFile, key: str) -> tuple[int, int, int]:
    """Return H, W and channels of an array's images; raise `DataError` unless they are images."""
    shape, dtype = file.arrays[key]
    problem = f"{file.path}: {key} is {dtype}{list(shape)}, not uint8[N,H,W] or uint8[N,H,W,1 or 3]"
    if dtype != np.uint8:
        raise DataError(f"{problem}; write {_as_uint8(file, key, dtype)}")
    if len(shape) == 4 and shape[3] not in (1, 3) and shape[1] in (1, 3):
        raise DataError(f"{problem}; write {key}.transpose(0, 2, 3, 1)")
    if not (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))) or 0 in shape:
        raise DataError(f"{problem}; write the images in one of these shapes")
    return shape[1], shape[2], shape[3] if len(shape) == 4 else 1


def _as_uint8(file: ArrayFile, key: str, dtype: np.dtype) -> str:
    """Say how to convert pixels of another type to uint8, judged by their range."""
    usual = "pixels from 0 to 255 as uint8"
    if dtype.kind not in "fiub":
        return usual
    if dtype.kind == "b":
        return f"255 * {key}.astype('uint8')"
    pixels = _array.__wrapped__(file.path, key, file.sums[key])
    if not pixels.size:
        return usual
    low, high = float(pixels.min()), float(pixels.max())
    if dtype.kind == "f" and low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT:
        inside = key if low >= 0 and high <= 1 else f"np.clip({key}, 0, 1)"
        return f"np.round(255 * {inside}).astype('uint8'), as they are in [0, 1]"
    if dtype.kind == "f" and -1 <= low < 0 and high <= 1:
        return (
            f"np.round(127.5 * ({key} + 1)).astype('uint8') if they are in [-1, 1], or undo their "
            "normalization"
        )
    if low >= 0 and high <= 255:
        rounded = f"np.round({key})" if dtype.kind == "f" else key
        return f"{usual}, here {rounded}.astype('uint8')"
    if low >= 0 and high <= 65535 and dtype.kind in "iu":
        return f"{usual}, np.round({key} / 257).astype('uint8') if they have 16 bits"
    return f"{usual}, after undoing their scaling to {low:.3g} to {high:.3g}"


def _labels(file: ArrayFile, images: str, key: str) -> np.ndarray:
    shape, dtype = file.arrays[key]
    count = file.arrays[images][0][0]
    if shape not in ((count,), (count, 1)) or dtype.kind not in "iu" or not count:
        one_hot = len(shape) == 2 and shape[1] > 1 and dtype.kind in "fiub"
        numbers = f"{key}.argmax(1) for one-hot labels" if one_hot else f"{key}.astype('int64')"
        instead = f", such as {numbers}" if one_hot or dtype.kind == "f" else ""
        raise DataError(
            f"{file.path}: {key} is {dtype}{list(shape)}, not one integer for each of the {count} "
            f"images of {images}; write class numbers starting at 0{instead}"
        )
    values = _array.__wrapped__(file.path, key, file.sums[key]).reshape(count)
    if values.min() < 0:
        raise DataError(f"{file.path}: {key} holds {values.min()}; labels start at 0")
    return values.astype(np.int32)


def _class_names(file: ArrayFile) -> tuple[str, ...]:
    for key in _CLASSES:
        shape, dtype = file.arrays.get(key, ((), np.dtype("V")))
        if len(shape) == 1 and dtype.kind in "US":
            values = _array.__wrapped__(file.path, key, file.sums[key])
            return tuple(v.decode() if isinstance(v, bytes) else str(v) for v in values.tolist())
    return ()
