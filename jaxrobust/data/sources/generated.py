"""Generated images by the tens of millions: `generated:DIR`, which `jaxrobust prepare generated`
wrote, read at random and never held.

DIR holds shards in ArrayRecord of which every record is as long as the others: the pixels of one
image, row by row, then its label, int32, or the probabilities of its classes, float32
each, little-endian. Where a record is then follows from arithmetic: neither an index nor an image
stays in memory, and one image is one read of a file. ArrayRecord's own reader, which any other
program can use, takes a millisecond for a call that asks for few records of many shards.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.data.source import DataError, Record, SoftLabel, Source
from jaxrobust.data.sources import plausibility
from jaxrobust.data.splits import grammar, storage, subsets
from jaxrobust.data.transforms import decoding

PREFIX = "generated:"
INFO = "generated.json"
FORMAT = 1  # of the records and of what INFO says
REMEDY = "prepare it again, jaxrobust prepare generated FILE.npz... --out DIR"
# Of Riegeli, in which ArrayRecord writes: a file is blocks that begin with a header, and what the
# blocks hold is chunks that begin with one. The first chunk is the signature alone.
_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
_DATA = _BLOCK - _BLOCK_HEADER
_ANNOUNCES = hasattr(os, "posix_fadvise")  # not on macOS


class ShardLayout(NamedTuple):
    """What all shards of a folder have in common, as INFO says it."""

    shape: tuple[int, int, int]  # H, W, channels
    classes: int
    soft: bool  # whether labels are probabilities of the classes
    per_shard: int  # records of every shard but the last
    sizes: tuple[int, ...]  # bytes of each shard
    size: int  # records

    @property
    def pixels(self) -> int:
        """Bytes of an image."""
        height, width, channels = self.shape
        return height * width * channels

    @property
    def length(self) -> int:
        """Bytes of a record."""
        return self.pixels + 4 * (self.classes if self.soft else 1)


def file_name(i: int, count: int) -> str:
    """Return the name of shard `i` of `count`."""
    return f"generated-all.array_record-{i:05}-of-{count:05}"


class RecordPlaces(NamedTuple):
    """Where the records of a shard stand, which are of one length: arithmetic.

    Source: Riegeli's format, a simple chunk without compression for each record
    (github.com/google/riegeli, doc/riegeli_records_file_format.md); parity:
    tests/data/sources/test_generated.py against ArrayRecord's own writer and reader.
    """

    length: int
    start: int  # of record 0, among the bytes that are in no block's header
    stride: int

    @classmethod
    def of(cls, length: int) -> "RecordPlaces":
        """Compute the places of records of `length` bytes."""
        # Of a chunk's data: how it is compressed, the length of the sizes, the size, the record.
        head = 1 + _varint(_varint(length)) + _varint(length)
        return cls(length, 2 * _CHUNK_HEADER + head, _CHUNK_HEADER + head + length)

    def place(self, row: int) -> tuple[int, int]:
        """Compute where a record begins in its file, and how much of the block is left there."""
        block, inside = divmod(self.start + row * self.stride, _DATA)
        return block * _BLOCK + _BLOCK_HEADER + inside, _DATA - inside

    def announce(self, descriptor: int, row: int) -> None:
        """Ask the system to fetch a record of an open shard, without waiting for it."""
        os.posix_fadvise(descriptor, self.place(row)[0], self.length, os.POSIX_FADV_WILLNEED)

    def read(self, descriptor: int, row: int) -> bytes:
        """Read a record of an open shard; it is shorter where the file ends before it."""
        begin, available = self.place(row)
        if self.length <= available:
            return os.pread(descriptor, self.length, begin)
        headers = -(-(self.length - available) // _DATA)
        raw = os.pread(descriptor, self.length + headers * _BLOCK_HEADER, begin)
        parts = [raw[:available]]
        for number in range(headers):
            first = available + number * _BLOCK + _BLOCK_HEADER
            parts.append(raw[first : first + _DATA])
        return b"".join(parts)


def _varint(number: int) -> int:
    """Count the bytes of a number in base 128."""
    return max(1, -(-number.bit_length() // 7))


class _OpenShards(dict[int, int]):
    """The descriptors of a folder's shards, for `os.pread`; they are closed with it."""

    def __init__(self, folder: str, count: int) -> None:
        super().__init__()
        self._folder, self._count = folder, count

    def __missing__(self, shard: int) -> int:
        descriptor = os.open(f"{self._folder}/{file_name(shard, self._count)}", os.O_RDONLY)
        if (first := self.setdefault(shard, descriptor)) != descriptor:
            os.close(descriptor)  # another thread came first
        return first

    def __del__(self) -> None:
        for descriptor in self.values():
            os.close(descriptor)


