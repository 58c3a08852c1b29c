"""The folder of an ArrayRecord data set: its shards, TFDS's description, sha256 of all files."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from jaxrobust.data.splits.subsets import index_name, write_index
from jaxrobust.runtime.files import whole
from jaxrobust.runtime.files.download import file_sha256 as sha256

SETTINGS, SUMS, INFO = "jaxrobust-prepare.json", "SHA256SUMS", "dataset_info.json"
FEATURES = "features.json"
PARTIAL = ".partial"
# One record per group, as TFDS writes; compressing JPEG saves only 0.07% and is 3 times slower.
_OPTIONS = "group_size:1,uncompressed"
CHUNK = 32  # records between two progress reports


class About(NamedTuple):
    """Facts about a data set that TFDS reads."""

    name: str
    version: str
    description: str
    module: str
    labels: Mapping[str, Sequence[str]]  # feature -> its class names
    shape: Sequence[int | None]  # of all images; None: varies
    encoding: str = ""  # of all images, for example jpeg
    name_key: str = ""  # the feature that names a record, if any
    citation: str = ""
    homepage: str = ""
    sizes: Mapping[str, int] = {}  # bytes of a split, unless they are the size of its shards
    notes: Sequence[str] = ()


class RawSplit(NamedTuple):
    """A split; `rows` is a structured array in record order, with `name`, `label` and `size`."""

    origin: Path  # a tar file or a folder
    rows: np.ndarray


class Shard(NamedTuple):
    """Records [first, last) of a split, in `path`."""

    path: Path
    split: str
    first: int
    last: int


class DatasetPlan(NamedTuple):
    """A data set to write into a folder; `order` describes the order of the records."""

    folder: Path
    about: About
    splits: dict[str, RawSplit]
    counts: dict[str, int]  # shards per split
    order: str

    def shards(self) -> list[Shard]:
        """List the shards of all splits."""
        return [
            shard
            for split, (_, rows) in self.splits.items()
            for shard in shards_of(
                self.folder,
                self.about.name,
                split,
                [len(rows) * i // self.counts[split] for i in range(self.counts[split] + 1)],
            )
        ]


def shards_of(folder: Path, name: str, split: str, bounds: Sequence[int]) -> list[Shard]:
    """List the shards of a split; shard i has the records [bounds[i], bounds[i + 1])."""
    return [
        Shard(folder / file_name(name, split, i, len(bounds) - 1), split, *ends)
        for i, ends in enumerate(itertools.pairwise(bounds))
    ]


class WorkDone(NamedTuple):
    """Work done since the last report; at the end of a shard, also its name and result."""

    images: int
    size: int
    shard: str = ""
    result: str = ""  # its sha256, or what a check found wrong with it


Job = Callable[[Shard], Iterator[WorkDone]]


@contextlib.contextmanager
def claimed(folder: Path, settings: str, difference: Callable[[str], str]) -> Iterator[None]:
    """Claim a folder for this process and for one data set.

    A new folder starts with the text `settings`. `difference` takes the text of an existing folder
    and describes how it differs, or returns "".

    Raises:
      ValueError: a file is in the way, the folder has other contents or other settings, or another
        process holds it.
    """
    path = folder / SETTINGS
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"{place} is not a folder; give another --out")
    if folder.exists() and not path.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} was not written by this tool; give another --out")
    folder.mkdir(parents=True, exist_ok=True)

    def remove_unfinished() -> None:
        for unfinished in folder.glob(f"*{PARTIAL}"):
            unfinished.unlink(missing_ok=True)

    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing {folder}; wait until it ends") from error
        except OSError:
            pass  # a file system without locks
        file.seek(0)
        text = file.read()
        if not text:
            file.write(settings)
            file.flush()
        elif other := difference(text):
            raise ValueError(f"{folder} was started {other}")
        remove_unfinished()
        try:
            yield
        finally:
            remove_unfinished()


def claimed_for(plan: DatasetPlan) -> contextlib.AbstractContextManager[None]:
    """Claim the folder of a data set with `claimed`."""
    splits = {}
    for split, (_, rows) in plan.splits.items():
        listing = hashlib.sha256("\n".join(plan.about.labels["label"]).encode())
        for column in ("name", "label", "size"):
            listing.update(rows[column].tobytes())
        splits[split] = {
            "images": len(rows),
            "bytes": int(rows["size"].sum()),
            "shards": plan.counts[split],
            "listing_sha256": listing.hexdigest(),
        }
    origins = {split: str(part.origin) for split, part in plan.splits.items()}
    settings = {"origins": origins, "salt": plan.order, "splits": splits}

    def difference(text: str) -> str:
        try:
            old = json.loads(text)
            old_splits = old["splits"]
            listings = (
                {split: part["listing_sha256"] for split, part in one.items()}
                for one in (old_splits, splits)
            )
            other = "by another version of this tool" if old["salt"] != plan.order else ""
            if old_splits != splits:
                counts = ", ".join(f"{split} {p['shards']}" for split, p in old_splits.items())
                other = f"with other --shards: {counts}"
            if next(listings) != next(listings):
                sizes = ", ".join(f"{split} {p['images']:,}" for split, p in old_splits.items())
                sources = ", ".join(sorted(set(old["origins"].values())))
                other = f"from another source ({sources}; images: {sizes})"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            path = plan.folder / SETTINGS
            raise ValueError(f"{path} is damaged ({error}); remove {plan.folder}") from error
        return other and f"{other}; give another --out, or remove the folder"

    return claimed(plan.folder, json.dumps(settings, indent=2) + "\n", difference)


def unwritten(plan: DatasetPlan, *, verify: bool = False) -> list[Shard]:
    """List incomplete shards; with `verify`, also those that differ from SHA256SUMS.

    If there are any, the folder is not a data set until `finish`.
    """
    sums, todo = read_sums(plan.folder), []
    for shard in plan.shards():
        name, digest = shard.path.name, sums.get(shard.path.name)
        is_whole = length(shard.path) == shard.last - shard.first
        if not is_whole or (verify and digest != sha256(shard.path)):
            todo.append(shard)
        elif digest is None:  # killed between writing the shard and its line
            add_sum(plan.folder, name, sha256(shard.path))
    if todo:
        (plan.folder / INFO).unlink(missing_ok=True)
    return todo


def finish(plan: DatasetPlan) -> None:
    """Write the files that make the shards a data set, `dataset_info.json` last."""
    folder, about = plan.folder, plan.about
    names = [FEATURES]
    for split, (_, rows) in plan.splits.items():
        write_index(folder, split, rows["label"], rows["name"].tolist())
        names.append(index_name(split))
    for feature, classes in about.labels.items():
        (folder / f"{feature}.labels.txt").write_text("".join(f"{name}\n" for name in classes))
        names.append(f"{feature}.labels.txt")
    write_json(folder / FEATURES, features(about))
    lengths: dict[str, list[int]] = {split: [] for split in plan.splits}
    sizes = dict.fromkeys(plan.splits, 0)
    for path, split, first, last in plan.shards():
        lengths[split].append(last - first)
        sizes[split] += path.stat().st_size
    partial_info, partial = folder / (INFO + PARTIAL), folder / (SUMS + PARTIAL)
    write_json(partial_info, info(about, lengths, sizes | dict(about.sizes)))
    sums = read_sums(folder) | {name: sha256(folder / name) for name in names}
    sums[INFO] = sha256(partial_info)
    partial.write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
    partial.replace(folder / SUMS)
    partial_info.replace(folder / INFO)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a description in TFDS's format."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def add_sum(folder: Path, name: str, digest: str) -> None:
    """Add the sha256 of a file to the list."""
    with (folder / SUMS).open("a") as file:
        file.write(f"{digest}  {name}\n")


def read_sums(folder: Path) -> dict[str, str]:
    """Map file names to sha256, as `sha256sum -c` reads them; later lines replace earlier ones."""
    path = folder / SUMS
    lines = path.read_text().splitlines() if path.exists() else []
    return {line[66:]: line[:64] for line in lines if re.match(r"[0-9a-f]{64}  .", line)}


def info(
    about: About, lengths: Mapping[str, Sequence[int]], sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Return `dataset_info.json`: each split's records per shard and its total bytes."""
    return {
        "citation": about.citation,
        "description": about.description + "".join(f" {note}." for note in about.notes),
        "fileFormat": "array_record",
        **({"location": {"urls": [about.homepage]}} if about.homepage else {}),
        "moduleName": about.module,
        "name": about.name,
        "splits": [
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": str(sizes[split]),
                "shardLengths": list(map(str, counts)),
            }
            for split, counts in lengths.items()
        ],
        "supervisedKeys": {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}},
        "version": about.version,
    }


