"""One folder of image files per class: `folder:PATH`, as torchvision's ImageFolder reads it."""

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from jaxrobust.data import imagenet
from jaxrobust.data.source import DataError, Record, Source, first_few
from jaxrobust.data.sources import headers
from jaxrobust.data.splits import choosing, grammar, storage, subsets

PREFIX = "folder:"
# The formats that torchvision's ImageFolder reads.
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Other image formats, which torchvision skips too, and folders that programs create.
_OTHERS = (".gif", ".jfif", ".jpe", ".jp2", ".heic", ".heif", ".avif", ".npy", ".tga", ".dcm")
NO_CLASSES = ("__MACOSX", "@eaDir", "lost+found", "__pycache__", "$RECYCLE.BIN")
_TRAIN = ("train", "training")  # its classes apply to the other splits
_USUAL_SPLITS = ("train", "val", "validation", "test")
_REMEDY = "restore the file, or remove it and start a new run"
_THREADS = 16  # a slow disk or a bucket serves many listings at once


@dataclasses.dataclass(frozen=True)
class Files:
    """The paths of N files without N Python objects: cheap to store and to send to workers."""

    root: str  # contains the class folders
    folders: tuple[str, ...]  # in the order of labels
    labels: np.ndarray  # int32[N]
    blob: bytes  # the paths within the class folders, concatenated
    ends: np.ndarray  # where each path ends, int64[N]

    def name(self, index: int) -> str:
        """Return a file's path within its class folder."""
        start = self.ends[index - 1] if index else 0
        return self.blob[start : self.ends[index]].decode(errors="surrogateescape")

    def path(self, index: int) -> str:
        """Return a file's full path."""
        return f"{self.root}/{self.folders[self.labels[index]]}/{self.name(index)}"

    def sha256(self) -> str:
        """Hash the classes, and all names and labels in order."""
        digest = hashlib.sha256("\0".join(self.folders).encode(errors="surrogateescape"))
        for part in (self.labels.tobytes(), self.ends.tobytes(), self.blob):
            digest.update(part)
        return digest.hexdigest()

    def heads(self, places: Sequence[int]) -> list[Any]:
        """Return the files' content, or the paths of local ones, to read only the headers."""
        paths = [self.path(place) for place in places]
        return storage.read_files(paths, _REMEDY) if storage.is_remote(self.root) else paths

    def identity(self) -> str:
        """Return a text that changes with the files; local ones also count by time and size."""
        count = 0 if storage.is_remote(self.root) else len(self.labels)
        states = np.zeros((count, 2), np.int64)
        for index in range(count):
            try:
                state = os.stat(self.path(index))
                states[index] = state.st_mtime_ns, state.st_size
            except OSError:  # reported when the file is read
                pass
        states_sha256 = hashlib.sha256(states.tobytes()).hexdigest()
        return f"{os.path.abspath(self.root)} {self.sha256()} {states_sha256}"

    def read(self, indices: Sequence[int]) -> list[Record]:
        """Read the records at these places."""
        contents = storage.read_files([self.path(index) for index in indices], _REMEDY)
        return [Record(c, int(self.labels[i])) for c, i in zip(contents, indices, strict=True)]


def open_folder(name: str, split: str, choice: subsets.SubsetChoice) -> Source:
    """Return the split `split` of `folder:PATH`.

    Files are in PATH/SPLIT/CLASS/..., or in PATH/CLASS/... for the single split `all`; `val` and
    `validation` are synonyms. Classes are the sorted folders; every split uses the classes of a
    `train` next to it. Records are sorted by class and path, as in torchvision, so a part such as
    [:10%] holds whole classes. Files and folders whose names begin with a dot are ignored.
    """
    classes, ids, num_classes = choice
    parsed = grammar.parse(split)
    top = storage.place(name.removeprefix(PREFIX))
    root, present = _class_folders(name, split, parsed, top)
    assert parsed is not None
    where = f"data set {name!r}, split {split!r}"
    folders = present
    if classes is None:
        imagenet.check_folders(present, num_classes, f"{root}")
    if str(root) != str(top):
        folders = _in_order(root, present, where, choice)
    if classes is not None:
        labels = subsets.class_labels(classes, folders, len(folders), str(root))
        folders = [folders[label] for label in labels]
    files, notes = _list(root, folders, set(present), where, allow_empty=ids is not None)
    size = len(files.labels)
    facts = headers.look(files.heads, size, where, files.path, files.identity)
    shape = facts and facts.image_shape
    source = Source(
        name=name,
        split=split,
        size=size,
        num_classes=len(folders),
        channels=shape[2] if shape else 3,
        image_shape=shape,
        read=files.read,
        remedy=_REMEDY,
        classes=tuple(folders),
        describe=files.path,
        files_sha256=None if ids else files.sha256(),
        labels=files.labels,
        grey_as_rgb=True,
        notes=(*notes, *(facts.notes if facts else ())),
    )
    source = choosing.choose(
        source,
        parsed,
        split,
        choice._replace(classes=None),
        lambda: (files.labels, map(files.name, range(size))),
        where=str(root) if classes is None else f"{root} with data.classes",
        has_all_classes=classes is None,
    )
    source[0]  # fails now if files cannot be read at all
    return source


