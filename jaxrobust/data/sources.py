"""Where images come from: records of encoded bytes and a label, with random access.

`digits` ships with the package, `fake` is synthetic, every other name is a TFDS data set for image
classification that was prepared as ArrayRecord. Nothing here needs TensorFlow or a network.
"""

import bisect
import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

_SHIPPED = {"digits": Path(__file__).parent / "digits"}
_FAKE_SPLITS = {"train": 1024, "test": 256}
_FAKE_NAME = re.compile(r"fake(?::([1-9]\d*)x([1-9]\d*)x([13])(?::([1-9]\d*))?)?")
_PREPARED_NAME = re.compile(r"(?:tfds:)?([\w-]+(?:/[\w-]+)?(?::[\w.]+)?)", re.ASCII)
_VERSION = re.compile(r"\d+\.\d+\.\d+")


class DataError(ValueError):
    """A data set that is missing, damaged or not what was asked for; says what to do."""


class Record(NamedTuple):
    """One example: `image`, the encoded bytes (JPEG, PNG, ...), and `label` in [0, num_classes)."""

    image: bytes
    label: int


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
      classes: the classes' names in the order of labels; empty where nobody names them.
      describe: an index -> the words for that record in a message, with its file's name if any.
      ids_sha256: of the list of ids that chose the records, where one did.
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

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self.size:
            raise IndexError(f"{self.where()} has records 0 to {self.size - 1}, not {index}")
        return self.read([int(index)])[0]

    def where(self) -> str:
        """The words that name this split in a message."""
        return f"data set {self.name!r}, split {self.split!r}"


def open_source(name: str, split: str, *, data_dir: str | os.PathLike | None = None) -> Source:
    """The split `split` of the data set `name`.

    Args:
      name: `digits` (ships), `fake[:HxWxC[:CLASSES]]` (synthetic; 32x32x3 and 10 classes unless
        said), or `[tfds:]NAME[/CONFIG][:VERSION]`, a TFDS data set prepared as ArrayRecord; the
        newest version unless said.
      split: a split, or a part of one: `train`, `test`, `train[:90%]`, `train[90%:]`.
      data_dir: the directory that holds NAME/VERSION; default: the environment variable
        `TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
    Raises:
      DataError: not a name; no such data set, directory or split; another file format; a damaged
        file.
    """
    if fake := _FAKE_NAME.fullmatch(name):
        return _open_fake(name, split, fake)
    if name in _SHIPPED:
        remedy = "reinstall jaxrobust"
        return _open_prepared(name, split, _version_directory(name, _SHIPPED[name]), remedy)
    prepared = _PREPARED_NAME.fullmatch(name)
    if prepared is None:
        raise DataError(
            f"{name!r} is not the name of a data set; write {', '.join(_SHIPPED)}, "
            "fake[:HxWxC[:CLASSES]] or [tfds:]NAME[/CONFIG][:VERSION], of letters, digits, _ and "
            "-; directories go to data_dir"
        )
    plain = prepared[1]
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    remedy = f"copy the data set again or prepare it again: {_build_command(plain, root)}"
    return _open_prepared(plain, split, _version_directory(plain, root), remedy)


def _build_command(name: str, root: Path) -> str:
    dataset = name.partition(":")[0]
    return (
        f"`tfds build {dataset} --file_format=array_record --data_dir={root}` (in an environment "
        "that has TensorFlow; reading needs none)"
    )


