"""Lists the images of each split in ImageNet's tar files, or in folders of any classes.

The official tar files are never unpacked. Reading their 1.28 million headers takes 20 s of CPU time
and one small disk read each.
"""

import functools
import importlib.util
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from jaxrobust.data import imagenet
from jaxrobust.data.prepare import command
from jaxrobust.data.prepare.writer import RawSplit
from jaxrobust.data.source import first_few
from jaxrobust.data.sources.image_folder import ENDINGS, NO_CLASSES
from jaxrobust.data.splits.known_sizes import IMAGES

IMAGENET = "imagenet2012"
SIZES = IMAGES[IMAGENET]
TAR_FILES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
_PARTIAL = "give --allow_partial to use what is there"
_TRAIN_NAME = re.compile(r"(n\d{8})_\d+\.\w+")
_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_OTHERS = {
    b"\x1f\x8b": "compressed (gzip); decompress it first",
    b"BZh": "compressed (bzip2); decompress it first",
    b"\xfd7zXZ": "compressed (xz); decompress it first",
    b"(\xb5/\xfd": "compressed (zstd); decompress it first",
    b"PK\x03\x04": "a zip file; unpack it and give the folder",
    b"<": "a web page, not a tar file; download it again",
}


class RawImage(NamedTuple):
    """One image: name, path in the split's folder, label, offset in a tar file, size in bytes."""

    name: str
    place: str
    label: int
    offset: int
    size: int


class Content(NamedTuple):
    """A source: its splits, and `notes` on what is missing or left out."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, RawSplit]
    notes: list[str]


@functools.cache
def validation_synsets() -> tuple[str, ...]:
    """Return the classes of ImageNet's validation images, in the order of their numbers."""
    path = package_folder() / "validation_labels.txt"
    try:
        synsets = tuple(path.read_text().split())
    except OSError as error:
        raise ValueError(f"{error}; reinstall tensorflow-datasets") from error
    if len(synsets) != IMAGES[IMAGENET]["validation"] or set(synsets) != set(imagenet.synsets()):
        raise ValueError(f"{path} is damaged; reinstall tensorflow-datasets")
    return synsets


def package_folder() -> Path:
    """Locate the ImageNet metadata of tensorflow_datasets without importing it."""
    spec = importlib.util.find_spec("tensorflow_datasets")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("ImageNet needs tensorflow_datasets: pip install tensorflow-datasets")
    return Path(spec.submodule_search_locations[0]) / "datasets" / IMAGENET


def scan(paths: Sequence[Path], *, name: str | None = None, allow_partial: bool = False) -> Content:
    """List the images of the official tar files, of their folder, or of an ImageFolder."""
    for path in paths:
        if re.match(r"\w+:/", str(path)):
            raise ValueError(f"{path} is not a local path; copy it here first")
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
    command.say(f"listing {', '.join(map(str, paths))}")
    notes = []
    files = [path for path in paths if path.is_file()]
    if not files and len(paths) == 1:
        files = [paths[0] / file for file in TAR_FILES if (paths[0] / file).is_file()]
        unread = [paths[0] / folder for folder in SPLITS if files]
        notes += [f"using the tar files, not {path}" for path in unread if path.is_dir()]
    elif len(files) != len(paths):
        raise ValueError("give one folder, or tar files, not both")
    content = _of_tars(files, name) if files else _of_folder(paths[0], name, allow_partial)
    for split, (origin, rows) in content.splits.items():
        _check(origin, rows)
        problems = _missing(split, origin, rows) if content.name == IMAGENET else []
        if problems and not allow_partial:
            raise ValueError(f"{problems[0]}; {_PARTIAL}")
        notes += problems
    absent = {"train", "validation"} - content.splits.keys()
    notes += [f"{paths[0]} has no {split} split" for split in sorted(absent)]
    return content._replace(notes=notes + content.notes)


def _check(origin: Path, rows: np.ndarray) -> None:
    if not len(rows):
        raise ValueError(f"{origin} holds no images")
    if len(empty := np.flatnonzero(rows["size"] == 0)):
        more = f", and {len(empty) - 1} more" * (len(empty) > 1)
        file = os.fsdecode(rows[empty[0]]["place"] or rows[empty[0]]["name"])
        raise ValueError(f"{origin}: {file} is empty{more}; copy it again")
    keys = np.sort(rows[["name", "label"]], order=["name", "label"])
    if len(twice := np.flatnonzero(keys[1:] == keys[:-1])):
        raise ValueError(f"{origin} holds {os.fsdecode(keys['name'][twice[0]])} twice; remove one")


