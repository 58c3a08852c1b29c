"""The official archives of CIFAR-10 and CIFAR-100: which there are, and what they hold.

Facts from https://www.cs.toronto.edu/~kriz/cifar.html, which also gives the MD5 of each; the sha256
are those that Keras (python) and TFDS (binary) check. Nothing is unpacked, and nothing that a
pickle asks for is called but what makes NumPy's arrays.
"""

import io
import pickle
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxrobust.data.prepare.shards import sha256
from jaxrobust.data.splits.known_sizes import IMAGES

ADDRESS = "https://www.cs.toronto.edu/~kriz"
SIZES = IMAGES["cifar10"]  # of both
SHAPE = (32, 32, 3)
_PIXELS = 3 * 32 * 32


class Archive(NamedTuple):
    """One of the official files."""

    dataset: str  # TFDS' name
    file: str
    size: int
    sha256: str
    folder: str  # in it, where all lies
    members: Mapping[str, Sequence[str]]  # split -> the files of its images, in order
    labels: Mapping[str, str]  # feature, in the order of a binary row -> its key in a pickle
    names: Mapping[str, tuple[str, str]]  # feature -> (file of classes' names, key in a pickle)

    @property
    def pickled(self) -> bool:
        """Whether its members are pickles, not plain bytes."""
        return "python" in self.file


class ArchiveContents(NamedTuple):
    """The contents of an archive, in its order."""

    images: dict[str, np.ndarray]  # split -> uint8[N,32,32,3]
    labels: dict[str, dict[str, np.ndarray]]  # split -> feature -> i64[N]
    classes: dict[str, tuple[str, ...]]  # feature -> names


_BATCHES = [f"data_batch_{number}" for number in range(1, 6)]
_FINE, _COARSE = "fine_label_names", "coarse_label_names"
# The first one of a data set is the one that is downloaded.
ARCHIVES = (
    Archive(
        *("cifar10", "cifar-10-python.tar.gz", 170_498_071),
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        "cifar-10-batches-py",
        {"train": _BATCHES, "test": ["test_batch"]},
        {"label": "labels"},
        {"label": ("batches.meta", "label_names")},
    ),
    Archive(
        *("cifar10", "cifar-10-binary.tar.gz", 170_052_171),
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        "cifar-10-batches-bin",
        {"train": [f"{name}.bin" for name in _BATCHES], "test": ["test_batch.bin"]},
        {"label": ""},
        {"label": ("batches.meta.txt", "")},
    ),
    Archive(
        *("cifar100", "cifar-100-python.tar.gz", 169_001_437),
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        "cifar-100-python",
        {"train": ["train"], "test": ["test"]},
        {"coarse_label": "coarse_labels", "label": "fine_labels"},
        {"coarse_label": ("meta", _COARSE), "label": ("meta", _FINE)},
    ),
    Archive(
        *("cifar100", "cifar-100-binary.tar.gz", 168_513_733),
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        "cifar-100-binary",
        {"train": ["train.bin"], "test": ["test.bin"]},
        {"coarse_label": "", "label": ""},
        {"coarse_label": (f"{_COARSE}.txt", ""), "label": (f"{_FINE}.txt", "")},
    ),
)


def of(dataset: str) -> list[Archive]:
    """Return the archives of a data set."""
    return [archive for archive in ARCHIVES if archive.dataset == dataset]


def identify(path: Path, dataset: str) -> Archive:
    """Recognise an archive of a data set by its sha256."""
    if not path.is_file():
        kind = "is a folder; give the archive itself" if path.is_dir() else "is no file"
        raise ValueError(f"--from {path} {kind}, such as {of(dataset)[0].file}")
    digest, size = sha256(path), path.stat().st_size
    named = {archive.sha256: archive for archive in ARCHIVES}
    if (match := named.get(digest)) and match.dataset == dataset:
        return match
    if match:
        raise ValueError(
            f"{path} is the archive of {match.dataset}, not of {dataset}: "
            f"`jaxrobust prepare {match.dataset} --from {path}`"
        )
    right = next((a for a in of(dataset) if a.file == path.name), of(dataset)[0])
    with path.open("rb") as file:
        page = file.read(200).lstrip().startswith(b"<")
    what = "a web page" if page else f"{size:,} bytes"
    if 0 < size < right.size and not page:
        what += f" of {right.size:,}, it is cut off"
    sums = f"sha256 {digest[:12]}... instead of {right.sha256[:12]}..."
    raise ValueError(f"{path} is not {right.file}: {what or 'empty'}, {sums}; {_again(dataset)}")