def _version_directory(name: str, root: Path) -> Path:
    """The directory `root/NAME[/CONFIG]/VERSION`; the newest version unless `name` says one."""
    dataset, _, wanted = name.partition(":")
    if not root.is_dir():
        raise DataError(
            f"the data directory {root} does not exist; point data_dir or TFDS_DATA_DIR to the "
            f"directory that holds {dataset!r}, or prepare it: {_build_command(name, root)}"
        )
    versions = {
        path.parent.name: path.parent for path in root.glob(f"{dataset}/*/dataset_info.json")
    }
    if wanted:
        versions = {version: path for version, path in versions.items() if version == wanted}
    if not versions:
        prepared = {path.relative_to(root).parts[0] for path in root.glob("*/*/dataset_info.json")}
        prepared |= {
            "/".join(path.relative_to(root).parts[:2])
            for path in root.glob("*/*/*/dataset_info.json")
        }
        raise DataError(
            f"unknown data set {name!r}: known are {', '.join(sorted(_SHIPPED))}, "
            f"fake[:HxWxC[:CLASSES]] and, in {root}, {', '.join(sorted(prepared)) or 'nothing'}; "
            f"prepare another one with {_build_command(name, root)}, or point data_dir or "
            "TFDS_DATA_DIR to the directory that holds it"
        )
    numbers = lambda text: [int(part) for part in re.findall(r"\d+", text)]  # noqa: E731
    newest = max(versions, key=lambda text: (_VERSION.fullmatch(text) is not None, numbers(text)))
    return versions[newest]


def _open_prepared(name: str, split: str, directory: Path, remedy: str) -> Source:
    import tensorflow_datasets as tfds
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    open_directory = tfds.builder_from_directory  # here a broken installation shows itself
    try:
        info = open_directory(directory).info
        known, features = info.splits, info.features
    except Exception as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{directory} does not describe a data set ({reason}); {remedy}") from error
    if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise DataError(
            f"{directory} is in the format {info.file_format.value}, which has no random access; "
            f"prepare it as ArrayRecord in another directory: {remedy.partition(': ')[2]}"
        )
    supervised = info.supervised_keys or ()  # says which one when there are several labels
    image_key, image = _feature(features, tfds.features.Image, supervised, directory)
    label_key, label = _feature(features, tfds.features.ClassLabel, supervised, directory)

    try:
        part = known[split]
        files = [(os.fspath(f.filename), f.skip, f.take) for f in part.file_instructions]
        size = sum(take for _, _, take in files)
    except (ValueError, KeyError, AssertionError) as error:
        raise DataError(_unknown_split(name, split, known)) from error
    if size < 1 or any(take < 1 for _, _, take in files):
        raise DataError(f"{_unknown_split(name, split, known)}; this part holds no record")
    missing = [filename for filename, _, _ in files if not os.path.exists(filename)]
    if missing:
        raise DataError(f"data set {name!r}: the file {missing[0]} is missing; {remedy}")

    height, width, channels = image.shape
    fixed = height is not None and width is not None and channels is not None
    read = functools.partial(
        _read_prepared,
        data=ArrayRecordDataSource(part.file_instructions),
        files=files,
        image_key=image_key,
        label_key=label_key,
        num_classes=label.num_classes,
        where=f"data set {name!r}, split {split!r}",
        remedy=remedy,
    )
    source = Source(
        name=name,
        split=split,
        size=size,
        num_classes=label.num_classes,
        channels=channels or 3,
        image_shape=(height, width, channels) if fixed else None,
        read=read,
        remedy=remedy,
    )
    # A truncated file opens with its full length and fails at the first read: read now.
    read(sorted({0, size - 1}))
    return source


def _unknown_split(name: str, split: str, known: Any) -> str:
    sizes = ", ".join(f"{key} ({info.num_examples})" for key, info in known.items())
    return (
        f"data set {name!r} has no split {split!r}: it has {sizes}; parts are written "
        "train[:90%], train[90%:], train[:1000]"
    )


def _feature(
    features: Any, kind: type, supervised: Sequence[Any], directory: Path
) -> tuple[str, Any]:
    """The name and the feature of this kind, the supervised one if there are several."""
    found = {key: feature for key, feature in features.items() if isinstance(feature, kind)}
    chosen = [key for key in found if len(found) == 1 or key in supervised]
    if len(chosen) != 1:
        raise DataError(
            f"{directory} has {len(found)} features of the kind {kind.__name__}; a data set for "
            "image classification has one image and one class label, or names them as its "
            "supervised keys"
        )
    return chosen[0], found[chosen[0]]