def features(about: About) -> dict[str, Any]:
    """Return `features.json`."""
    prefix = "tensorflow_datasets.core.features"
    dimensions = ["-1" if side is None else str(side) for side in about.shape]
    image: dict[str, Any] = {"dtype": "uint8", "shape": {"dimensions": dimensions}}
    if about.encoding:
        image["encodingFormat"] = about.encoding
    entries = {"image": {"pythonClassName": f"{prefix}.image_feature.Image", "image": image}}
    if about.name_key:
        entries[about.name_key] = {"pythonClassName": f"{prefix}.text_feature.Text", "text": {}}
    for label, classes in about.labels.items():
        entries[label] = {
            "pythonClassName": f"{prefix}.class_label_feature.ClassLabel",
            "classLabel": {"numClasses": str(len(classes))},
        }
    name = f"{prefix}.features_dict.FeaturesDict"
    return {"pythonClassName": name, "featuresDict": {"features": entries}}


def file_name(name: str, split: str, i: int, count: int) -> str:
    """Return TFDS's file name of shard `i` of `count`."""
    return f"{name}-{split}.array_record-{i:05}-of-{count:05}"


def example(fields: Mapping[str, bytes | int]) -> bytes:
    """Return one serialized `tf.train.Example` with these features."""
    from tensorflow_datasets.proto import tf_example_pb2

    message = tf_example_pb2.Example()
    for key, value in fields.items():
        feature = message.features.feature[key]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        else:
            feature.int64_list.value.append(value)
    return message.SerializeToString(deterministic=True)


