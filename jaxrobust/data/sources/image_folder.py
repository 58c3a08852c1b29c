"""Image files in one folder for each class: `folder:PATH`, as torchvision's ImageFolder reads."""

import dataclasses
import functools
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from jaxrobust.data import imagenet
from jaxrobust.data.source import DataError, Record, Source, first_few
from jaxrobust.data.sources import headers
from jaxrobust.data.splits import grammar, storage, subsets

PREFIX = "folder:"
# What torchvision's ImageFolder reads.
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Other images, which torchvision leaves out too; and folders that are written by programs.
_OTHERS = (".gif", ".jfif", ".jpe", ".jp2", ".heic", ".heif", ".avif", ".npy", ".tga", ".dcm")
NO_CLASSES = ("__MACOSX", "@eaDir", "lost+found", "__pycache__", "$RECYCLE.BIN")
_TRAIN = ("train", "training")  # whose classes are those of the other splits
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


class _Listing(NamedTuple):
    """The files of class folders, and what else was met there."""

    files: Files
    left_out: Counter[str]  # ending -> files
    inside: set[str]  # the folders in class folders that hold images; "" for these themselves


def open_folder(name: str, split: str, choice: subsets.SubsetChoice) -> Source:
    """Return the split `split` of `folder:PATH`.

    PATH/SPLIT/CLASS/... holds the files, or PATH/CLASS/... those of the one split `all`; `val` and
    `validation` are the same. Classes are the sorted folders, of every split those of `train` where
    that lies beside it, and records are sorted by class and path, as in torchvision, so that a part
    such as [:10%] holds whole classes. Files and folders whose names begin with a dot do not count.
    """
    classes, ids, num_classes = choice
    parsed = grammar.parse(split)
    root, present = _class_folders(name, split, parsed)
    where = f"data set {name!r}, split {split!r}"
    folders = present
    if classes is None:
        imagenet.check_folders(present, num_classes, f"{root}")
    if str(root) != str(storage.place(name.removeprefix(PREFIX))):
        folders = _order(root, present, where, choice)
    if classes is not None:
        labels = subsets.class_labels(classes, folders, len(folders), str(root))
        folders = [folders[label] for label in labels]
    listing = _list(str(root), folders, set(present), allow_empty=ids is not None)
    files = listing.files
    facts = _look(files, where)
    shape = facts and facts.image_shape
    source = Source(
        name=name,
        split=split,
        size=len(files),
        num_classes=len(folders),
        channels=shape[2] if shape else 3,
        image_shape=shape,
        read=functools.partial(_read, files=files),
        remedy=_REMEDY,
        classes=tuple(folders),
        describe=files.path,
        ids_sha256=ids.sha256 if ids else None,
        files_sha256=None if ids else files.sha256(),
        labels=files.labels,
        grey_as_rgb=True,
        notes=(*_notes(root, listing, where), *(facts.notes if facts else ())),
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
        of_split = files.labels if ids is None else files.labels[rows]
        counts = None if parsed.part is None else np.bincount(of_split, minlength=len(folders))
        source = subsets.view(source, rows[part.start : part.stop], split_counts=counts)
    source[0]  # whether files can be read at all shows here
    return source


def _order(root: Any, present: list[str], where: str, choice: subsets.SubsetChoice) -> list[str]:
    """Return the classes of a split in the order of labels: those of `train` beside it, if any.

    All of ImageNet's classes, for a network of these, are in ImageNet's order.
    """
    top = storage.entries(root.parent)
    beside = [name for name in top.folders if name.lower() in _TRAIN] if top else []
    train = next((name for name in beside if _folders(root.parent / name)), root.name)
    if root.name in beside or train == root.name:
        return present
    trained = _folders(root.parent / train)
    foreign = sorted(set(present) - set(trained))
    if not foreign:
        return trained
    if choice.classes is not None:  # which says labels itself
        return [*trained, *foreign]
    if choice.num_classes == len(imagenet.synsets()) and present == list(imagenet.synsets()):
        return present
    raise DataError(
        f"{where}: {root.parent / train} has no class folder for {first_few(foreign)}, so that "
        "a network trained on it has no such class; add the folders there, move them out of "
        f"{root}, or list the classes that are meant in data.classes (--classes)"
    )


def _look(files: Files, where: str) -> headers.HeaderFacts | None:
    remote = storage.is_remote(files.root)

    def heads(places: Sequence[int]) -> list[Any]:
        paths = [files.path(place) for place in places]
        return storage.read_files(paths, _REMEDY) if remote else paths

    def identity() -> str:
        states = () if remote else map(_state, map(files.path, range(len(files))))
        digest = hashlib.sha256(np.fromiter(states, np.dtype("2i8")).tobytes())
        return f"{os.path.abspath(files.root)} {files.sha256()} {digest.hexdigest()}"

    return headers.look(heads, len(files), where, files.path, identity)


def _state(path: str) -> tuple[int, int]:
    try:
        state = os.stat(path)
    except OSError:  # which whoever reads the file says
        return (0, 0)
    return state.st_mtime_ns, state.st_size


def _notes(root: Any, listing: _Listing, where: str) -> list[str]:
    notes = []
    if listing.left_out:
        of = ", ".join(f"{count} {ending}" for ending, count in listing.left_out.most_common())
        notes.append(
            f"{where}: files with other endings than {', '.join(ENDINGS)} are left out: {of}"
        )
    top = storage.entries(root)
    if top and (loose := [file for file in top.files if file.lower().endswith(ENDINGS)]):
        notes.append(
            f"{where}: {len(loose)} images of {root} lie in no class folder and are left out"
        )
    if top and (skipped := [folder for folder in top.folders if folder in NO_CLASSES]):
        notes.append(f"{where}: {', '.join(skipped)} in {root} does not count as a class")
    inside = listing.inside
    if len(inside) > 1 and "" not in inside:  # one name for all, such as images/, is a habit
        notes.append(
            f"{where}: the class folders of {root} hold folders in place of images "
            f"({first_few(sorted(inside))}), whose images are taken for one class each; if these "
            "are the classes, name the folder that holds them"
        )
    return notes


def _class_folders(
    name: str, split: str, parsed: grammar.SplitExpression | None
) -> tuple[Any, list[str]]:
    path = storage.place(name.removeprefix(PREFIX))
    top = storage.entries(path)
    if top is None:
        problem = f"the directory {path} does not exist, or may not be read"
        archive = f"{path} is a file; unpack it, and name the folder of train/ or of the classes"
        raise DataError(f"data set {name!r}: {archive if path.is_file() else problem}")
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
        return path, _folders(path)
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
    return [name for name in entries.folders if name not in NO_CLASSES] if entries else []


def _list(root: str, folders: list[str], present: set[str], *, allow_empty: bool) -> _Listing:
    def listed(folder: str) -> list[str]:
        return storage.files_below(f"{root}/{folder}") if folder in present else []

    left_out: Counter[str] = Counter()
    inside: set[str] = set()
    ends, blobs, counts = [], [], []
    end = 0
    with storage.reading(root), ThreadPoolExecutor(_THREADS) as pool:
        every = pool.map(listed, folders)
        for below in tqdm(every, f"listing {root}", len(folders), delay=5, leave=False):
            names = [name for name in below if name.lower().endswith(ENDINGS)]
            others = [name for name in below if name.lower().endswith(_OTHERS)]
            left_out.update(PurePosixPath(name).suffix.lower() for name in others)
            inside |= {name.rpartition("/")[0].partition("/")[0] for name in names}
            encoded = [name.encode(errors="surrogateescape") for name in names]
            blobs.append(b"".join(encoded))
            ends.append(end + np.cumsum([len(name) for name in encoded], dtype=np.int64))
            end += len(blobs[-1])
            counts.append(len(names))
    absent = set(folders) - present
    counted = zip(folders, counts, strict=True)
    empty = [folder for folder, count in counted if not count and folder not in absent]
    if not sum(counts) or (empty and not allow_empty):
        raise DataError(
            f"class folders of {root} hold no image ({', '.join(ENDINGS)}): "
            f"{first_few(empty)}; unpack them again, or list the other classes in data.classes"
        )
    files = Files(
        root=root,
        folders=tuple(folders),
        labels=np.repeat(np.arange(len(folders), dtype=np.int32), counts),
        blob=b"".join(blobs),
        ends=np.concatenate(ends),
    )
    return _Listing(files, left_out, inside)


def _read(indices: Sequence[int], *, files: Files) -> list[Record]:
    contents = storage.read_files([files.path(index) for index in indices], _REMEDY)
    return [Record(c, int(files.labels[i])) for c, i in zip(contents, indices, strict=True)]