def _again(dataset: str) -> str:
    return f"remove it and run `jaxrobust prepare {dataset}`, which downloads it"


def read(path: Path, archive: Archive) -> ArchiveContents:
    """Read the contents of an archive."""
    try:
        files = _members(path, archive)
        images: dict[str, np.ndarray] = {}
        labels: dict[str, dict[str, np.ndarray]] = {}
        for split, names in archive.members.items():
            parts = [_part(files[name], archive) for name in names]
            images[split] = np.concatenate([pixels for pixels, _ in parts])
            labels[split] = {k: np.concatenate([of[k] for _, of in parts]) for k in archive.labels}
        classes = {k: _names(files[name], key) for k, (name, key) in archive.names.items()}
        content = ArchiveContents(images, labels, classes)
        _check(content)
    except (
        *(tarfile.TarError, EOFError, OSError, zlib.error),
        *(pickle.UnpicklingError, KeyError, IndexError, TypeError, ValueError, AttributeError),
    ) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path} is damaged ({reason}); {_again(archive.dataset)}") from error
    return content


def _members(path: Path, archive: Archive) -> dict[str, bytes]:
    wanted = {name for names in archive.members.values() for name in names}
    wanted |= {name for name, _ in archive.names.values()}
    members = {}
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            folder, _, name = member.name.removeprefix("./").partition("/")
            if folder == archive.folder and name in wanted and member.isfile():
                file = tar.extractfile(member)
                assert file is not None
                members[name] = file.read()
    if missing := sorted(wanted - members.keys()):
        raise ValueError(f"it holds no {archive.folder}/{missing[0]}")
    return members


def _part(content: bytes, archive: Archive) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the images and labels of one file: its pixels are planes of red, green and blue."""
    if archive.pickled:
        batch = unpickle(content)
        pixels = np.asarray(batch["data"])
        labels = {feature: np.asarray(batch[key]) for feature, key in archive.labels.items()}
    else:
        width = len(archive.labels)
        rows = np.frombuffer(content, np.uint8).reshape(-1, width + _PIXELS)
        pixels = rows[:, width:]
        labels = {feature: rows[:, i] for i, feature in enumerate(archive.labels)}
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
        raise ValueError(f"its images are {pixels.dtype}{list(pixels.shape)}")
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    for feature, values in labels.items():
        if values.dtype.kind not in "iu" or values.shape != pixels.shape[:1]:
            raise ValueError(f"its {feature} are {values.dtype}{list(values.shape)}")
    return images, {feature: values.astype(np.int64) for feature, values in labels.items()}


def _names(content: bytes, key: str) -> tuple[str, ...]:
    return tuple(map(str, unpickle(content)[key] if key else content.decode().split()))


def _check(archive: ArchiveContents) -> None:
    sizes = {split: len(images) for split, images in archive.images.items()}
    if sizes != SIZES:
        raise ValueError(f"it holds {sizes} images, not {SIZES}")
    for split, labels in archive.labels.items():
        for feature, values in labels.items():
            classes = len(archive.classes[feature])
            if not classes or values.min() < 0 or values.max() >= classes:
                raise ValueError(f"{feature} of {split} are none of its {classes} classes")


def unpickle(content: bytes | BinaryIO) -> Any:
    """Read a pickle of arrays, lists, texts and numbers; it can call nothing else."""
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    return _Unpickler(file, encoding="latin1").load()


def _array(*_: object) -> np.ndarray:
    """Do what NumPy's pickles ask for first: an empty array, which its state then fills."""
    return np.ndarray((0,), np.uint8)


def _bytes(text: str, encoding: str) -> bytes:
    """Do what Python 3 asks for where it writes bytes in Python 2's protocol."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """A pickle can name any function to be called; these are all that there are here."""

    _KNOWN = {  # noqa: RUF012  # of a class that lives for a call
        ("numpy.core.multiarray", "_reconstruct"): _array,
        ("numpy._core.multiarray", "_reconstruct"): _array,
        ("numpy", "ndarray"): "the kind of array, which is not called",
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _bytes,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Look up one of the few known classes."""
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not called")
        return self._KNOWN[module, name]
