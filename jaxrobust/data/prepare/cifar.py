"""`jaxrobust prepare cifar10 [--out OUT]`: CIFAR-10 or -100 as ArrayRecord.

The official archive is downloaded, or taken from --from ARCHIVE: the python or the binary version,
recognized by its sha256. OUT/cifar10/3.0.2 is then what `tfds build` would write: the same ids and
labels in the same order, the same pixels (as PNG), for CIFAR-100 with coarse_label; jaxrobust, TFDS
and Grain read it. It takes a minute, and --check reads everything again.

Exit codes: 0 done; 2 a mistake, or an archive that is not the official one, with one sentence on
stderr; 3 stopped for another reason that it names (no network, full disk); 130 interrupted.
"""

import argparse
import functools
import hashlib
import io
import pickle
import tarfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
from PIL import Image

from jaxrobust.data.prepare import command, writer
from jaxrobust.data.prepare.pseudo_labelled import unpickle
from jaxrobust.data.sources import tfds
from jaxrobust.data.splits.known_sizes import IMAGES
from jaxrobust.runtime.files import download

# From https://www.cs.toronto.edu/~kriz/cifar.html, which also lists the MD5 of each archive. The
# sha256 are the ones that Keras (python) and TFDS (binary) check.
ADDRESS = "https://www.cs.toronto.edu/~kriz"
SIZES = IMAGES["cifar10"]  # the same for both data sets
VERSION = "3.0.2"  # TFDS's version of both
_PIXELS = 3 * 32 * 32
_CITATION = """@techreport{Krizhevsky2009,
  author = {Alex Krizhevsky},
  title = {Learning Multiple Layers of Features from Tiny Images},
  institution = {University of Toronto},
  year = {2009}
}
"""


class Archive(NamedTuple):
    """One of the official files."""

    dataset: str  # TFDS's name
    file: str
    size: int
    sha256: str
    folder: str  # the archive's only folder
    members: Mapping[str, Sequence[str]]  # split -> image files, in order
    labels: Mapping[str, str]  # feature, in the order of a binary row -> its key in a pickle
    names: Mapping[str, tuple[str, str]]  # feature -> (file of class names, key in a pickle)


class ArchiveContents(NamedTuple):
    """The contents of an archive, in its order."""

    images: dict[str, np.ndarray]  # split -> uint8[N,32,32,3]
    labels: dict[str, dict[str, np.ndarray]]  # split -> feature -> i64[N]
    classes: dict[str, tuple[str, ...]]  # feature -> names


_BATCHES = [f"data_batch_{number}" for number in range(1, 6)]
_FINE, _COARSE = "fine_label_names", "coarse_label_names"
# The first archive of each data set is the one to download.
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


