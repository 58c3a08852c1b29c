"""What every kind of data set gives: records of encoded bytes and a label, with random access."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

_READ = 64  # records at a time, to hash them


class DataError(ValueError):
    """A data set that is missing, damaged or not what was asked for; says what to do."""


class Record(NamedTuple):
    """One example: `image`, the encoded bytes (JPEG, PNG, ...), and `label` in [0, num_classes).

    The label is a `SoftLabel` where the source has the classes' probabilities.
    """

    image: bytes
    label: int


class SoftLabel(int):
    """A label, the likeliest class, that knows the `probabilities` f32[C] of all."""

    probabilities: np.ndarray

    @classmethod
    def of(cls, probabilities: np.ndarray) -> "SoftLabel":
        """Make the label of probabilities f32[C]."""
        label = cls(probabilities.argmax())
        label.probabilities = probabilities
        return label


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set; `source[i]` and `source.read(indices)` read in any order.

    Attributes:
      name, split: what was asked for.
      size: number of records.
      num_classes: number of classes.
      channels: 1 (grey) or 3 (RGB).
      image_shape: (H, W, channels) when all images have it, else None.
      read: indices in [0, size) -> records; picklable; raises DataError on a damaged record.
      remedy: what to do when the data is damaged, the end of every such message.
      classes: the classes' names in the order of labels; empty where they have none.
      describe: an index -> the words for that record in a message, with its file's name if any.
      ids_sha256: of the list of ids that chose the records, where one did.
      labels: int32[size] of the records, where they are known without reading these.
      split_counts: int64[num_classes], of the split's records in each class, where these are a part
        of it and its labels are known.
      files_sha256: of what says which records these are, but their content: of the files' names, or
        of a prepared data set's description; None where the name or `ids_sha256` says it.
      held: whether decoded images may stay in memory; not those of a source that has too many.
      soft: whether its labels are `SoftLabel`s.
      grey_as_rgb: whether its grey images may be read as RGB, as torchvision reads files.
      notes: sentences on what a person may have meant otherwise.
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
        """Return the words that name this split in a message."""
        return f"data set {self.name!r}, split {self.split!r}"

    def for_channels(self, channels: int | None) -> "Source":
        """Read grey image files as RGB where a network takes colours; else return the source."""
        if not (self.grey_as_rgb and self.channels == 1 and channels == 3):
            return self
        shape = self.image_shape and (*self.image_shape[:2], channels)
        return dataclasses.replace(self, channels=channels, image_shape=shape)


def content_sha256(source: Source, places: Sequence[int]) -> str:
    """Hash the encoded bytes and the labels of the records at some places, in their order."""
    return content_hashes(source, places)[0]


def content_hashes(source: Source, places: Sequence[int]) -> tuple[str, list[str]]:
    """Hash records as `content_sha256` does, and the encoded bytes of each by itself."""
    digest, hashes = hashlib.sha256(), []
    for start in range(0, len(places), _READ):
        for record in source.read(places[start : start + _READ]):
            digest.update(f"{record.label} {len(record.image)} ".encode())
            digest.update(record.image)
            hashes.append(hashlib.sha256(record.image).hexdigest())
    return digest.hexdigest(), hashes


def first_few(names: Sequence[str]) -> str:
    """Return `a, b, c, d, e, ... (17)`: the first names and how many there are."""
    return f"{', '.join(names[:5])}{', ...' * (len(names) > 5)} ({len(names)})"


class SourceKind(NamedTuple):
    """A kind of data set, by the names that `open_source` takes for it.

    `open(name, split, choice) -> Source`; `choice` is a `subsets.SubsetChoice`.
    """

    name: str  # before the colon
    written: str  # as messages and help write it
    help: str  # in a few words, for lists
    open: Callable[..., Source] | str  # or its entry, "module:function"
    pattern: str = ""  # of whole names; default: the name, a colon and anything
    is_path: bool = False  # what follows the colon is a place on disk
    contents: bool = False  # whether the records enter the fingerprint of a source without another

    def takes(self, name: str) -> bool:
        """Tell whether a data set is of this kind."""
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
        *("fake", "fake[:HxWxC[:CLASSES]]", "synthetic images that a network can learn"),
        f"{_SOURCES}.fake:open_fake",
        pattern=r"fake(?::([1-9]\d*)x([1-9]\d*)x([13])(?::([1-9]\d*))?)?",
    ),
    SourceKind(
        *("generated", "generated:DIR", "shards of generated images"),
        f"{_SOURCES}.generated:open_generated",
        is_path=True,
    ),
    SourceKind(
        *("hf", "hf:NAME", "a data set of Hugging Face, or hf:FOLDER of its parquet files"),
        f"{_SOURCES}.huggingface:open_hf",
    ),
    SourceKind(
        *("folder", "folder:PATH", "an ImageFolder: image files in one folder for each class"),
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
    """Find the kind of a data set; None: it is prepared, or its name is not valid."""
    return next((kind for kind in KINDS.values() if kind.takes(str(name))), None)
