"""Tens of millions of generated images: `generated:DIR`, as written by `jaxrobust prepare
generated`; read at random and never held in memory.

DIR holds ArrayRecord shards whose records all have the same length: the pixels of an image, row by
row, then its label as int32, or its class probabilities as float32, little-endian. The place of a
record thus follows from arithmetic: neither an index nor an image stays in memory, and reading an
image is one file read. ArrayRecord's own reader, which any other program can use, takes a
millisecond for a call that asks for few records of many shards.
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
FORMAT = 1  # version of the records and of INFO
REMEDY = "prepare it again: `jaxrobust prepare generated FILE.npz... --out DIR`"
# Riegeli's layout, which ArrayRecord uses: a file consists of blocks, each with a header. Their
# contents are chunks, each with a header. The first chunk is only the signature.
_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
_DATA = _BLOCK - _BLOCK_HEADER
_ANNOUNCES = hasattr(os, "posix_fadvise")  # not on macOS


class ShardLayout(NamedTuple):
    """What all shards of a folder share, as stored in INFO."""

    shape: tuple[int, int, int]  # H, W, channels
    classes: int
    soft: bool  # whether labels are class probabilities
    per_shard: int  # records in every shard but the last
    sizes: tuple[int, ...]  # bytes per shard
    size: int  # number of records

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
    """Computes where the records of a shard are, given that all have the same length.

    Source: Riegeli's format, a simple chunk without compression for each record
    (github.com/google/riegeli, doc/riegeli_records_file_format.md); parity:
    tests/data/sources/test_generated.py against ArrayRecord's own writer and reader.
    """

    length: int
    start: int  # of record 0, not counting block headers
    stride: int

    @classmethod
    def of(cls, length: int) -> "RecordPlaces":
        """Compute the layout for records of `length` bytes."""
        # The chunk's data: compression type, length of the sizes, size, record.
        head = 1 + _varint(_varint(length)) + _varint(length)
        return cls(length, 2 * _CHUNK_HEADER + head, _CHUNK_HEADER + head + length)

    def place(self, row: int) -> tuple[int, int]:
        """Compute where a record begins in its file, and how much of its block remains there."""
        block, inside = divmod(self.start + row * self.stride, _DATA)
        return block * _BLOCK + _BLOCK_HEADER + inside, _DATA - inside

    def announce(self, descriptor: int, row: int) -> None:
        """Ask the system to fetch a record of an open shard, without waiting for it."""
        os.posix_fadvise(descriptor, self.place(row)[0], self.length, os.POSIX_FADV_WILLNEED)

    def read(self, descriptor: int, row: int) -> bytes:
        """Read a record of an open shard; the result is shorter if the file ends early."""
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
    """Count the bytes of a number encoded as varint (base 128)."""
    return max(1, -(-number.bit_length() // 7))


class _OpenShards(dict[int, int]):
    """The file descriptors of a folder's shards, for `os.pread`; closed along with this object."""

    def __init__(self, folder: str, count: int) -> None:
        super().__init__()
        self._folder, self._count = folder, count

    def __missing__(self, shard: int) -> int:
        descriptor = os.open(f"{self._folder}/{file_name(shard, self._count)}", os.O_RDONLY)
        if (first := self.setdefault(shard, descriptor)) != descriptor:
            os.close(descriptor)  # another thread was faster
        return first

    def __del__(self) -> None:
        for descriptor in self.values():
            os.close(descriptor)


@functools.lru_cache(maxsize=2)
def _opened(folder: str, count: int, version: str, process: int) -> _OpenShards:
    """Keep the shards open once per process; `version` changes when the shards are rewritten."""
    del version, process
    return _OpenShards(folder, count)