def parse(dataset: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, where hyphens and underscores are the same."""
    parser = command.parser(__doc__, dataset)
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="ARCHIVE",
        help=f"Official archive, such as {_archives_of(dataset)[0].file}; default: download "
        f"it from {ADDRESS}.",
    )
    parser.flag(
        "out",
        default=str(tfds.data_directory()),
        help="Folder for NAME/VERSION, a data_dir for jaxrobust and TFDS; default: %(default)s.",
    )
    command.common_flags(parser)
    args = parser.parse_args(argv)
    args.name = dataset
    if args.check and args.source:
        parser.error("give either --from, to write the data set, or --check")
    return args


def _archives_of(dataset: str) -> list[Archive]:
    return [archive for archive in ARCHIVES if archive.dataset == dataset]


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Write the data set and return a summary."""
    name, path = args.name, args.source
    folder = Path(args.out) / name / VERSION
    if not path and (folder / writer.INFO).exists():
        if not (folder / writer.SETTINGS).exists():
            raise ValueError(
                f"{folder} was written by another tool; use it as it is, or give another --out"
            )
        return command.done(folder)
    start = time.perf_counter()
    if not path:
        path = _download(_archives_of(name)[0])
    kind = identify(path, name)
    command.say(f"reading {path}")
    archive = read(path, kind)
    orders = {split: tfds_order(split, range(len(x))) for split, x in archive.images.items()}
    splits = {}
    for split, order in orders.items():
        rows = np.empty(len(order), [("name", "S11"), ("label", "<i4"), ("size", "<i8")])
        rows["name"] = [f"{split}_{position:05}".encode() for position in order.tolist()]
        rows["label"] = archive.labels[split]["label"][order]
        rows["size"] = _PIXELS
        splits[split] = writer.RawSplit(path, rows)
    about = writer.About(
        name=name,
        version=VERSION,
        description=f"The {len(archive.classes['label'])} classes of "
        f"{name.upper().replace('R1', 'R-1')}, 60,000 images of 32x32 pixels from the official "
        "archive, written by jaxrobust's data.prepare.",
        module="tensorflow_datasets.image_classification.cifar",
        labels=archive.classes,
        shape=(32, 32, 3),
        name_key="id",
        citation=_CITATION,
        homepage=f"{ADDRESS}/cifar.html",
        # Not the file sizes, which depend on the installed zlib; these identify the data.
        sizes={split: images.nbytes for split, images in archive.images.items()},
    )
    rule = "md5(SPLIT + position in the archive), as TFDS"
    plan = writer.DatasetPlan(folder, about, splits, dict.fromkeys(splits, 1), rule)
    listed = time.perf_counter()
    with writer.claimed_for(plan):
        todo = writer.unwritten(plan, verify=True)
        command.write(plan, functools.partial(_write, archive=archive, orders=orders), todo, 1)
        writer.finish(plan)
    size = command.images_of(todo) * _PIXELS
    return command.done(folder) | command.effort(todo, size, start=start, listed=listed)


def _download(archive: Archive) -> Path:
    otherwise = f", with --from {archive.file}"
    try:
        return download.fetch(
            f"{ADDRESS}/{archive.file}", "data", sha256=archive.sha256, tell=command.say
        )
    except ValueError as error:
        raise ValueError(f"{error}{otherwise}") from error
    except download.Unreachable as error:
        raise download.Unreachable(f"{error}{otherwise}") from error


def tfds_order(split: str, keys: Iterable[object]) -> np.ndarray:
    """Return the order in which TFDS writes the records of a split: by the MD5 of salt and key.

    Args:
      split: the salt that TFDS uses.
      keys: the records' keys in the data set's own order; for CIFAR, their positions.
    Returns:
      i64[N], a permutation.
    Source: tensorflow_datasets 4.9.10, core/shuffle.py and core/hashing.py; parity with what its
    builders write: tests/data/prepare/test_cifar.py.
    """
    digests = [hashlib.md5(f"{split}{key}".encode()).digest() for key in keys]
    return np.array(sorted(range(len(digests)), key=digests.__getitem__))


def _write(
    shard: writer.Shard, *, archive: ArchiveContents, orders: dict[str, np.ndarray]
) -> Iterator[writer.WorkDone]:
    images, labels = archive.images[shard.split], archive.labels[shard.split]
    records = (
        {feature: int(values[position]) for feature, values in labels.items()}
        | {"id": f"{shard.split}_{position:05}".encode(), "image": png(images[position])}
        for position in orders[shard.split].tolist()
    )
    return writer.put(shard, records, _PIXELS)


def png(image: np.ndarray) -> bytes:
    """Encode an image uint8[H,W,3] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def identify(path: Path, dataset: str) -> Archive:
    """Recognize an archive of a data set by its sha256."""
    archives = _archives_of(dataset)
    if not path.is_file():
        kind = "is a folder; give the archive itself" if path.is_dir() else "is not a file"
        raise ValueError(f"--from {path} {kind}, such as {archives[0].file}")
    digest, size = writer.sha256(path), path.stat().st_size
    match = next((archive for archive in ARCHIVES if archive.sha256 == digest), None)
    if match and match.dataset == dataset:
        return match
    if match:
        raise ValueError(
            f"{path} is the archive of {match.dataset}, not of {dataset}; run "
            f"`jaxrobust prepare {match.dataset} --from {path}`"
        )
    right = next((archive for archive in archives if archive.file == path.name), archives[0])
    with path.open("rb") as file:
        is_page = file.read(200).lstrip().startswith(b"<")
    content = "a web page" if is_page else f"{size:,} bytes"
    if 0 < size < right.size and not is_page:
        content += f" of {right.size:,} (truncated)"
    sums = f"sha256 {digest[:12]}... instead of {right.sha256[:12]}..."
    raise ValueError(f"{path} is not {right.file}: {content}, {sums}; {_again(dataset)}")


def _again(dataset: str) -> str:
    return f"remove it and run `jaxrobust prepare {dataset}`, which downloads it"


def read(path: Path, archive: Archive) -> ArchiveContents:
    """Read the contents of an archive without unpacking it."""
    try:
        files = _members(path, archive)
        content = ArchiveContents({}, {}, {})
        for feature, (name, key) in archive.names.items():
            names = unpickle(files[name])[key] if key else files[name].decode().split()
            content.classes[feature] = tuple(map(str, names))
        for split, members in archive.members.items():
            parts = [_part(files[name], archive) for name in members]
            content.images[split] = np.concatenate([pixels for pixels, _ in parts])
            content.labels[split] = {
                feature: np.concatenate([labels[feature] for _, labels in parts])
                for feature in archive.labels
            }
        sizes = {split: len(images) for split, images in content.images.items()}
        if sizes != SIZES:
            raise ValueError(f"it holds {sizes} images, not {SIZES}")
        for split, labels in content.labels.items():
            for feature, values in labels.items():
                classes = len(content.classes[feature])
                if not classes or values.min() < 0 or values.max() >= classes:
                    raise ValueError(f"{split} has {feature} values outside its {classes} classes")
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
                members[name] = cast(IO[bytes], tar.extractfile(member)).read()
    if missing := sorted(wanted - members.keys()):
        raise ValueError(f"it does not contain {archive.folder}/{missing[0]}")
    return members


def _part(content: bytes, archive: Archive) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the images and labels of one file, which stores red, green and blue planes."""
    if all(archive.labels.values()):
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
    for feature, values in labels.items():
        if values.dtype.kind not in "iu" or values.shape != pixels.shape[:1]:
            raise ValueError(f"its {feature} array is {values.dtype}{list(values.shape)}")
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, {feature: values.astype(np.int64) for feature, values in labels.items()}


def main(dataset: str, argv: list[str] | None = None) -> None:
    """Write or check the data set, as the command line says."""
    command.run(parse(dataset, argv), prepare)
