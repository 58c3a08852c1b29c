"""Parts of a data set, chosen by lists of images or classes, and the index to look them up.

The index of a split is stored next to its records: `jaxrobust-index-SPLIT.npz` with `labels`
int32[N] and the files' `names` S[N], in the order of the records.
"""

import dataclasses
import hashlib
import io
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.data import imagenet
from jaxrobust.data.source import DataError, Record, Source, first_few
from jaxrobust.data.splits import storage
from jaxrobust.runtime.files import caches, whole

ROBUSTBENCH_SHA256 = imagenet.ROBUSTBENCH_SHA256  # `ids_sha256` of @robustbench
CIFAR_SHA256 = (
    "2392b99468320cf4129d1003b9232aa8fde94ab84bc351cd1585884b0a8e3452"  # of CIFAR-10 and CIFAR-100
)

_LISTS: dict[str, Callable[[], tuple[str, ...]]] = {
    "robustbench": imagenet.robustbench,
    "selection": imagenet.selection,
}
_CIFAR = re.compile(r"(tfds:)?cifar(10|100)(:[\d.]+)?")
_PINNED = re.compile(r"(?P<file>.+?)#sha256=(?P<sha256>[0-9a-fA-F]{64})")


class Ids(NamedTuple):
    """A list of images."""

    name: str  # robustbench, selection or a file's name
    lines: tuple[str, ...]  # `CLASS/FILE` or `FILE`, in order
    sha256: str  # of the lines joined with newlines
    imagenet: bool  # whether the lines name classes of ImageNet, whose labels are known


class SubsetChoice(NamedTuple):
    """Which records of a split to select, before taking a part, and for which network."""

    classes: Sequence[tuple[int | None, str]] | None = None  # (index, name), in this order
    ids: Ids | None = None  # only these, in this order
    num_classes: int | None = None  # of the network, if known


class Index(NamedTuple):
    """`labels` int32[N] and `names` S[N] of a split; names are empty if files have none."""

    labels: np.ndarray
    names: np.ndarray


def read_ids(name: str, data_set: str = "") -> Ids:
    """Return the list `robustbench`, `selection` or `FILE[#sha256=HEX]`: UTF-8, one id per line.

    HEX is the output of `sha256sum FILE`, or the `ids_sha256` of a record. For CIFAR, RobustBench
    uses the test images in the order of the official archive, which their ids encode.

    Args:
      name: of the list.
      data_set: decides which `robustbench`: cifar10, cifar100, or else ImageNet.
    Raises:
      DataError: no such file; another sha256; an empty list; an id that is repeated or an absolute
        path.
    """
    if name == "robustbench" and _CIFAR.fullmatch(data_set):
        lines = tuple(f"test_{number:05}" for number in range(10_000))
        return Ids(name, lines, _sha256(lines), imagenet=False)
    if name in _LISTS:
        lines = _LISTS[name]()
        return Ids(name, lines, _sha256(lines), name == "robustbench")
    pinned = _PINNED.fullmatch(name)
    file = pinned["file"] if pinned else name
    if "#" in file:
        raise DataError(f"@{name}: pin a list of ids as FILE#sha256=HEX, with 64 hex digits")
    content = _read_list(file, f"@{file} is neither robustbench, selection nor a readable file")
    lines = _lines(content, file)
    digest = hashlib.sha256(content).hexdigest()
    if pinned and pinned["sha256"].lower() not in (digest, _sha256(lines)):
        wanted = pinned["sha256"].lower()
        raise DataError(f"the list of ids {file} has sha256 {digest}, expected {wanted}")
    if absolute := [
        line
        for line in lines
        if line.startswith("/") or "://" in line or PureWindowsPath(line).is_absolute()
    ]:
        fault = f"absolute paths: {first_few(absolute)}"
        raise DataError(f"the list of ids {file} has {fault}; ids are CLASS/FILE or FILE")
    if repeated := [line for line, count in Counter(lines).items() if count > 1]:
        raise DataError(f"the list of ids {file} names images twice: {first_few(repeated)}")
    return Ids(file, lines, _sha256(lines), imagenet=False)


