"""`jaxrobust prepare cifar10 [--out OUT]`: CIFAR-10 or -100 as ArrayRecord.

The official archive is downloaded, or taken from --from ARCHIVE: the python or the binary version,
recognised by its sha256. OUT/cifar10/3.0.2 is then what `tfds build` would write: the same ids and
labels in the same order, the same pixels (as PNG), for CIFAR-100 with coarse_label; jaxrobust, TFDS
and Grain read it. It takes a minute, and --check reads everything again.

Exit codes: 0 done; 2 a mistake, or an archive that is not the official one, with one sentence on
stderr; 3 stopped for another reason that it names (no network, full disk); 130 interrupted.
"""

import argparse
import functools
import hashlib
import io
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxrobust.data.prepare import archives, command, directory, shards
from jaxrobust.data.prepare.directory import About, DatasetPlan
from jaxrobust.data.prepare.raw_source import Content, RawSplit
from jaxrobust.data.prepare.shards import Job, Shard, WorkDone
from jaxrobust.data.sources import tfds
from jaxrobust.runtime.files import download

VERSION = "3.0.2"  # TFDS' of both
_CITATION = """@techreport{Krizhevsky2009,
  author = {Alex Krizhevsky},
  title = {Learning Multiple Layers of Features from Tiny Images},
  institution = {University of Toronto},
  year = {2009}
}
"""


def parse(dataset: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line; hyphens and underscores are the same."""
    parser = command.parser(__doc__, dataset)
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="ARCHIVE",
        help=f"Official archive, such as {archives.of(dataset)[0].file}; default: it is downloaded "
        f"from {archives.ADDRESS}.",
    )
    parser.flag(
        "out",
        default=str(tfds.data_directory()),
        help="Folder of NAME/VERSION, a data_dir for jaxrobust and TFDS; default: %(default)s.",
    )
    command.common_flags(parser)
    args = parser.parse_args(argv)
    args.name = dataset
    if args.check and args.source:
        parser.error("give --from to write from it, or --check")
    return args


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Write the data set; return what was done."""
    folder = Path(args.out) / args.name / VERSION
    if not args.source and (folder / directory.INFO).exists():
        if not (folder / directory.SETTINGS).exists():
            raise ValueError(f"{folder} was written by another tool; use it, or give another --out")
        return command.done(folder)
    start = time.perf_counter()
    path = args.source or _downloaded(args.name)
    kind = archives.identify(path, args.name)
    command.say(f"reading {path}")
    archive = archives.read(path, kind)
    orders = {split: tfds_order(split, range(len(x))) for split, x in archive.images.items()}
    splits, parts = {}, {}
    for split, order in orders.items():
        splits[split] = RawSplit(path, _rows(split, archive, order))
        path_of = folder / shards.file_name(args.name, split, 0, 1)
        parts[split] = [Shard(path_of, Path(split), folder, 0, len(order))]
    content = Content(args.name, archive.classes["label"], splits, [])
    plan = DatasetPlan(folder, content, parts, _about(args.name, archive))
    listed = time.perf_counter()
    with directory.claimed_for(plan):
        written = _write(plan, functools.partial(_write_shard, archive=archive, orders=orders))
        directory.finish(plan)
    size = written * archive.images["test"][0].nbytes
    return command.done(folder) | command.effort(written, size, start=start, listed=listed)


def _write(plan: DatasetPlan, job: Job) -> int:
    sums = directory.read_sums(plan.directory)
    every = [shard for part in plan.shards.values() for shard in part]
    todo = [
        shard
        for shard in every
        if shards.length(shard.path) != shard.last
        or sums.get(shard.path.name) != shards.sha256(shard.path)
    ]
    if todo:
        (plan.directory / directory.INFO).unlink(missing_ok=True)  # it promises all shards
    return command.write(plan, job, todo, 1)


def _downloaded(dataset: str) -> Path:
    archive = archives.of(dataset)[0]
    address = f"{archives.ADDRESS}/{archive.file}"
    otherwise = f", with --from {archive.file}"
    try:
        return download.fetch(address, "data", sha256=archive.sha256, tell=command.say)
    except ValueError as error:
        raise ValueError(f"{error}{otherwise}") from error
    except download.Unreachable as error:
        raise download.Unreachable(f"{error}{otherwise}") from error


def tfds_order(split: str, keys: Iterable[object]) -> np.ndarray:
    """Return the order in which TFDS writes the records of a split: by the MD5 of split and key.

    Args:
      split: TFDS' salt.
      keys: of the records, as the data set generates them; CIFAR's are their positions.
    Returns:
      i64[N], a permutation.
    Source: tensorflow_datasets 4.9.10, core/shuffle.py and core/hashing.py; parity with what its
    builders write: tests/data/prepare/test_cifar.py.
    """
    digests = [hashlib.md5(f"{split}{key}".encode()).digest() for key in keys]
    return np.array(sorted(range(len(digests)), key=digests.__getitem__))


def _rows(split: str, archive: archives.ArchiveContents, order: np.ndarray) -> np.ndarray:
    table = np.empty(len(order), [("name", "S11"), ("label", "<i4"), ("size", "<i8")])
    table["name"] = [f"{split}_{position:05}".encode() for position in order.tolist()]
    table["label"] = archive.labels[split]["label"][order]
    table["size"] = archive.images[split][0].nbytes
    return table


def _about(dataset: str, archive: archives.ArchiveContents) -> About:
    return About(
        version=VERSION,
        description=f"The {len(archive.classes['label'])} classes of "
        f"{dataset.upper().replace('R1', 'R-1')}, 60,000 images of 32x32 pixels from the official "
        "archive, written by jaxrobust's data.prepare.",
        module="tensorflow_datasets.image_classification.cifar",
        order="md5(SPLIT + position in the archive), as TFDS",
        labels=archive.classes,
        image=directory.image(archives.SHAPE),
        name_key="id",
        citation=_CITATION,
        homepage=f"{archives.ADDRESS}/cifar.html",
        # Not those of the files: they depend on the installed zlib, and say which data this is.
        sizes={split: images.nbytes for split, images in archive.images.items()},
    )


def _write_shard(
    shard: Shard, *, archive: archives.ArchiveContents, orders: dict[str, np.ndarray]
) -> Iterator[WorkDone]:
    split = str(shard.plan)
    images, labels = archive.images[split], archive.labels[split]

    def record(position: int) -> dict[str, bytes | int]:
        fields: dict[str, bytes | int] = {k: int(values[position]) for k, values in labels.items()}
        name = f"{split}_{position:05}".encode()
        return fields | {"id": name, "image": png(images[position])}

    size = images[0].nbytes
    return shards.put(shard, ((size, record(position)) for position in orders[split].tolist()))


def png(image: np.ndarray) -> bytes:
    """Return an image uint8[H,W,3] as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def main(dataset: str, argv: list[str] | None = None) -> None:
    """Write or check, as the command line says."""
    command.run(parse(dataset, argv), prepare)