def _missing(split: str, origin: Path, rows: np.ndarray) -> list[str]:
    synsets = imagenet.synsets()
    problems = []
    if absent := sorted(set(range(len(synsets))) - set(rows["label"].tolist())):
        names = first_few([synsets[label] for label in absent]).rpartition(" ")[0]
        classes = f"{len(absent)} of ImageNet's {len(synsets):,} classes ({names})"
        problems.append(f"{origin}: {split} has no images of {classes}")
    if len(rows) != SIZES[split]:
        expected = f"but ImageNet's has {SIZES[split]:,}"
        problems.append(f"{origin}: {split} has {len(rows):,} images, {expected}")
    return problems


def _table(listed: Iterable[RawImage]) -> np.ndarray:
    """Make a structured array of the rows: 150 MB for 1.28 million, a fifth of what tuples take."""
    rows = list(tqdm(listed, "listing", unit=" images", disable=None, delay=2, leave=False))
    texts = {"name": [os.fsencode(row.name) for row in rows]}
    texts["place"] = [os.fsencode(row.place) for row in rows]
    columns = [(key, f"S{max(map(len, of), default=0) or 1}") for key, of in texts.items()]
    table = np.empty(len(rows), [*columns, ("label", "<i4"), ("offset", "<i8"), ("size", "<i8")])
    for key, values in texts.items():
        table[key] = values
    for column in ("label", "offset", "size"):
        table[column] = [getattr(row, column) for row in rows]
    return table


def _of_tars(paths: Sequence[Path], name: str | None) -> Content:
    if name not in (None, IMAGENET):
        raise ValueError(f"--name {name}: the official tar files are {IMAGENET}; leave --name out")
    splits: dict[str, RawSplit] = {}
    for path in paths:
        first = next(_members(path), ("", 0, 0))[0]
        split = "train"
        if _VALIDATION_NAME.fullmatch(first):
            split = "validation"
        elif not re.fullmatch(r"n\d{8}\.tar", first):
            raise ValueError(
                f"{path} begins with {first or 'no file'!r}: it is neither {TAR_FILES[0]} "
                f"(n########.tar) nor {TAR_FILES[1]} (ILSVRC2012_val_########.JPEG)"
            )
        if split in splits:
            raise ValueError(f"{splits[split].origin} and {path} both hold the {split} split")
        splits[split] = RawSplit(path, _table(_tarred(path, split)))
    return Content(IMAGENET, imagenet.synsets(), splits, [])


def _tarred(path: Path, split: str) -> Iterator[RawImage]:
    """Yield the images of an official tar file; the training file holds a tar file per class."""
    labels = {f"{synset}.tar": label for label, synset in enumerate(imagenet.synsets())}
    for name, start, size in _members(path):
        if split == "validation":
            yield RawImage(name, "", _validation_label(path, name), start, size)
        elif name not in labels:
            raise ValueError(f"{path}: {name} is not the tar file of an ImageNet class")
        else:
            for inner, offset, length in _members(path, start, start + size, within=name):
                _check_synset(f"{path}: {name}", inner, name[:9])
                yield RawImage(inner, "", labels[name], offset, length)


def _members(
    path: Path, start: int = 0, stop: int | None = None, *, within: str = ""
) -> Iterator[tuple[str, int, int]]:
    """(name, offset in `path`, size) of every file of the tar file in bytes [start, stop)."""
    where = f"{path}: {within}" if within else f"{path}"
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size if stop is None else stop
        file.seek(start)
        head = file.read(8)
        for magic, form in _OTHERS.items():
            if head.startswith(magic):
                raise ValueError(f"{where} is {form}")
        file.seek(start)
        position = start
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115, `file` is what is closed
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every header
                position = member.offset
                if member.offset_data + member.size > end:
                    break
                if member.isfile():
                    yield Path(member.name).name, member.offset_data, member.size
            else:
                position = tar.offset
        except tarfile.TarError as error:
            if position == start and end - start >= tarfile.BLOCKSIZE:
                raise ValueError(f"{where} is not a tar file ({error})") from error
        # `next` also stops at a broken header, but a complete tar file ends with zeros.
        file.seek(position)
        if position + tarfile.BLOCKSIZE > end or any(file.read(tarfile.BLOCKSIZE)):
            raise ValueError(
                f"{where} is truncated or damaged: no complete file or end marker at byte "
                f"{position - start:,} of {end - start:,}; copy it again"
            )


def _validation_label(where: object, name: str) -> int:
    """Return the label of a validation image, from the number in its name."""
    match, synsets = _VALIDATION_NAME.fullmatch(name), validation_synsets()
    if not match or not 1 <= int(match[1]) <= len(synsets):
        raise ValueError(f"{where}: {name} is not the name of an ImageNet validation image")
    return imagenet.synsets().index(synsets[int(match[1]) - 1])


def _check_synset(where: object, name: str, synset: str) -> None:
    """Reject an image whose name belongs to another class; files in wrong folders do occur."""
    match = _TRAIN_NAME.fullmatch(name)
    right = match[1] if match else synset
    if _VALIDATION_NAME.fullmatch(name):
        right = imagenet.synsets()[_validation_label(where, name)]
    if right != synset:
        raise ValueError(f"{where}: {name} belongs to class {right}, not {synset}")