def common(one: str, other: str, data_set: str = "") -> bool:
    """Return whether two lists may share files; an unreadable list may name any file.

    Files in two class folders may have the same name; if a list omits the folders, only the names
    are compared.
    """
    try:
        lists = [read_ids(name, data_set).lines for name in (one, other)]
    except DataError:
        return True
    have_folders = all("/" in line for lines in lists for line in lines)
    names = [
        {line if have_folders else line.rpartition("/")[2] for line in lines} for lines in lists
    ]
    return not names[0].isdisjoint(names[1])


def read_classes(name: str) -> list[tuple[int | None, str]]:
    """Read (index or None, class) of `imagenet100` or of a file of `CLASS` or `INDEX<TAB>CLASS`."""
    if name == "imagenet100":
        return [(None, line) for line in imagenet.imagenet100()]
    content = _read_list(name, f"data.classes={name} is neither imagenet100 nor a readable file")
    rows: list[tuple[int | None, str]] = []
    for line in _lines(content, name):
        index, tab, line_class = line.partition("\t")
        rows.append((int(index), line_class.strip()) if tab and index.isdigit() else (None, line))
    if repeated := [c for c, count in Counter(c for _, c in rows).items() if count > 1]:
        raise DataError(f"the list of classes {name} names classes twice: {first_few(repeated)}")
    return rows


def class_labels(
    wanted: Sequence[tuple[int | None, str]], names: Sequence[str], num_classes: int, where: str
) -> list[int]:
    """Look up the labels of a list's classes; `names` are the data set's class names, if any."""
    if not names:
        bad = [name for index, name in wanted if index is None or index >= num_classes]
        if bad:
            raise DataError(
                f"{where} does not name its {num_classes} classes; list them as INDEX<TAB>NAME "
                f"with valid indices, including {first_few(bad)}"
            )
        return [index for index, _ in wanted if index is not None]
    labels = {name: label for label, name in enumerate(names)}
    if unknown := [name for _, name in wanted if name not in labels]:
        raise DataError(
            f"{where} does not have the classes {first_few(unknown)}; its {len(names)} classes "
            f"are {first_few(list(names))}"
        )
    return [labels[name] for _, name in wanted]


def find(
    ids: Ids,
    labels: np.ndarray,
    names: Iterable[str],
    classes: Sequence[str],
    where: str,
    *,
    has_all_classes: bool,
) -> np.ndarray:
    """Find the records `int64[K]` of a list of ids, in the order of the list.

    Args:
      labels, names: of all records: indices into `classes`, file names relative to their class.
      classes: names; empty if there are none.
      where: the data set, for messages.
      has_all_classes: whether the labels cover all classes of the data set.
    """
    classes = classes or (imagenet.synsets() if has_all_classes and ids.imagenet else ())
    if not classes and any("/" in line for line in ids.lines):
        raise DataError(f"{where} does not name its classes; write ids as bare file names")
    folders = {line.partition("/")[0] for line in ids.lines if "/" in line}
    if foreign := sorted(folders - set(classes)):
        lacks = f"belong to classes that {where} does not have: {first_few(foreign)}"
        raise DataError(f"ids of {ids.name} {lacks}")
    records, elsewhere, several = _matched(ids, labels, names, classes)
    if several:
        files = f"several files for ids of {ids.name}: {first_few(several)}"
        raise DataError(f"{where} has {files}; write CLASS/FILE")
    if wrong := [row for row in elsewhere if records[row] < 0]:
        label = elsewhere[wrong[0]]
        raise DataError(
            f"{where} disagrees with {ids.name} about {len(wrong)} of {len(ids.lines)} ids: it has "
            f"the label {label} ({classes[label]}) for {ids.lines[wrong[0]]}; prepare the data set "
            "again"
        )
    missing = [line for line, record in zip(ids.lines, records, strict=True) if record < 0]
    if missing:
        of = f"{len(missing)} of the {len(ids.lines)} images of {ids.name}"
        raise DataError(f"{where} lacks {of}: {first_few(missing)}")
    if ids.imagenet and has_all_classes:
        expected = {synset: label for label, synset in enumerate(imagenet.synsets())}
        for line, label in zip(ids.lines, labels[records].tolist(), strict=True):
            if label != (right := expected[line.partition("/")[0]]):
                raise DataError(
                    f"{where} has the label {label} for {line}, which is class {right} of "
                    "ImageNet's 1,000: the labels differ"
                )
    return records