def _class_folders(
    name: str, split: str, parsed: grammar.SplitExpression | None, path: Any
) -> tuple[Any, list[str]]:
    """Find the folder of a split in a place, and its class folders."""
    top = storage.entries(path)
    if top is None:
        problem = f"the directory {path} does not exist or cannot be read"
        archive = f"{path} is a file; unpack it, and name the folder with train/ or the classes"
        raise DataError(f"data set {name!r}: {archive if path.is_file() else problem}")
    present = splits_there(path)
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
        remedy = "arrange its files as SPLIT/CLASS/FILE or CLASS/FILE"
        raise DataError(f"data set {name!r}: {path} has no folders; {remedy}")
    splits = ", ".join(present) or (
        f"only the split all, whose class folders are directly inside: {first_few(top.folders)}"
    )
    raise grammar.no_split(name, split, splits)


def splits_there(path: Any) -> list[str]:
    """Return those of train, val, validation and test that exist and hold class folders."""
    place, top = storage.place(path), storage.entries(path)
    folders = top.folders if top else []
    return [name for name in _USUAL_SPLITS if name in folders and _folders(place / name)]


def _folders(path: Any) -> list[str]:
    entries = storage.entries(path)
    return [name for name in entries.folders if name not in NO_CLASSES] if entries else []


def _in_order(root: Any, present: list[str], where: str, choice: subsets.SubsetChoice) -> list[str]:
    """Return the classes of a split in the order of labels: those of an adjacent `train`, if any.

    If they are all of ImageNet's and the network has these, they are in ImageNet's order.
    """
    top = storage.entries(root.parent)
    trains = [name for name in top.folders if name.lower() in _TRAIN] if top else []
    train = next((name for name in trains if _folders(root.parent / name)), root.name)
    if root.name in trains or train == root.name:
        return present
    trained = _folders(root.parent / train)
    foreign = sorted(set(present) - set(trained))
    if not foreign:
        return trained
    if choice.classes is not None:  # which defines the labels itself
        return [*trained, *foreign]
    if choice.num_classes == len(imagenet.synsets()) and present == list(imagenet.synsets()):
        return present
    raise DataError(
        f"{where}: {root.parent / train} has no class folder for {first_few(foreign)}, so a "
        f"network trained on it lacks these classes; add the folders there, move them out of "
        f"{root}, or list the intended classes in data.classes (--classes)"
    )


def _list(
    root: Any, folders: list[str], present: set[str], where: str, *, allow_empty: bool
) -> tuple[Files, list[str]]:
    """List the files of class folders, and report what else is there."""

    def listed(folder: str) -> list[str]:
        return storage.files_below(f"{root}/{folder}") if folder in present else []

    left_out: Counter[str] = Counter()
    inside: set[str] = set()  # folders inside class folders that hold images
    names: list[bytes] = []
    counts = []
    with storage.reading(root), ThreadPoolExecutor(_THREADS) as pool:
        contents = pool.map(listed, folders)
        for paths in tqdm(contents, f"listing {root}", len(folders), delay=5, leave=False):
            images = [path for path in paths if path.lower().endswith(ENDINGS)]
            others = [path for path in paths if path.lower().endswith(_OTHERS)]
            left_out.update(PurePosixPath(path).suffix.lower() for path in others)
            inside |= {path.rpartition("/")[0].partition("/")[0] for path in images}
            names += [path.encode(errors="surrogateescape") for path in images]
            counts.append(len(images))
    counted = zip(folders, counts, strict=True)
    empty = [folder for folder, count in counted if not count and folder in present]
    if not names or (empty and not allow_empty):
        raise DataError(
            f"class folders of {root} hold no images ({', '.join(ENDINGS)}): "
            f"{first_few(empty)}; unpack them again, or list the other classes in data.classes"
        )
    labels = np.repeat(np.arange(len(folders), dtype=np.int32), counts)
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    files = Files(str(root), tuple(folders), labels, b"".join(names), ends)
    notes = []
    if left_out:
        of = ", ".join(f"{count} {ending}" for ending, count in left_out.most_common())
        notes.append(f"files that do not end in {', '.join(ENDINGS)} are left out: {of}")
    top = storage.entries(root) or storage.Entries([], [])
    if loose := [file for file in top.files if file.lower().endswith(ENDINGS)]:
        notes.append(f"{len(loose)} images in {root} are outside its class folders and left out")
    if skipped := [folder for folder in top.folders if folder in NO_CLASSES]:
        notes.append(f"not counted as classes in {root}: {', '.join(skipped)}")
    if len(inside) > 1 and "" not in inside:  # one common name, such as images/, is usual
        notes.append(
            f"the class folders of {root} hold subfolders of images "
            f"({first_few(sorted(inside))}), which all count for their class folder; if these "
            "subfolders are the classes, name the folder that holds them"
        )
    return files, [f"{where}: {note}" for note in notes]
