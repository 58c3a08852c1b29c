"""TFDS image classification data sets prepared as ArrayRecord, read without TensorFlow.

On `gs://`, epath (the extra `gcs`) reads the descriptions and array_record reads the records
directly from the bucket: ImageNet's 150 GB do not fit on a TPU VM's boot disk.
"""

import bisect
import contextlib
import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
from tqdm.auto import tqdm

from jaxrobust.data.source import DataError, Record, Source
from jaxrobust.data.sources import headers, plausibility
from jaxrobust.data.splits import choosing, grammar, storage, subsets
from jaxrobust.runtime.text.spelling import near

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_FILE_NAMES = ("file_name", "image/file_name", "filename", "image/filename", "id")
# Data sets that can be prepared without TensorFlow.
_OWN = {name: f"jaxrobust prepare {name}" for name in ("cifar10", "cifar100")}
_OWN["imagenet2012"] = "jaxrobust prepare imagenet SOURCE"
_FEW, _SEVERAL = 10_000, 100_000  # labels are read up to _FEW, or up to _SEVERAL if indexed
_CHUNK = 256  # records per read in a pass over a split: 30 MB of ImageNet
_KNOWN = ("digits", "fake", "cifar10", "cifar100", "imagenet2012", "imagenette")
_ERRORS = (RuntimeError, IndexError, ValueError)  # what a reader raises for a damaged file


