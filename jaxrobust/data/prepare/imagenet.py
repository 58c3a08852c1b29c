"""`jaxrobust prepare imagenet SOURCE --out OUT`: ImageNet as ArrayRecord.

SOURCE is a folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or the two files, or an
ImageFolder with train/ and val/ (or validation/). With --name, the ImageFolder may have
classes other than ImageNet's, and a test/ folder.

OUT/imagenet2012/5.1.0 is then what `tfds build` would write, except that images are copied byte for
byte (TFDS converts 22 CMYK images and a PNG). jaxrobust, TFDS and Grain read it. Records are sorted
by sha256(SALT + "CLASS/NAME"): every shard mixes the classes, and tar files and folders give the
same shards. Repeat the command to continue an interrupted run or to rewrite missing or truncated
shards. --check reads everything; after copying, use SHA256SUMS with `sha256sum -c`.

OUT must be local; `gcloud storage cp -r OUT/imagenet2012 gs://BUCKET/` copies it to a bucket.

Exit codes: 0 done; 2 a mistake or an incomplete source, with one sentence on stderr; 3 stopped for
another reason, which it names (full disk, damaged shards); 130 interrupted, resumable.
"""

import argparse
import hashlib
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxrobust.data.prepare import command, imagenet_source, writer
from jaxrobust.data.prepare.imagenet_source import IMAGENET, SIZES, Content
from jaxrobust.data.prepare.writer import About, DatasetPlan, RawSplit, Shard
from jaxrobust.data.sources import headers

SALT = b"jaxrobust/prepare_imagenet/1/"  # changing it changes the order of the records
_SHARD_BYTES = 128 * 10**6
_SHARDS = {"train": 1024, "validation": 64}  # for all of ImageNet, as TFDS writes it
_TAKEN = ("digits", "fake")  # names that `open_source` reserves
_THREADS, _AHEAD = 8, 32  # reads in flight: a shard's images are scattered over the source


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, where hyphens and underscores are the same."""
    parser = command.parser(__doc__, "imagenet")
    parser.add_argument("source", nargs="*", type=Path, help="Image folder or tar files.")
    parser.flag(
        "out", required=True, help="Folder for NAME/VERSION, a data_dir for jaxrobust and TFDS."
    )
    parser.flag("name", help="Name of a data set with other classes; default: imagenet2012.")
    parser.flag(
        "allow_partial", action="store_true", help="Accept part of ImageNet, with its 1,000 labels."
    )
    parser.flag(
        "shards",
        nargs=2,
        type=int,
        metavar=("TRAIN", "VALIDATION"),
        help="Numbers of shards; default: 1024 64 for all of ImageNet, else shards of about "
        "128 MB.",
    )
    command.common_flags(parser)
    args = parser.parse_args(argv)
    if args.check == bool(args.source):
        parser.error("give either a SOURCE or --check")
    return args


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Write the data set and return a summary."""
    if args.name in _TAKEN or not re.fullmatch(r"[a-z][a-z0-9_]*", args.name or "x"):
        wanted = f"a name of lowercase letters, digits and _, not {' or '.join(_TAKEN)}"
        raise ValueError(f"--name {args.name}: write {wanted}")
    start = time.perf_counter()
    content = imagenet_source.scan(args.source, name=args.name, allow_partial=args.allow_partial)
    is_imagenet = content.name == IMAGENET
    splits = {
        split: RawSplit(origin, rows[order(rows, content.classes)])
        for split, (origin, rows) in content.splits.items()
    }
    content = content._replace(splits=splits)
    about = _about(content)
    folder = Path(args.out) / content.name / about.version
    plan = DatasetPlan(folder, about, splits, _counts(content, args.shards), SALT.decode())
    listed = time.perf_counter()
    with writer.claimed_for(plan):
        todo = writer.unwritten(plan)
        size = sum(int(splits[s].rows["size"][first:last].sum()) for _, s, first, last in todo)
        if todo:
            _write(plan, todo, size, args.workers)
        writer.finish(plan)
    done = command.done(folder) | {"notes": content.notes}
    for split, (_, rows) in splits.items():
        done["splits"][split] |= {
            "of": SIZES[split] if is_imagenet else None,
            "bytes": int(rows["size"].sum()),
        }
    return done | command.effort(todo, size, start=start, listed=listed)


