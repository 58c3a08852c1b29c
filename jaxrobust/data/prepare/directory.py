"""The directory of a data set: what it was written from, what TFDS reads, sha256 of all files."""

import contextlib
import fcntl
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.data.prepare.raw_source import Content
from jaxrobust.data.prepare.shards import PARTIAL, Shard, sha256
from jaxrobust.data.splits.subsets import index_name, write_index

SETTINGS, SUMS, INFO = "jaxrobust-prepare.json", "SHA256SUMS", "dataset_info.json"
FEATURES = "features.json"


class About(NamedTuple):
    """Facts of a data set that TFDS reads."""

    version: str
    description: str
    module: str
    order: str  # a description of the order of the records
    labels: Mapping[str, Sequence[str]]  # features -> their classes' names
    image: Mapping[str, Any]  # what all images have in common, as `features.json` says it
    name_key: str = ""  # the feature that names a record, if there is one
    citation: str = ""
    homepage: str = ""
    sizes: Mapping[str, int] = {}  # bytes of a split, if they are not those of its shards


class DatasetPlan(NamedTuple):
    """A data set to be written: its directory, what is in it, and the shards of every split."""

    directory: Path
    content: Content
    shards: dict[str, list[Shard]]
    about: About


def settings(plan: DatasetPlan) -> dict[str, Any]:
    """List the facts that must be the same when writing a data set goes on."""
    splits = {}
    for split, (_, rows) in plan.content.splits.items():
        listing = hashlib.sha256("\n".join(plan.content.classes).encode())
        for column in ("name", "label", "size"):
            listing.update(rows[column].tobytes())
        splits[split] = {
            "images": len(rows),
            "bytes": int(rows["size"].sum()),
            "shards": len(plan.shards[split]),
            "listing_sha256": listing.hexdigest(),
        }
    return {"salt": plan.about.order, "splits": splits}


@contextlib.contextmanager
def claimed(folder: Path, settings: str, difference: Callable[[str], str]) -> Iterator[None]:
    """Claim a folder for this process alone, with nothing in it but one data set.

    `settings` is the text that a new folder is begun with; `difference` of the text of another
    beginning says what to call that one, "" where it is the same.

    Raises:
      ValueError: a file stands in the way, the folder has other contents or was begun otherwise, or
        another process has it.
    """
    path = folder / SETTINGS
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"{place} is not a folder; give another --out")
    if folder.exists() and not path.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} was not written by this tool; give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing {folder}; wait for it") from error
        except OSError:
            pass  # a file system without locks
        file.seek(0)
        text = file.read()
        if not text:
            file.write(settings)
            file.flush()
        elif other := difference(text):
            raise ValueError(f"{folder} was begun {other}")
        _remove_unfinished(folder)
        try:
            yield
        finally:
            _remove_unfinished(folder)


def claimed_for(plan: DatasetPlan) -> contextlib.AbstractContextManager[None]:
    """Claim the directory of a data set, as `claimed` does."""
    origins = {split: str(part.origin) for split, part in plan.content.splits.items()}
    text = json.dumps({"origins": origins} | settings(plan), indent=2) + "\n"

    def difference(before: str) -> str:
        other = _other(plan.directory / SETTINGS, before, settings(plan))
        return other and f"{other}; give another --out, or remove it"

    return claimed(plan.directory, text, difference)


def _other(path: Path, text: str, new: dict[str, Any]) -> str:
    """How the settings in a file differ from those wanted now; empty where they do not."""
    try:
        old = json.loads(text)
        before, now = old["splits"], new["splits"]
        first, second = ({k: p["listing_sha256"] for k, p in s.items()} for s in (before, now))
        if first != second:
            sizes = ", ".join(f"{split} {part['images']:,}" for split, part in before.items())
            origins = ", ".join(sorted(set(old["origins"].values())))
            return f"from another source ({origins}; images: {sizes})"
        if before != now:
            counts = ", ".join(f"{split} {part['shards']}" for split, part in before.items())
            return f"with other --shards: {counts}"
        return "by another version of this tool" if old["salt"] != new["salt"] else ""
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove {path.parent}") from error