@dataclasses.dataclass(frozen=True)
class ShardedRecords:
    """Reads records from a folder of shards; picklable, opens files at first use."""

    folder: str
    layout: ShardLayout
    version: str  # sha256 of INFO
    first: int = 0  # index in the shards of record 0 here

    def __call__(self, indices: Sequence[int]) -> list[Record]:
        """Read the records at some places, in any order."""
        layout, per_shard, pixels = self.layout, self.layout.per_shard, self.layout.pixels
        header, places = _fixed(layout)
        opened = _opened(self.folder, len(layout.sizes), self.version, os.getpid())
        at = [divmod(self.first + index, per_shard) for index in indices]
        if _ANNOUNCES and len(at) > 1:  # lets the disk work on all of them at once
            with contextlib.suppress(OSError):  # reported when that record is read
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
                raise DataError(f"{self.describe(index)} is truncated; {REMEDY}")
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
        """Name a record for messages: its shard and place."""
        shard, row = divmod(self.first + index, self.layout.per_shard)
        return f"record {row} of {self.folder}/{file_name(shard, len(self.layout.sizes))}"


def not_probabilities(labels: np.ndarray) -> str:
    """Say why labels f[N,C] are not class probabilities; "" if they are."""
    if not np.isfinite(labels).all() or labels.min() < 0:
        return "are negative or not finite"
    sums = labels.sum(axis=1, dtype=np.float64)
    far = float(sums[np.abs(sums - 1).argmax()])
    return f"sum to {far:.4g} instead of 1" if abs(far - 1) > 1e-3 else ""


@functools.lru_cache(maxsize=8)
def _fixed(layout: ShardLayout) -> tuple[bytes, RecordPlaces]:
    """Return the PGM or PPM header of such an image, and where the records are."""
    image = np.zeros(layout.shape, np.uint8)
    return decoding.encode(image)[: -image.size], RecordPlaces.of(layout.length)


def read_layout(folder: Path, name: str) -> tuple[ShardLayout, str]:
    """Read a folder's INFO and its sha256; check the sizes of all shards."""
    path = folder / INFO
    if not folder.is_dir():
        raise DataError(f"data set {name!r}: there is no folder {folder}; check the path")
    if not path.exists():
        raise DataError(
            f"data set {name!r}: {folder} has no {INFO}, which `jaxrobust prepare generated` "
            "writes last; repeat that command, or check the path"
        )
    text = path.read_text()
    try:
        info = json.loads(text)
        if info["format"] != FORMAT:
            raise DataError(f"{path} was written by another version of jaxrobust; {REMEDY}")
        sequences: dict[str, Any] = {key: tuple(info[key]) for key in ("shape", "sizes")}
        numbers = {key: info[key] for key in ("classes", "soft", "per_shard", "size")}
        layout = ShardLayout(**sequences, **numbers)
        if len(layout.shape) != 3 or len(layout.sizes) != -(-layout.size // layout.per_shard):
            raise ValueError("wrong number of shards")
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
    """Recognize shards whose labels are probabilities; False if they are missing."""
    if not isinstance(name, str) or not (name.startswith(PREFIX) or is_folder(name)):
        return False
    path = Path(name.removeprefix(PREFIX)).expanduser() / INFO
    try:
        return bool(json.loads(path.read_text())["soft"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_folder(name: str) -> bool:
    """Recognize a folder of shards, which needs no `generated:` in front."""
    return bool(name) and (Path(name).expanduser() / INFO).is_file()


def open_generated(name: str, split: str, choice: subsets.SubsetChoice) -> Source:
    """Open `generated:DIR`, whose only split is `all`; for an existing folder, DIR is enough.

    A split may be a part, such as `all[:1000000]`. A `choice` of classes or ids is rejected,
    because labels are stored only next to the images.
    """
    path = name.removeprefix(PREFIX)
    if storage.is_remote(path):
        raise DataError(
            f"{name}: shards are read in random order and must be on a local disk; copy them there"
        )
    folder = Path(os.fspath(storage.place(path)))
    layout, version = read_layout(folder, name)
    parsed, _ = grammar.find(name, split, {"all": layout.size})
    if choice.classes is not None or choice.ids is not None:
        raise DataError(
            f"data set {name!r}: generated images cannot be selected by class or id; prepare only "
            "the images you want, and leave out data.classes and the list of ids"
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
    records = source.read(sorted({0, len(source) - 1}))  # detects wrong records right away
    brightest = max(int(decoding.decode(record.image).max()) for record in records)
    notes = plausibility.of_pixels(brightest, len(records), source.where())
    return dataclasses.replace(source, notes=notes)