def order(rows: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Return the order of records, by sha256(SALT + "CLASS/NAME"), wherever the images are stored.

    Args:
      rows: the table of a split.
      classes: names in the order of labels.
    Returns:
      i64[N], a permutation.
    """
    keys = [
        os.fsencode(classes[label]) + b"/" + name
        for name, label in zip(rows["name"].tolist(), rows["label"].tolist(), strict=True)
    ]
    digests = b"".join(hashlib.sha256(SALT + key).digest()[:8] for key in keys)
    return np.lexsort((keys, np.frombuffer(digests, ">u8")))


def _about(content: Content) -> About:
    is_imagenet = content.name == IMAGENET
    description = f"{len(content.classes)} classes"
    description = "ImageNet (ILSVRC 2012), 1,000 classes" if is_imagenet else description
    shape = (None, None, 3) if is_imagenet else _shape(content)
    encoding = ""  # the format of all images, judged by their names, if TFDS has a name for it
    names = [name.lower() for _, rows in content.splits.values() for name in rows["name"].tolist()]
    for form, endings in {"jpeg": (b".jpeg", b".jpg"), "png": (b".png",)}.items():
        if all(name.endswith(endings) for name in names):
            encoding = form
    module = f"tensorflow_datasets.datasets.{IMAGENET}.{IMAGENET}_dataset_builder"
    citation = imagenet_source.package_folder() / "CITATIONS.bib"
    return About(
        name=content.name,
        version="5.1.0" if is_imagenet else "1.0.0",  # TFDS's version of ImageNet
        description=f"{description}, images byte for byte as in the source, written by jaxrobust's "
        "data.prepare.",
        module=module if is_imagenet else "jaxrobust.data.prepare.imagenet",
        labels={"label": content.classes},
        shape=shape,
        encoding=encoding,
        name_key="file_name",
        citation=citation.read_text() if is_imagenet else "",
        notes=content.notes,
    )


def _shape(content: Content) -> tuple[int | None, int | None, int]:
    """Return the shape of all images, (None, None, 3) if they differ; note what is unusual."""
    shapes = set()
    for origin, rows in content.splits.values():
        paths = [f"{origin}/{os.fsdecode(place)}" for place in rows["place"].tolist()]
        identity = partial("{} {}".format, origin, hashlib.sha256(rows.tobytes()).hexdigest())
        heads = lambda places, paths=paths: [paths[place] for place in places]  # noqa: E731
        facts = headers.look(heads, len(paths), f"{origin}", paths.__getitem__, identity)
        shapes.add(facts and facts.image_shape)
        content.notes.extend(facts.notes if facts else ())
    (shape, *others) = shapes
    return shape if shape and not others else (None, None, 3)


def _counts(content: Content, wanted: list[int] | None) -> dict[str, int]:
    """Choose the number of shards of each split."""
    lengths = {split: len(rows) for split, (_, rows) in content.splits.items()}
    is_complete = content.name == IMAGENET and lengths.items() <= SIZES.items()
    counts = {}
    for split, (_, rows) in content.splits.items():
        count = _SHARDS[split] if is_complete else round(int(rows["size"].sum()) / _SHARD_BYTES)
        count = wanted[split != "train"] if wanted else min(max(count, 1), len(rows))
        if not 1 <= count <= len(rows):
            raise ValueError(f"--shards: can't split {len(rows):,} {split} images into {count}")
        counts[split] = count
    return counts


def _write(plan: DatasetPlan, todo: Sequence[Shard], need: int, workers: int) -> None:
    if (free := shutil.disk_usage(plan.folder).free) < need:
        raise OSError(
            f"{need / 1e9:,.1f} GB must be written, but only {free / 1e9:,.1f} GB are free in "
            f"{plan.folder}; free some space, or give another --out"
        )
    for split, (_, rows) in plan.splits.items():
        with _table(plan.folder, split).open("wb") as file:  # all processes read it
            np.save(file, rows)
    total = sum(plan.counts.values())
    command.say(f"writing {len(todo):,} of {total:,} shards, {need / 1e9:,.3f} GB")
    origins = {split: part.origin for split, part in plan.splits.items()}
    command.write(plan, partial(_write_shard, origins=origins), todo, workers)


def _table(folder: Path, split: str) -> Path:
    return folder / f"{split}.npy{writer.PARTIAL}"


def _write_shard(shard: Shard, *, origins: Mapping[str, Path]) -> Iterator[writer.WorkDone]:
    """Write a shard of files stored in a tar file or in folders."""
    table = np.load(_table(shard.path.parent, shard.split), mmap_mode="r")
    rows = table[shard.first : shard.last].tolist()
    images = zip(rows, _read_ahead(origins[shard.split], rows), strict=True)
    return writer.put(
        shard,
        (
            {"image": data, "label": label, "file_name": name}
            for (name, _, label, _, _), data in images
        ),
    )


def _read_ahead(origin: Path, rows: Sequence[Any]) -> Iterator[bytes]:
    """Yield the images in the order of `rows`, reading several ahead."""
    descriptor = os.open(origin, os.O_RDONLY) if origin.is_file() else None
    read = partial(_read, origin, descriptor)
    pending: deque[Future[bytes]] = deque()
    pool = ThreadPoolExecutor(_THREADS)
    try:
        for row in rows:
            pending.append(pool.submit(read, row))
            if len(pending) > _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        if descriptor is not None:
            os.close(descriptor)


def _read(origin: Path, descriptor: int | None, row: tuple[bytes, bytes, int, int, int]) -> bytes:
    name, place, _, offset, size = row
    if descriptor is None:
        path = origin / os.fsdecode(place)
        data = path.read_bytes()
    else:
        path = origin
        try:
            data = os.pread(descriptor, size, offset)
        except OSError as error:  # which does not name the file
            raise OSError(error.errno, error.strerror, str(origin)) from error
    if len(data) != size:
        raise ValueError(
            f"{path} has changed: {os.fsdecode(name)} had {size:,} bytes and now has "
            f"{len(data):,}; start over with another --out"
        )
    return data


def main(argv: list[str] | None = None) -> None:
    """Write or check the data set, as the command line says."""
    command.run(parse(argv), prepare)