def length(path: Path) -> int | None:
    """Count the records of a shard; None unless there is a complete shard."""
    from array_record.python.array_record_module import ArrayRecordReader

    if not path.exists():
        return None
    try:
        reader = ArrayRecordReader(str(path))
        count = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError, IndexError):  # truncated, or not a record file
        return None
    return count


@contextlib.contextmanager
def writing(path: Path, count: int) -> Iterator[Callable[[bytes], None]]:
    """Yield a function that writes one record; the shard gets its final name once complete."""
    from array_record.python.array_record_module import ArrayRecordWriter

    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    with whole.explained(path):
        try:
            writer = ArrayRecordWriter(str(partial), _OPTIONS)
            yield writer.write
            writer.close()
        except RuntimeError as error:
            reason = str(error).partition(";")[0].removeprefix("write() failed: ")
            raise OSError(f"cannot write {path}: {reason}") from error
    if length(partial) != count:
        raise OSError(f"cannot write {path}: it does not contain {count} records after writing")
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def put(
    shard: Shard, records: Iterable[Mapping[str, bytes | int]], size: int = 0
) -> Iterator[WorkDone]:
    """Write the records of a shard whose images have `size` bytes (0: the length of `image`)."""
    images = written = 0
    with writing(shard.path, shard.last - shard.first) as add:
        for fields in records:
            add(example(fields))
            images, written = images + 1, written + (size or len(cast(bytes, fields["image"])))
            if images == CHUNK:
                yield WorkDone(images, written)
                images = written = 0
    yield WorkDone(images, written, shard.path.name, sha256(shard.path))
