"""What every kind of data set provides: records of encoded bytes and a label, by index."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

_READ = 64  # records hashed at a time


class DataError(ValueError):
    """A data set is missing, damaged or not what was requested; the message says what to do."""


class Record(NamedTuple):
    """One example: `image`, the encoded bytes (JPEG, PNG, ...), and `label` in [0, num_classes).

    The label is a `SoftLabel` if the source has class probabilities.
    """

    image: bytes
    label: int


class SoftLabel(int):
    """A label, the most likely class, that also holds the `probabilities` f32[C] of all classes."""

    probabilities: np.ndarray

    @classmethod
    def of(cls, probabilities: np.ndarray) -> "SoftLabel":
        """Make a label from probabilities f32[C]."""
        label = cls(probabilities.argmax())
        label.probabilities = probabilities
        return label


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set; `source[i]` and `source.read(indices)` accept any order.

    Attributes:
      name, split: as requested.
      size: number of records.
      num_classes: number of classes.
      channels: 1 (gray) or 3 (RGB).
      image_shape: (H, W, channels) if all images share it, else None.
      read: indices in [0, size) -> records; picklable; raises DataError on a damaged record.
      remedy: what to do about damaged data; ends every message about it.
      classes: the class names in the order of labels; empty if they have no names.
      describe: index -> how a message refers to that record, with its file's name if any.
      ids_sha256: hash of the list of ids that selected the records, if there was one.
      labels: int32[size], if known without reading the records.
      split_counts: int64[num_classes], images per class of the full split, if this is a part of it
        and the split's labels are known.
      files_sha256: identifies the records, except for their content: a hash of the file names or of
        a prepared data set's description. None if the name or `ids_sha256` identifies them.
      held: whether decoded images may stay in memory; False for sources with too many.
      soft: whether labels are `SoftLabel`s.
      grey_as_rgb: whether its gray images may be read as RGB, as torchvision reads files.
      notes: warnings for the user about likely mistakes.
    """

    name: str
    split: str
    size: int
    num_classes: int
    channels: int
    image_shape: tuple[int, int, int] | None
    read: Callable[[Sequence[int]], list[Record]] = dataclasses.field(repr=False)
    remedy: str = dataclasses.field(default="prepare the data set again", repr=False)
    classes: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    describe: Callable[[int], str] = dataclasses.field(default="record {}".format, repr=False)
    ids_sha256: str | None = None
    files_sha256: str | None = None
    labels: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    split_counts: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    held: bool = dataclasses.field(default=True, repr=False)
    soft: bool = dataclasses.field(default=False, repr=False)
    grey_as_rgb: bool = dataclasses.field(default=False, repr=False)
    notes: tuple[str, ...] = dataclasses.field(default=(), repr=False, compare=False)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self.size:
            raise IndexError(f"{self.where()} has records 0 to {self.size - 1}, not {index}")
        return self.read([int(index)])[0]

    def where(self) -> str:
        """Name this split for messages."""
        return f"data set {self.name!r}, split {self.split!r}"

    def for_channels(self, channels: int | None) -> "Source":
        """Read gray image files as RGB if the network takes colors; else return the source."""
        if not (self.grey_as_rgb and self.channels == 1 and channels == 3):
            return self
        shape = self.image_shape and (*self.image_shape[:2], channels)
        return dataclasses.replace(self, channels=channels, image_shape=shape)


def content_sha256(source: Source, places: Sequence[int]) -> str:
    """Hash the encoded bytes and labels of the records at some places, in that order."""
    return content_hashes(source, places)[0]


def content_hashes(source: Source, places: Sequence[int]) -> tuple[str, list[str]]:
    """Hash records as `content_sha256` does, and also each record's encoded bytes separately."""
    digest, hashes = hashlib.sha256(), []
    for start in range(0, len(places), _READ):
        for record in source.read(places[start : start + _READ]):
            digest.update(f"{record.label} {len(record.image)} ".encode())
            digest.update(record.image)
            hashes.append(hashlib.sha256(record.image).hexdigest())
    return digest.hexdigest(), hashes


def first_few(names: Sequence[str]) -> str:
    """Return `a, b, c, d, e, ... (17)`: the first names and the total count."""
    return f"{', '.join(names[:5])}{', ...' * (len(names) > 5)} ({len(names)})"


class SourceKind(NamedTuple):
    """A kind of data set, recognized by the names that `open_source` accepts.

    `open(name, split, choice) -> Source`; `choice` is a `subsets.SubsetChoice`.
    """

    name: str  # the part before the colon
    written: str  # how messages and --help write it
    help: str  # a short description for lists
    open: Callable[..., Source] | str  # or its entry point, "module:function"
    pattern: str = ""  # of the full name; default: the name, a colon and anything
    is_path: bool = False  # whether a path follows the colon
    contents: bool = False  # whether records are hashed where nothing else identifies them

    def takes(self, name: str) -> bool:
        """Match the name of a data set with the pattern of this kind."""
        return bool(re.fullmatch(self.pattern or rf"{re.escape(self.name)}:.+", name, re.DOTALL))


_SOURCES = "jaxrobust.data.sources"
_KINDS = (
    SourceKind(
        *("cifar10-c", "cifar10-c:DIR", "the files of CIFAR-10-C"),
        f"{_SOURCES}.cifar_c:open_cifar_c",
        is_path=True,
        contents=True,
    ),
    SourceKind(
        *("fake", "fake[:HxWxC[:CLASSES]]", "learnable synthetic images"),
        f"{_SOURCES}.fake:open_fake",
        pattern=r"fake(?::([1-9]\d*)x([1-9]\d*)x([13])(?::([1-9]\d*))?)?",
    ),
    SourceKind(
        *("generated", "generated:DIR", "shards of generated images"),
        f"{_SOURCES}.generated:open_generated",
        is_path=True,
    ),
    SourceKind(
        *("hf", "hf:NAME", "a Hugging Face data set, or hf:FOLDER with its parquet files"),
        f"{_SOURCES}.huggingface:open_hf",
    ),
    SourceKind(
        *("folder", "folder:PATH", "an ImageFolder: image files in one folder per class"),
        f"{_SOURCES}.image_folder:open_folder",
        is_path=True,
    ),
    SourceKind(
        *("npz", "npz:PATH", "a file of arrays"),
        f"{_SOURCES}.npz:open_npz",
        is_path=True,
        contents=True,
    ),
)
KINDS = {kind.name: kind for kind in _KINDS}


def kind_of(name: Any) -> SourceKind | None:
    """Return the kind of a data set; None if it is a prepared one or the name is invalid."""
    return next((kind for kind in KINDS.values() if kind.takes(str(name))), None)