@functools.lru_cache(maxsize=2)
def _opened(folder: str, count: int, version: str, process: int) -> _OpenShards:
    """Keep the shards open once per process; `version` changes when they are rewritten."""
    del version, process
    return _OpenShards(folder, count)


@dataclasses.dataclass(frozen=True)
class ShardedRecords:
    """Reads records of a folder of shards; picklable, files open at first use."""

    folder: str
    layout: ShardLayout
    version: str  # sha256 of what INFO says
    first: int = 0  # record of the shards that is record 0 here

    def __call__(self, indices: Sequence[int]) -> list[Record]:
        """Read the records at some places, in any order."""
        layout, per_shard, pixels = self.layout, self.layout.per_shard, self.layout.pixels
        header, places = _fixed(layout)
        opened = _opened(self.folder, len(layout.sizes), self.version, os.getpid())
        at = [divmod(self.first + index, per_shard) for index in indices]
        if _ANNOUNCES and len(at) > 1:  # the disk works on all of them at once
            with contextlib.suppress(OSError):  # which is said where that record is read
                for shard, row in at:
                    places.announce(opened[shard], row)
        records = []
        for index, (shard, row) in zip(indices, at, strict=True):
            try:
                raw = places.read(opened[shard], row)
            except OSError as error:
                where = self.describe(index)
                raise DataError(f"{where} cannot be read ({error.strerror}); {REMEDY}") from error
            if len(raw) != places.length:
                raise DataError(f"{self.describe(index)} is cut off; {REMEDY}")
            if layout.soft:
                soft = np.frombuffer(raw[pixels:], "<f4").astype(np.float32)
                if why := not_probabilities(soft[None]):
                    raise DataError(f"{self.describe(index)} has labels that {why}; {REMEDY}")
                label: int = SoftLabel.of(soft)
            else:
                label = int.from_bytes(raw[pixels:], "little", signed=True)
                if not 0 <= label < layout.classes:
                    raise DataError(
                        f"{self.describe(index)} has the label {label}, outside the classes 0 to "
                        f"{layout.classes - 1}; {REMEDY}"
                    )
            records.append(Record(header + raw[:pixels], label))
        return records

    def describe(self, index: int) -> str:
        """Name the shard and the place of a record, for messages."""
        shard, row = divmod(self.first + index, self.layout.per_shard)
        return f"record {row} of {self.folder}/{file_name(shard, len(self.layout.sizes))}"


def not_probabilities(labels: np.ndarray) -> str:
    """Say why labels f[N,C] are not probabilities of the classes; "" where they are."""
    if not np.isfinite(labels).all() or labels.min() < 0:
        return "are negative or not finite"
    sums = labels.sum(axis=1, dtype=np.float64)
    far = float(sums[np.abs(sums - 1).argmax()])
    return f"sum to {far:.4g} instead of 1" if abs(far - 1) > 1e-3 else ""


@functools.lru_cache(maxsize=8)
def _fixed(layout: ShardLayout) -> tuple[bytes, RecordPlaces]:
    """Compute the header of a PGM or PPM file of such an image, and where records stand."""
    image = np.zeros(layout.shape, np.uint8)
    return decoding.encode(image)[: -image.size], RecordPlaces.of(layout.length)