def _read_prepared(
    indices: Sequence[int],
    *,
    data: Any,
    files: list[tuple[str, int, int]],
    image_key: str,
    label_key: str,
    num_classes: int,
    where: str,
    remedy: str,
) -> list[Record]:
    """Records of an ArrayRecord data source, one batched read; single reads find a damaged one."""
    from tensorflow_datasets.proto import tf_example_pb2

    def fail(index: int, reason: object) -> NoReturn:
        ends = list(itertools.accumulate(take for _, _, take in files))
        shard = bisect.bisect_right(ends, index)
        filename, skip, take = files[shard]
        position = index - ends[shard] + take + skip
        raise DataError(
            f"{where}: record {index} (record {position} of {filename}) {reason}; {remedy}"
        )

    if not indices:
        return []
    try:
        raw = data.__getitems__(indices)
    except (RuntimeError, IndexError, ValueError):
        raw = []
        for index in indices:
            try:
                raw.append(data[index])
            except (RuntimeError, IndexError, ValueError) as error:
                fail(index, f"cannot be read, the file is truncated or damaged ({error})")
    records = []
    for index, serialized in zip(indices, raw, strict=True):
        if not serialized:  # what the reader returns beyond the end of a truncated file
            fail(index, "cannot be read, the file is truncated")
        try:
            feature = tf_example_pb2.Example.FromString(serialized).features.feature
            image = feature[image_key].bytes_list.value[0]
            label = feature[label_key].int64_list.value[0]
        except Exception as error:  # protobuf's DecodeError, or a feature that is not there
            fail(index, f"is not an example with {image_key!r} and {label_key!r} ({error})")
        if not 0 <= label < num_classes:
            fail(index, f"has the label {label}, outside the classes 0 to {num_classes - 1}")
        records.append(Record(image, label))
    return records


def _open_fake(name: str, split: str, match: re.Match) -> Source:
    height, width, channels, classes = (
        int(group or default)
        for group, default in zip(match.groups(), (32, 32, 3, 10), strict=True)
    )
    part = re.fullmatch(r"(\w+)(?:\[(\d*)(%?):(\d*)(%?)\])?", split)
    if part is None or part[1] not in _FAKE_SPLITS:
        raise DataError(
            f"data set {name!r} has no split {split!r}: it has "
            f"{', '.join(f'{key} ({size})' for key, size in _FAKE_SPLITS.items())}; parts are "
            "written train[:90%], train[90%:], train[:1000]"
        )
    total = _FAKE_SPLITS[part[1]]
    bound = lambda text, percent: int(text) * total // 100 if percent else int(text)  # noqa: E731
    start = bound(part[2] or "0", part[3])
    stop = min(total, bound(part[4], part[5]) if part[4] else total)
    if stop <= start:
        raise DataError(f"data set {name!r}: split {split!r} holds no record; {total} are there")
    first = list(_FAKE_SPLITS).index(part[1]) << 32
    return Source(
        name=name,
        split=split,
        size=stop - start,
        num_classes=classes,
        channels=channels,
        image_shape=(height, width, channels),
        read=functools.partial(
            _read_fake, first=first + start, shape=(height, width, channels), num_classes=classes
        ),
    )


def _read_fake(
    indices: Sequence[int], *, first: int, shape: tuple[int, int, int], num_classes: int
) -> list[Record]:
    """Noise over a 4x4 pattern of the class, as PPM or PGM: learnable, cheap, exact."""
    height, width, channels = shape
    header = b"P%d %d %d 255\n" % (6 if channels == 3 else 5, width, height)
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    records = []
    for index in indices:
        label = (first + index) % num_classes
        pattern = np.random.Generator(np.random.Philox(label)).integers(0, 192, (4, 4, channels))
        noise = np.random.Generator(np.random.Philox(key=[first + index, 1])).integers(
            0, 64, shape, dtype=np.uint8
        )
        image = pattern.astype(np.uint8)[rows[:, None], columns] + noise
        records.append(Record(header + image.tobytes(), label))
    return records
