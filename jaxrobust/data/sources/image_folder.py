"""Image files in one folder for each class: `folder:PATH`, as torchvision's ImageFolder reads."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from jaxrobust.data import imagenet
from jaxrobust.data.source import DataError, Record, Source, SourceKind, add, first_few
from jaxrobust.data.splits import grammar, storage, subsets

PREFIX = "folder:"
# What torchvision's ImageFolder reads.
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_USUAL_SPLITS = ("train", "val", "validation", "test")
_REMEDY = "restore the file, or remove it for a new run"
_THREADS = 16  # a slow disk or a bucket answers many lists at once


@dataclasses.dataclass(frozen=True)
class Files:
    """The paths of N files without N Python objects: cheap to keep and to send to workers."""

    root: str  # of the class folders
    folders: tuple[str, ...]  # in the order of labels
    labels: np.ndarray  # int32[N]
    blob: bytes  # the paths within the class folders one after the other
    ends: np.ndarray  # of each, int64[N]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return the path of a file within its class folder."""
        start = self.ends[index - 1] if index else 0
        return self.blob[start : self.ends[index]].decode(errors="surrogateescape")

    def sha256(self) -> str:
        """Hash the classes, and all names and labels in their order."""
        digest = hashlib.sha256("\0".join(self.folders).encode(errors="surrogateescape"))
        for part in (self.labels.tobytes(), self.ends.tobytes(), self.blob):
            digest.update(part)
        return digest.hexdigest()

    def path(self, index: int) -> str:
        """Return the whole path of a file."""
        return f"{self.root}/{self.folders[self.labels[index]]}/{self.name(index)}"


def open_folder(name: str, split: str, choice: subsets.SubsetChoice) -> Source:
    """Return the split `split` of `folder:PATH`.

    PATH/SPLIT/CLASS/... holds the files, or PATH/CLASS/... those of the one split `all`; `val` and
    `validation` are the same. Classes are the sorted folders and records are sorted by class and
    path, as in torchvision, so that a part such as [:10%] holds whole classes. Files and folders
    whose names begin with a dot do not count.
    """
    classes, ids, num_classes = choice
    parsed = grammar.parse(split)
    root, folders = _class_folders(name, split, parsed)
    where = f"data set {name!r}, split {split!r}"
    if classes is None:
        imagenet.check_folders(folders, num_classes, f"{root}")
    else:
        labels = subsets.class_labels(classes, folders, len(folders), str(root))
        folders = [folders[label] for label in labels]
    files = _list(str(root), folders, allow_empty=ids is not None)
    source = Source(
        name=name,
        split=split,
        size=len(files),
        num_classes=len(folders),
        channels=3,
        image_shape=None,
        read=functools.partial(_read, files=files),
        remedy=_REMEDY,
        classes=tuple(folders),
        describe=files.path,
        ids_sha256=ids.sha256 if ids else None,
        files_sha256=None if ids else files.sha256(),
        labels=files.labels,
    )
    assert parsed is not None
    rows: Any = range(len(files))
    if ids is not None:
        names = (files.name(index) for index in rows)
        whole = classes is None
        there = str(root) if whole else f"{root} with data.classes"
        rows = subsets.find(ids, files.labels, names, folders, there, whole=whole)
    part = grammar.rows(parsed.part, len(rows), where)
    if ids is not None or parsed.part is not None:
        source = subsets.view(source, rows[part.start : part.stop])
    source[0]  # whether files can be read at all shows here
    return source


def _class_folders(
    name: str, split: str, parsed: grammar.SplitExpression | None
) -> tuple[Any, list[str]]:
    path = storage.place(name.removeprefix(PREFIX))
    top = storage.entries(path)
    if top is None:
        problem = f"the directory {path} does not exist, or may not be read"
        raise DataError(f"data set {name!r}: {problem}")
    present = _present(path, top)
    wanted = [parsed.name, grammar.SAME.get(parsed.name, "")] if parsed else []
    chosen = [folder for folder in wanted if folder in top.folders and _folders(path / folder)]
    if chosen:
        similar = [folder for folder in top.folders if folder.lower() in map(str.lower, wanted)]
        same = [folder for folder in similar if _folders(path / folder)]
        if len(same) > 1:
            both = f"{path} holds both {same[0]}/ and {same[1]}/"
            raise DataError(f"data set {name!r}, split {split!r}: {both}; move one away")
        return path / chosen[0], _folders(path / chosen[0])
    if top.folders and not present and "all" in wanted:
        return path, top.folders
    if not top.folders:
        remedy = "its files must be SPLIT/CLASS/FILE or CLASS/FILE"
        raise DataError(f"data set {name!r}: {path} has no folders; {remedy}")
    splits_there = ", ".join(present) or (
        f"the one split all, its class folders lie directly inside: {first_few(top.folders)}"
    )
    raise grammar.no_split(name, split, splits_there)


def splits_there(path: Any) -> list[str]:
    """Return those of train, val, validation and test in a directory that hold class folders."""
    top = storage.entries(path)
    return _present(storage.place(path), top) if top else []


def _present(path: Any, top: storage.Entries) -> list[str]:
    return [name for name in _USUAL_SPLITS if name in top.folders and _folders(path / name)]


def _folders(path: Any) -> list[str]:
    entries = storage.entries(path)
    return entries.folders if entries else []


def _list(root: str, folders: list[str], *, allow_empty: bool) -> Files:
    def images(folder: str) -> list[str]:
        below = storage.files_below(f"{root}/{folder}")
        return [name for name in below if name.lower().endswith(ENDINGS)]

    ends, blobs, counts = [], [], []
    end = 0
    with storage.reading(root), ThreadPoolExecutor(_THREADS) as pool:
        listed = pool.map(images, folders)
        for names in tqdm(listed, f"listing {root}", len(folders), delay=5, leave=False):
            encoded = [name.encode(errors="surrogateescape") for name in names]
            blobs.append(b"".join(encoded))
            ends.append(end + np.cumsum([len(name) for name in encoded], dtype=np.int64))
            end += len(blobs[-1])
            counts.append(len(names))
    empty = [folder for folder, count in zip(folders, counts, strict=True) if not count]
    if not sum(counts) or (empty and not allow_empty):
        raise DataError(
            f"class folders of {root} hold no image ({', '.join(ENDINGS)}): "
            f"{first_few(empty)}; unpack them again, or list the other classes in data.classes"
        )
    return Files(
        root=root,
        folders=tuple(folders),
        labels=np.repeat(np.arange(len(folders), dtype=np.int32), counts),
        blob=b"".join(blobs),
        ends=np.concatenate(ends),
    )


def _read(indices: Sequence[int], *, files: Files) -> list[Record]:
    contents = storage.read_files([files.path(index) for index in indices], _REMEDY)
    return [Record(c, int(files.labels[i])) for c, i in zip(contents, indices, strict=True)]


_ABOUT = ("folder", "folder:PATH", "an ImageFolder: image files in one folder for each class")
add(SourceKind(*_ABOUT, open_folder, is_path=True))