def read_layout(folder: Path, name: str) -> tuple[ShardLayout, str]:
    """Read what INFO says of a folder, and the sha256 of that; check the sizes of all shards."""
    path = folder / INFO
    if not folder.is_dir():
        raise DataError(f"data set {name!r}: there is no folder {folder}; check the path")
    if not path.exists():
        raise DataError(
            f"data set {name!r}: {folder} has no {INFO}, with which jaxrobust prepare generated "
            "ends; let that command continue, or check the path"
        )
    text = path.read_text()
    try:
        info = json.loads(text)
        if info["format"] != FORMAT:
            raise DataError(f"{path} is of another version of jaxrobust; {REMEDY}")
        sequences: dict[str, Any] = {key: tuple(info[key]) for key in ("shape", "sizes")}
        numbers = {key: info[key] for key in ("classes", "soft", "per_shard", "size")}
        layout = ShardLayout(**sequences, **numbers)
        if len(layout.shape) != 3 or len(layout.sizes) != -(-layout.size // layout.per_shard):
            raise ValueError("shards of another number")
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise DataError(f"{path} is damaged ({error}); {REMEDY}") from error
    for i, wanted in enumerate(layout.sizes):
        shard = folder / file_name(i, len(layout.sizes))
        size = shard.stat().st_size if shard.exists() else None
        if size != wanted:
            has = "is missing" if size is None else f"has {size:,} bytes, not {wanted:,}"
            raise DataError(f"data set {name!r}: {shard} {has}; {REMEDY}")
    return layout, hashlib.sha256(text.encode()).hexdigest()


def soft_labels(name: Any) -> bool:
    """Tell whether a data set of that name is shards with probabilities as labels; not if it is
    not here.
    """
    if not isinstance(name, str) or not (name.startswith(PREFIX) or is_folder(name)):
        return False
    path = Path(name.removeprefix(PREFIX)).expanduser() / INFO
    try:
        return bool(json.loads(path.read_text())["soft"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_folder(name: str) -> bool:
    """Tell whether a name is a folder of shards, which then needs no `generated:`."""
    return bool(name) and (Path(name).expanduser() / INFO).is_file()


def open_generated(name: str, split: str, choice: subsets.SubsetChoice) -> Source:
    """Open `generated:DIR`, whose one split is `all`; DIR alone is the same where it is there.

    A part such as `all[:1000000]` is one; `choice` of classes or ids is refused, since labels stand
    after the images alone.
    """
    path = name.removeprefix(PREFIX)
    if storage.is_remote(path):
        raise DataError(f"{name}: shards are read at random from a local disk; copy them there")
    folder = Path(os.fspath(storage.place(path)))
    layout, version = read_layout(folder, name)
    parsed, _ = grammar.find(name, split, {"all": layout.size})
    if choice.classes is not None or choice.ids is not None:
        raise DataError(
            f"data set {name!r}: generated images cannot be chosen by classes or ids; prepare the "
            "wanted ones alone, and leave data.classes and the list out"
        )
    rows = grammar.rows(parsed.part, layout.size, f"data set {name!r}, split {split!r}")
    reader = ShardedRecords(os.fspath(folder), layout, version, rows.start)
    source = Source(
        name=name,
        split=split,
        size=len(rows),
        num_classes=layout.classes,
        channels=layout.shape[2],
        image_shape=layout.shape,
        read=reader,
        remedy=REMEDY,
        describe=reader.describe,
        files_sha256=hashlib.sha256(f"{version} {rows}".encode()).hexdigest(),
        held=False,
        soft=layout.soft,
    )
    records = source.read(sorted({0, len(source) - 1}))  # a file of other records shows itself now
    brightest = max(int(decoding.decode(record.image).max()) for record in records)
    notes = plausibility.of_pixels(brightest, len(records), source.where())
    return dataclasses.replace(source, notes=notes)