def _remove_unfinished(directory: Path) -> None:
    for path in directory.glob(f"*{PARTIAL}"):
        path.unlink(missing_ok=True)


def finish(plan: DatasetPlan) -> None:
    """Write what makes the shards a data set, `dataset_info.json` last."""
    directory, content = plan.directory, plan.content
    names = [FEATURES]
    for split, part in content.splits.items():
        write_index(directory, split, part.rows["label"], part.rows["name"].tolist())
        names.append(index_name(split))
    for feature, classes in plan.about.labels.items():
        (directory / f"{feature}.labels.txt").write_text("".join(f"{name}\n" for name in classes))
        names.append(f"{feature}.labels.txt")
    write_json(directory / FEATURES, features(plan.about))
    partial_info = directory / (INFO + PARTIAL)
    lengths = {split: [s.last - s.first for s in part] for split, part in plan.shards.items()}
    sizes = {split: sum(s.path.stat().st_size for s in part) for split, part in plan.shards.items()}
    write_json(partial_info, info(content.name, plan.about, lengths, sizes, content.notes))
    sums = read_sums(directory) | {name: sha256(directory / name) for name in names}
    sums[INFO] = sha256(partial_info)
    partial = directory / (SUMS + PARTIAL)
    partial.write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
    partial.replace(directory / SUMS)
    partial_info.replace(directory / INFO)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a description as TFDS does."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def add_sum(directory: Path, name: str, digest: str) -> None:
    """Add the sha256 of a file to the list."""
    with (directory / SUMS).open("a") as file:
        file.write(f"{digest}  {name}\n")


def read_sums(directory: Path) -> dict[str, str]:
    """File name to sha256, as `sha256sum -c` reads them; a later line replaces an earlier one."""
    path = directory / SUMS
    lines = path.read_text().splitlines() if path.exists() else []
    return {line[66:]: line[:64] for line in lines if re.match(r"[0-9a-f]{64}  .", line)}


def info(
    name: str,
    about: About,
    lengths: Mapping[str, Sequence[int]],
    sizes: Mapping[str, int],
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return `dataset_info.json`: of each split the records of its shards and the bytes of all."""
    return {
        "citation": about.citation,
        "description": about.description + "".join(f" {note}." for note in notes),
        "fileFormat": "array_record",
        **({"location": {"urls": [about.homepage]}} if about.homepage else {}),
        "moduleName": about.module,
        "name": name,
        "splits": [
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": str(about.sizes.get(split) or sizes[split]),
                "shardLengths": list(map(str, counts)),
            }
            for split, counts in lengths.items()
        ],
        "supervisedKeys": {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}},
        "version": about.version,
    }


def features(about: About) -> dict[str, Any]:
    """Return `features.json`."""
    kind = "tensorflow_datasets.core.features"
    image: dict[str, Any] = {"pythonClassName": f"{kind}.image_feature.Image"}
    entries = {"image": image | {"image": {"dtype": "uint8", **about.image}}}
    if about.name_key:
        entries[about.name_key] = {"pythonClassName": f"{kind}.text_feature.Text", "text": {}}
    for label, classes in about.labels.items():
        entries[label] = {
            "pythonClassName": f"{kind}.class_label_feature.ClassLabel",
            "classLabel": {"numClasses": str(len(classes))},
        }
    known = f"{kind}.features_dict.FeaturesDict"
    return {"pythonClassName": known, "featuresDict": {"features": entries}}


def image(shape: Sequence[int | None], encoding: str | None = None) -> dict[str, Any]:
    """Read the images' shape (None: any) and format from `features.json`."""
    dimensions = ["-1" if side is None else str(side) for side in shape]
    feature: dict[str, Any] = {"shape": {"dimensions": dimensions}}
    return feature | ({"encodingFormat": encoding} if encoding else {})
