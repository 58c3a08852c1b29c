"""The directory of a data set: what it was written from, what TFDS reads, sha256 of all files."""

import contextlib
import fcntl
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.data.prepare.known import IMAGENET, package_folder
from jaxrobust.data.prepare.shards import PARTIAL, SALT, Shard, sha256
from jaxrobust.data.prepare.source import Content
from jaxrobust.data.subsets import index_name, write_index

SETTINGS, SUMS, INFO = "jaxrobust-prepare.json", "SHA256SUMS", "dataset_info.json"
_FEATURES, _LABELS = "features.json", "label.labels.txt"


class Plan(NamedTuple):
    """A data set to be written: its directory, what is in it, and the shards of every split."""

    directory: Path
    content: Content
    shards: dict[str, list[Shard]]


def version(name: str) -> str:
    """Return the version of a data set: TFDS' for ImageNet, the first for others."""
    return "5.1.0" if name == IMAGENET else "1.0.0"


def settings(plan: Plan) -> dict[str, Any]:
    """Return what has to be the same when a data set is written on."""
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
    return {"salt": SALT.decode(), "splits": splits}


@contextlib.contextmanager
def claimed(plan: Plan) -> Iterator[None]:
    """Claim the directory for this process alone, with nothing in it but this data set.

    Raises:
      ValueError: it holds something else, or another process writes it.
    """
    directory, path = plan.directory, plan.directory / SETTINGS
    for folder in (directory, *directory.parents):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; give another --out")
    if directory.exists() and not path.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} was not written by this tool; give another --out")
    directory.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing {directory}; wait for it") from error
        except OSError:
            pass  # a file system without locks
        file.seek(0)
        text = file.read()
        if not text:
            origins = {split: str(part.origin) for split, part in plan.content.splits.items()}
            file.write(json.dumps({"origins": origins} | settings(plan), indent=2) + "\n")
            file.flush()
        elif other := _other(path, text, settings(plan)):
            raise ValueError(f"{directory} was begun {other}; give another --out, or remove it")
        _remove_unfinished(directory)
        try:
            yield
        finally:
            _remove_unfinished(directory)


def _other(path: Path, text: str, new: dict[str, Any]) -> str:
    """How the settings in a file differ from those wanted now; empty where they do not."""
    try:
        old = json.loads(text)
        before, now = old["splits"], new["splits"]
        if {k: part["listing_sha256"] for k, part in before.items()} != {
            k: part["listing_sha256"] for k, part in now.items()
        }:
            sizes = ", ".join(f"{split} {part['images']:,}" for split, part in before.items())
            origins = ", ".join(sorted(set(old["origins"].values())))
            return f"from another source ({origins}; images: {sizes})"
        if before != now:
            return "with other --shards: " + ", ".join(
                f"{split} {part['shards']}" for split, part in before.items()
            )
        return "by another version of this tool" if old["salt"] != new["salt"] else ""
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove {path.parent}") from error


def _remove_unfinished(directory: Path) -> None:
    for path in directory.glob(f"*{PARTIAL}"):
        path.unlink(missing_ok=True)


def finish(plan: Plan) -> None:
    """Write what makes the shards a data set, `dataset_info.json` last."""
    directory, content = plan.directory, plan.content
    names = [_FEATURES, _LABELS]
    for split, part in content.splits.items():
        write_index(directory, split, part.rows["label"], part.rows["name"].tolist())
        names.append(index_name(split))
    (directory / _LABELS).write_text("".join(f"{name}\n" for name in content.classes))
    _write_json(directory / _FEATURES, _features(content))
    info = directory / (INFO + PARTIAL)
    _write_json(info, _info(plan))
    sums = read_sums(directory) | {name: sha256(directory / name) for name in names}
    sums[INFO] = sha256(info)
    partial = directory / (SUMS + PARTIAL)
    partial.write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
    partial.replace(directory / SUMS)
    info.replace(directory / INFO)


def _write_json(path: Path, content: dict[str, Any]) -> None:
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


def _info(plan: Plan) -> dict[str, Any]:
    content = plan.content
    imagenet = content.name == IMAGENET
    what = (
        "ImageNet (ILSVRC 2012), 1,000 classes" if imagenet else f"{len(content.classes)} classes"
    )
    notes = "".join(f" {note}." for note in content.notes)
    module = f"tensorflow_datasets.datasets.{IMAGENET}.{IMAGENET}_dataset_builder"
    return {
        "citation": (package_folder() / "CITATIONS.bib").read_text() if imagenet else "",
        "description": f"{what}, images byte for byte as in the source, written by jaxrobust's "
        f"tools/prepare_imagenet.py.{notes}",
        "fileFormat": "array_record",
        "moduleName": module if imagenet else "jaxrobust.tools.prepare_imagenet",
        "name": content.name,
        "splits": [
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": str(sum(shard.path.stat().st_size for shard in shards)),
                "shardLengths": [str(shard.last - shard.first) for shard in shards],
            }
            for split, shards in plan.shards.items()
        ],
        "supervisedKeys": {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}},
        "version": version(content.name),
    }


def _features(content: Content) -> dict[str, Any]:
    kind = "tensorflow_datasets.core.features"
    image = {"shape": {"dimensions": ["-1", "-1", "3"]}, "dtype": "uint8"} | _encoding(content)
    label = {"classLabel": {"numClasses": str(len(content.classes))}}
    name = f"{kind}.text_feature.Text"
    return {
        "pythonClassName": f"{kind}.features_dict.FeaturesDict",
        "featuresDict": {
            "features": {
                "file_name": {"pythonClassName": name, "text": {}},
                "image": {"pythonClassName": f"{kind}.image_feature.Image", "image": image},
                "label": {"pythonClassName": f"{kind}.class_label_feature.ClassLabel"} | label,
            }
        },
    }


def _encoding(content: Content) -> dict[str, str]:
    """Return the format of all images by their names; empty where they differ or TFDS has none."""
    for form, endings in {"jpeg": (b".jpeg", b".jpg"), "png": (b".png",)}.items():
        if all(
            name.lower().endswith(endings)
            for part in content.splits.values()
            for name in part.rows["name"].tolist()
        ):
            return {"encodingFormat": form}
    return {}