def _of_folder(root: Path, name: str | None, allow_partial: bool) -> Content:
    is_imagenet = name in (None, IMAGENET)
    folders = [folder for folder in SPLITS if (root / folder).is_dir()]
    if "test" in folders and (  # ImageNet's test images have no labels
        is_imagenet or not any(entry.is_dir() for entry in (root / "test").iterdir())
    ):
        folders.remove("test")
    if not folders:
        raise ValueError(
            f"{root} holds neither the official tar files nor the folders train/ and val/ (or "
            "validation/) of an ImageFolder"
        )
    if {"val", "validation"} <= set(folders):
        raise ValueError(f"{root} holds both val/ and validation/; move one away")
    paths = {SPLITS[folder]: root / folder for folder in folders}
    # ImageNet's validation images without class folders, as on Kaggle.
    flat = {
        s for s, path in paths.items() if any(map(_VALIDATION_NAME.fullmatch, os.listdir(path)))
    }
    listed = {split: _class_folders(path) for split, path in paths.items() if split not in flat}
    classes = tuple(sorted(set().union(*listed.values())))
    if is_imagenet:
        _check_imagenet(root, classes, allow_partial or not listed)
        classes = imagenet.synsets()
    else:
        _check_same(listed, allow_partial)
    left_out: Counter[str] = Counter()
    splits = {}
    for split, path in paths.items():
        rows = _images(path, classes, left_out, is_imagenet, allow_partial)
        if is_imagenet and split in flat:
            rows = (
                RawImage(e.name, e.name, _validation_label(path, e.name), 0, e.stat().st_size)
                for e in os.scandir(path)
                if _is_image(e.name, left_out)
            )
        splits[split] = RawSplit(path, _table(rows))
    notes = [f"left out: {count:,} {kind}" for kind, count in left_out.items()]
    return Content(IMAGENET if is_imagenet else str(name), classes, splits, notes)


def _class_folders(folder: Path) -> list[str]:
    names = [e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")]
    names = [name for name in names if name not in NO_CLASSES]
    if not names:
        raise ValueError(f"{folder} has no class folders")
    return sorted(names)


def _check_imagenet(root: Path, classes: Sequence[str], allow_partial: bool) -> None:
    synsets = imagenet.synsets()
    remedy = f"give --name NAME to make it a data set of these {len(classes)} classes"
    if foreign := [folder for folder in classes if folder not in set(synsets)]:
        count = len(classes) - len(foreign)
        share = f"{count} of" if count else "none of"
        others = f"{len(foreign)} others ({foreign[0]})"
        raise ValueError(
            f"{root} has {share} ImageNet's {len(synsets):,} classes and {others}; {remedy}"
        )
    missing = [synset for synset in synsets if synset not in set(classes)]
    if missing and not allow_partial:
        names = first_few(missing).rpartition(" ")[0]
        raise ValueError(
            f"{root} has no folder for {len(missing)} of ImageNet's {len(synsets):,} classes "
            f"({names}), so labels would shift; give --allow_partial to keep ImageNet's labels, or "
            f"{remedy}"
        )


def _check_same(classes: dict[str, list[str]], allow_partial: bool) -> None:
    first, *others = classes or [""]
    for split in others:
        if extra := sorted(set(classes[split]) - set(classes[first])):
            raise ValueError(f"{first} has no folder for the class {extra[0]!r} of {split}")
        if (extra := sorted(set(classes[first]) - set(classes[split]))) and not allow_partial:
            raise ValueError(f"{split} has no folder for the class {extra[0]!r}; {_PARTIAL}")


def _images(
    folder: Path,
    classes: Sequence[str],
    left_out: Counter[str],
    is_imagenet: bool,
    allow_partial: bool,
) -> Iterator[RawImage]:
    """Yield the images in the class folders, named by their paths within the class folder."""
    # For ImageNet, names omit folders, and an image named after another class is rejected.
    labels = {name: label for label, name in enumerate(classes)}
    for name in _class_folders(folder):
        is_empty = True
        for path, _, files in os.walk(folder / name, followlinks=True):
            for file in files:
                if not _is_image(file, left_out):
                    continue
                is_empty = False
                full = Path(path, file)
                if is_imagenet:
                    _check_synset(folder / name, file, name)
                short = file if is_imagenet else full.relative_to(folder / name).as_posix()
                place = full.relative_to(folder).as_posix()
                yield RawImage(short, place, labels[name], 0, full.stat().st_size)
        if is_empty and not allow_partial:
            raise ValueError(f"{folder / name} holds no images; {_PARTIAL}")


def _is_image(name: str, left_out: Counter[str]) -> bool:
    if name.startswith("."):
        left_out["hidden files"] += 1
    elif not name.lower().endswith(ENDINGS):
        left_out["files without an image extension"] += 1
    else:
        return True
    return False