def _matched(
    ids: Ids, labels: np.ndarray, names: Iterable[str], classes: Sequence[str]
) -> tuple[np.ndarray, dict[int, int], list[str]]:
    """Return the record of each id (-1: none), and two kinds of problems."""
    # These are ids whose file has another class (row -> its label), and ids that match several
    # files.
    rows_of: dict[str, list[int]] = {}
    for row, line in enumerate(ids.lines):
        rows_of.setdefault(line.rpartition("/")[2], []).append(row)
    records = np.full(len(ids.lines), -1, np.int64)
    elsewhere: dict[int, int] = {}
    several: list[str] = []
    for record, name in enumerate(names):
        for row in rows_of.get(name.rpartition("/")[2], ()):
            folder, slash, path = ids.lines[row].partition("/")
            if slash and folder != classes[labels[record]]:
                elsewhere[row] = int(labels[record])
            elif not slash or path == name:
                if records[row] >= 0:
                    several.append(ids.lines[row])
                records[row] = record
    return records, elsewhere, several


@dataclasses.dataclass(frozen=True)
class _View:
    """Reads and names the records `rows` of a source; labels become `lookup[label]`."""

    source: Source
    rows: Sequence[int]
    lookup: np.ndarray | None

    def __call__(self, indices: Sequence[int]) -> list[Record]:
        records = self.source.read([int(self.rows[index]) for index in indices])
        if self.lookup is None:
            return records
        return [Record(image, int(self.lookup[label])) for image, label in records]

    def describe(self, index: int) -> str:
        return self.source.describe(int(self.rows[index]))


def view(
    source: Source, rows: Sequence[int], lookup: np.ndarray | None = None, **changes: Any
) -> Source:
    """Select the records `rows`, in this order; `lookup` maps each label to `lookup[label]`."""
    files, labels, places = source.files_sha256, source.labels, np.asarray(rows, np.int64)
    if files is not None:
        chosen = hashlib.sha256(files.encode() + places.tobytes())
        chosen.update(b"" if lookup is None else lookup.tobytes())
        files = chosen.hexdigest()
    if labels is not None:
        labels = labels[places] if lookup is None else lookup[labels[places]]
    reader = _View(dataclasses.replace(source, labels=None), rows, lookup)
    changes |= {"read": reader, "describe": reader.describe}
    return dataclasses.replace(source, size=len(rows), files_sha256=files, labels=labels, **changes)


def index_name(split: str) -> str:
    """Return the name of a split's index file."""
    return f"jaxrobust-index-{split}.npz"


def write_index(
    directory: str | os.PathLike, split: str, labels: np.ndarray, names: Sequence[bytes]
) -> None:
    """Write the index of a full split atomically; several processes may do so."""
    content = io.BytesIO()
    np.savez(content, labels=np.asarray(labels, np.int32), names=np.asarray(names, np.bytes_))
    path = storage.place(directory) / index_name(split)
    if storage.is_remote(path):
        path.write_bytes(content.getvalue())
        return
    if not os.stat(directory).st_mode & 0o222:  # root, as in containers, could write anyway
        raise PermissionError(f"{directory} is read-only")
    with whole.writing(Path(path)) as part:
        part.write_bytes(content.getvalue())


def read_index(directory: str | os.PathLike, split: str) -> Index | None:
    """Return the index of a split, or None if it is missing or damaged."""
    path = storage.place(directory) / index_name(split)
    try:
        if not path.exists():
            return None
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            index = Index(arrays["labels"], arrays["names"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    fits = index.labels.shape == index.names.shape and index.labels.ndim == 1
    return index if fits and index.names.dtype.kind == "S" else None


def _read_list(file: str, problem: str) -> bytes:
    path = storage.place(file)
    try:
        return path.read_bytes()
    except Exception as error:  # OSError; bucket libraries have their own types
        raise DataError(f"{problem} ({' '.join(str(error).split())})") from error


def _lines(content: bytes, file: str) -> tuple[str, ...]:
    try:
        texts = content.decode("utf-8-sig").splitlines()  # Windows editors write a BOM
    except UnicodeDecodeError as error:
        raise DataError(f"the list {file} is not a text file ({error})") from error
    lines = tuple(line for text in texts if (line := text.strip()))
    if not lines:
        raise DataError(f"the list {file} is empty; write one name per line")
    return lines


def _sha256(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def index_cache() -> Path:
    """Return the folder for indices of data sets whose own folder is read-only."""
    return caches.folder("index")