def data_directory(path: str | os.PathLike | None = None) -> str:
    """Return the directory of prepared data sets: `path`, else `TFDS_DATA_DIR`, as in TFDS."""
    return os.fspath(path or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def build_command(name: str, root: Any) -> str:
    """Return the shortest working command that prepares a data set in the directory `root`."""
    dataset = name.partition(":")[0]
    if dataset not in _OWN:
        build = f"`tfds build {dataset} --file_format=array_record --data_dir={root}`"
        return f"{build} (in an environment with TensorFlow, which reading does not need)"
    if storage.is_remote(root):
        return f"`{_OWN[dataset]} --out DIR`, then `gcloud storage cp -r DIR/{dataset} {root}/`"
    usual = storage.place(data_directory()) == root and "SOURCE" not in _OWN[dataset]
    return f"`{_OWN[dataset]}`" if usual else f"`{_OWN[dataset]} --out {root}`"


def version_directory(name: str, root: Any, others: str) -> Any:
    """Find `root/NAME[/CONFIG]/VERSION`; default: the only config and the newest version."""
    dataset, _, wanted = name.partition(":")
    top = storage.entries(root)
    if top is None:
        raise DataError(
            f"the data directory {root} does not exist; {near(dataset, _KNOWN)}point data_dir or "
            f"TFDS_DATA_DIR to the directory that holds {dataset!r}, or prepare it: "
            f"{build_command(name, root)}"
        )
    versions = _versions(root / dataset, wanted)
    if not versions and "/" not in dataset:
        configs = _configs(root / dataset, wanted)
        if len(configs) > 1:
            raise DataError(
                f"data set {dataset!r} is prepared in several configurations; write one of "
                f"{', '.join(f'{dataset}/{config}' for config in sorted(configs))}"
            )
        versions = next(iter(configs.values()), [])
    if not versions:
        names = {d for d in top.folders if _versions(root / d)}
        names |= {f"{d}/{config}" for d in top.folders for config in _configs(root / d)}
        raise DataError(
            f"unknown data set {name!r}: {near(dataset, (*_KNOWN, *names))}available: {others}; "
            f"in {root}: {', '.join(sorted(names)) or 'nothing'}; prepare it with "
            f"{build_command(name, root)}, or point data_dir or TFDS_DATA_DIR to the directory "
            "that holds it"
        )

    def age(directory: Any) -> tuple[bool, list[int]]:
        numbers = [int(part) for part in re.findall(r"\d+", directory.name)]
        return _VERSION.fullmatch(directory.name) is not None, numbers

    return max(versions, key=age)


def _versions(directory: Any, wanted: str = "") -> list[Any]:
    """List the version directories directly in a directory, or only the wanted one."""
    folders = getattr(storage.entries(directory), "folders", ())
    return [
        directory / version
        for version in folders
        if wanted in ("", version)
        and "dataset_info.json" in getattr(storage.entries(directory / version), "files", ())
    ]


def _configs(directory: Any, wanted: str = "") -> dict[str, list[Any]]:
    folders = getattr(storage.entries(directory), "folders", ())
    configs = {folder: _versions(directory / folder, wanted) for folder in folders}
    return {folder: versions for folder, versions in configs.items() if versions}


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads records of the files `(name, skip, take)`; picklable, opens files at first use."""

    data: Any  # an ArrayRecordDataSource
    files: list[tuple[str, int, int]]
    image_key: str
    label_key: str
    name_key: str | None
    num_classes: int
    where: str
    remedy: str

    def position(self, index: int) -> str:
        """Locate a record, as `record 17 of FILE`."""
        ends = list(itertools.accumulate(take for _, _, take in self.files))
        shard = bisect.bisect_right(ends, index)
        filename, skip, take = self.files[shard]
        return f"record {index - ends[shard] + take + skip} of {filename}"

    def fail(self, index: int, reason: object) -> NoReturn:
        record = f"record {index} ({self.position(index)})"
        raise DataError(f"{self.where}: {record} {reason}; {self.remedy}")

    def no_example(self, index: int, error: Exception) -> NoReturn:
        wanted = f"{self.image_key!r} and {self.label_key!r}"
        self.fail(index, f"is not an example with {wanted} ({error})")

    def features(self, indices: Sequence[int]) -> list[Any]:
        """Return records' feature maps in one batched read; single reads locate a damaged one."""
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            raw = self.data.__getitems__(indices) if indices else []
        except _ERRORS:
            raw = [self._read_one(index) for index in indices]
        records = []
        for index, serialized in zip(indices, raw, strict=True):
            if not serialized:  # the reader's result beyond the end of a truncated file
                self.fail(index, "cannot be read: the file is truncated")
            try:
                records.append(tf_example_pb2.Example.FromString(serialized).features.feature)
            except Exception as error:  # protobuf's DecodeError
                self.no_example(index, error)
        return records

    def _read_one(self, index: int) -> bytes:
        try:
            return self.data[index]
        except _ERRORS as error:
            self.fail(index, f"cannot be read: the file is truncated or damaged ({error})")

    def image(self, index: int, feature: Any) -> bytes:
        """Return the image file in a feature map."""
        try:
            return feature[self.image_key].bytes_list.value[0]
        except Exception as error:  # a missing feature, or one of another type
            self.no_example(index, error)

    def label(self, index: int, feature: Any) -> int:
        """Return the checked label in a feature map."""
        try:
            label = feature[self.label_key].int64_list.value[0]
        except Exception as error:
            self.no_example(index, error)
        if not 0 <= label < self.num_classes:
            within = f"0 to {self.num_classes - 1}"
            self.fail(index, f"has the label {label}, outside the classes {within}")
        return label

    def name(self, feature: Any) -> bytes:
        """Return the file's name in a feature map; empty if there is none."""
        values = feature[self.name_key].bytes_list.value if self.name_key else ()
        return values[0] if values else b""

    def __call__(self, indices: Sequence[int]) -> list[Record]:
        pairs = zip(indices, self.features(indices), strict=True)
        return [Record(self.image(i, feature), self.label(i, feature)) for i, feature in pairs]

    def heads(self, indices: Sequence[int]) -> list[bytes]:
        """Return the image files."""
        pairs = zip(indices, self.features(indices), strict=True)
        return [self.image(index, feature) for index, feature in pairs]

    def describe(self, index: int) -> str:
        """Return the file's name, if records have one, and the record's position."""
        name = b""
        with contextlib.suppress(DataError):
            name = self.name(self.features([index])[0])
        place = self.position(index)
        return f"{name.decode(errors='replace')} ({place})" if name else place


def open_prepared(
    name: str, split: str, directory: Any, remedy: str, choice: subsets.SubsetChoice
) -> Source:
    """Return the split `split` of the data set in `directory`, which holds one version."""
    import tensorflow_datasets as tfds

    open_directory = tfds.builder_from_directory  # a broken installation fails here
    try:
        info = open_directory(directory).info
        len(info.features), len(info.splits)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{directory} does not describe a data set ({reason}); {remedy}") from error
    if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise DataError(
            f"{directory} is in the format {info.file_format.value}, without random access; "
            f"prepare it as ArrayRecord in another directory: {remedy.partition(': ')[2]}"
        )
    parsed = grammar.parse(split)
    if parsed and (part := grammar.present(parsed.name, info.splits)):
        split = f"{part}{split.removeprefix(parsed.name)}"
        parsed = parsed._replace(name=part)
    if choice.classes is None and choice.ids is None:
        source = _open_split(name, split, info, directory, remedy)
        if split in info.splits:
            source = _with_label_notes(source, split, info, directory)
    else:
        if parsed is None or parsed.name not in info.splits:
            raise _no_split(name, split, info.splits)
        split_name = parsed.name
        source = _open_split(name, split_name, info, directory, remedy)
        reader: Any = source.read

        def index() -> tuple[np.ndarray, Iterator[str] | None]:
            if choice.ids is not None and reader.name_key is None:
                return np.zeros(0, np.int32), None
            labels, names = _index(source, split_name, info, directory)
            return labels, (name.decode(errors="surrogateescape") for name in names)

        source = choosing.choose(source, parsed, split, choice, index)
    # A truncated file opens with its full length but fails at the first read, so read now.
    source.read(sorted({0, len(source) - 1}))
    return source


def _open_split(name: str, split: str, info: Any, directory: Any, remedy: str) -> Source:
    import tensorflow_datasets as tfds
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    features = info.features
    supervised = info.supervised_keys or ()  # decides between several labels
    image_key, image = _feature(features, tfds.features.Image, supervised, directory)
    label_key, label = _feature(features, tfds.features.ClassLabel, supervised, directory)
    try:
        part = info.splits[split]
        files = [(os.fspath(f.filename), f.skip, f.take) for f in part.file_instructions]
        size = sum(take for _, _, take in files)
    except (ValueError, KeyError, AssertionError) as error:
        raise _no_split(name, split, info.splits) from error
    if size < 1 or any(take < 1 for _, _, take in files):
        raise DataError(f"{_no_split(name, split, info.splits)}; this part is empty")
    present = set(getattr(storage.entries(directory), "files", ()))
    if missing := [path for path, _, _ in files if os.path.basename(path) not in present]:
        raise DataError(f"data set {name!r}: the file {missing[0]} is missing; {remedy}")
    reader = _Reader(
        data=ArrayRecordDataSource(part.file_instructions),
        files=files,
        image_key=image_key,
        label_key=label_key,
        name_key=next((key for key in _FILE_NAMES if key in features), None),
        num_classes=label.num_classes,
        where=(where := f"data set {name!r}, split {split!r}"),
        remedy=remedy,
    )
    if (dtype := np.dtype(image.np_dtype)) != np.uint8:
        raise DataError(f"{where}: its images are {dtype}; prepare it with uint8 images")
    height, width, channels = image.shape
    channels = 1 if channels == 1 else 3  # without alpha
    shape = None if None in (height, width) else (height, width, channels)
    # The version, the shards and their sizes, independent of their folder.
    splits = [part for part in info.splits if part in re.findall(r"\w+", split)]
    sizes = [(n, list(info.splits[n].shard_lengths), info.splits[n].num_bytes) for n in splits]
    taken = [(os.path.basename(path), skip, take) for path, skip, take in files]
    version = hashlib.sha256(repr((directory.name, sizes, taken)).encode()).hexdigest()
    facts = headers.look(
        reader.heads,
        size,
        where,
        reader.describe,
        lambda: f"{os.path.abspath(directory)} {version}",
        channels=channels,
        declared=shape is not None,
    )
    names = tuple(label.names)
    return Source(
        name=name,
        split=split,
        size=size,
        num_classes=label.num_classes,
        channels=channels,
        image_shape=shape or (facts and facts.image_shape),
        read=reader,
        remedy=remedy,
        # TFDS counts if a data set does not name its classes.
        classes=() if names == tuple(map(str, range(len(names)))) else names,
        describe=reader.describe,
        files_sha256=version,
        notes=facts.notes if facts else (),
    )


def _no_split(name: str, split: str, splits: Any) -> DataError:
    sizes = ", ".join(f"{key} ({info.num_examples})" for key, info in splits.items())
    return grammar.no_split(name, split, sizes)


def _feature(
    features: Any, kind: type, supervised: Sequence[Any], directory: Any
) -> tuple[str, Any]:
    """Return the name and feature of this type; the supervised one if there are several."""
    fitting = {key: feature for key, feature in features.items() if isinstance(feature, kind)}
    chosen = [key for key in fitting if len(fitting) == 1 or key in supervised]
    if len(chosen) != 1:
        raise DataError(
            f"{directory} has {len(fitting)} features of type {kind.__name__}; a data set for "
            "image classification must have one image and one class label, or name them as its "
            "supervised keys"
        )
    return chosen[0], fitting[chosen[0]]


def _index(source: Source, split: str, info: Any, directory: Any) -> subsets.Index:
    """Return the labels and file names of a full split, from its index or from all records."""
    reader: Any = source.read
    cached = _cached_index(split, info, directory)
    for place in (directory, cached):
        index = subsets.read_index(place, split)
        if index is not None and len(index.labels) == len(source):
            rows = sorted({0, len(source) // 2, len(source) - 1})  # samples to compare
            of_records = [
                (reader.label(row, feature), reader.name(feature))
                for row, feature in zip(rows, reader.features(rows), strict=True)
            ]
            if of_records == [(index.labels[row], index.names[row]) for row in rows]:
                return index
    labels = np.empty(len(source), np.int32)
    names: list[bytes] = []
    task = f"labels of {source.where()} (once)"
    with tqdm(total=len(source), desc=task, unit=" records", delay=2) as progress:
        for start in range(0, len(source), _CHUNK):
            chunk = range(start, min(start + _CHUNK, len(source)))
            for row, feature in zip(chunk, reader.features(chunk), strict=True):
                labels[row] = reader.label(row, feature)
                names.append(reader.name(feature))
            progress.update(len(chunk))
    try:
        subsets.write_index(directory, split, labels, names)
    except Exception:  # OSError for a read-only directory; buckets have their own types
        with contextlib.suppress(OSError):  # without an index the next run reads all records again
            cached.mkdir(parents=True, exist_ok=True)
            subsets.write_index(cached, split, labels, names)
    return subsets.Index(labels, np.asarray(names, np.bytes_))


def _cached_index(split: str, info: Any, directory: Any) -> Any:
    key = repr((os.fspath(directory), split, list(info.splits[split].shard_lengths)))
    return subsets.index_cache() / hashlib.sha256(key.encode()).hexdigest()[:32]


def _with_label_notes(source: Source, split: str, info: Any, directory: Any) -> Source:
    """Add notes on unusual labels of a full split if reading them is cheap."""
    size = len(source)
    if size > _SEVERAL:
        return source
    reader: Any = source.read
    places = (directory, _cached_index(split, info, directory))
    indices = (subsets.read_index(place, split) for place in places)
    labels = next((i.labels for i in indices if i and len(i.labels) == size), None)
    if labels is None:
        if size > _FEW:
            return source
        try:
            pairs = enumerate(reader.features(range(size)))
            labels = np.array([reader.label(place, feature) for place, feature in pairs])
        except DataError:  # a damaged record is reported when it is used
            return source
    notes = plausibility.of_labels(dataclasses.replace(source, labels=labels))
    return dataclasses.replace(source, notes=(*source.notes, *notes))
