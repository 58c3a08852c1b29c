"""`jaxrobust prepare generated FILE.npz... --out DIR`: tens of millions of images become shards.

Each FILE has `image`, uint8[N,H,W,3], and `label`, integers [N] or, with `--soft`, probabilities
[N,classes], as generated images are published with Wang et al. 2023 (arXiv 2302.04638); together
they are one data set, in the order given. A file is streamed, never loaded: memory does not grow
with it. DIR then holds shards in ArrayRecord, SHA256SUMS and generated.json, and
--config.data.extra=generated:DIR reads them at random. The same command continues what was
interrupted; --check reads all of it again.

Exit codes: 0 done; 2 a mistake, or a file that is refused, with one sentence on stderr; 3 stopped
for another reason that it names (full disk); 130 interrupted.
"""

import argparse
import contextlib
import json
import os
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from tqdm import tqdm

from jaxrobust.data.prepare import command, directory, shards
from jaxrobust.data.sources import generated, npz
from jaxrobust.data.sources.generated import (
    INFO,
    RecordPlaces,
    ShardLayout,
    file_name,
    not_probabilities,
)
from jaxrobust.runtime.commandline.arguments import ending

NAME = "generated"
_BLOCK = 4096  # rows that are in memory at a time: 12 MB of 32x32 pixels


class ArrayPair(NamedTuple):
    """Images and labels in a file, as its headers describe them."""

    path: Path
    image: str
    label: str
    rows: int
    shape: tuple[int, int, int]
    classes: int  # of soft labels; else 0
    sums: tuple[int, int]  # CRC of both

    def key(self) -> list[Any]:
        """List what tells this file's content from another one's, wherever it lies."""
        return [self.path.name, self.rows, *self.shape, self.classes, *self.sums]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line; hyphens and underscores are the same."""
    parser = command.parser(__doc__, NAME)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="Files of arrays.")
    parser.flag("out", type=Path, required=True, help="Folder of the shards.")
    parser.flag("classes", type=int, default=10, help="Number of classes; default: %(default)s.")
    parser.flag("soft", action="store_true", help="Labels are probabilities of the classes.")
    parser.flag("rows", type=int, default=250_000, help="Images of a shard; default: %(default)s.")
    parser.flag("check", action="store_true", help="Read every byte of OUT instead of writing it.")
    parser.flag("json", action="store_true", help="Print one JSON object on the last line.")
    return parser.parse_args(argv)


def described(path: Path, *, classes: int, soft: bool) -> ArrayPair:
    """Read the headers of a file; a `ValueError` says what is wrong with its arrays."""
    file = npz.opened(os.fspath(path))
    keys = next((keys for keys in npz.WHOLE if set(keys) <= file.arrays.keys()), None)
    if keys is None:
        has = ", ".join(file.arrays) or "nothing"
        raise ValueError(
            f"{path} holds {has}; write one with numpy.savez(PATH, image=..., label=...)"
        )
    image, label = keys
    shape = npz.image_shape(file, image)
    count = file.arrays[image][0][0]
    _check_labels(f"{path}: {label}", file.arrays[label], count, classes if soft else 0)
    return ArrayPair(
        path,
        *keys,
        count,
        shape,
        classes if soft else 0,
        (file.sums[image], file.sums[label]),
    )


def _check_labels(
    what: str, array: tuple[tuple[int, ...], np.dtype], count: int, classes: int
) -> None:
    """Refuse labels of another shape or type; `classes`: of soft ones, else 0."""
    shape, kind = array
    if classes:
        if (shape, kind.kind) == ((count, classes), "f"):
            return
        wanted = f"floats[{count}, {classes}], the probabilities of each image's classes"
        remedy = "leave --soft out" if kind.kind in "iu" else "give --classes, or other labels"
    else:
        if shape in ((count,), (count, 1)) and kind.kind in "iu":
            return
        wanted = f"one integer for each of the {count} images"
        remedy = "write the number of the class, from 0 on, or give --soft for probabilities"
    raise ValueError(f"{what} is {kind}{list(shape)}, not {wanted}; {remedy}")


def described_all(files: Sequence[Path], *, classes: int, soft: bool) -> list[ArrayPair]:
    """Read the headers of all files, which have to fit each other."""
    pairs = [described(path, classes=classes, soft=soft) for path in files]
    for pair in pairs[1:]:
        if pair.shape != pairs[0].shape:
            one, other = ("x".join(map(str, p.shape)) for p in (pairs[0], pair))
            raise ValueError(
                f"{pair.path} has images of {other}, and {pairs[0].path} of {one}; prepare each "
                "shape in a folder by itself"
            )
    if len({pair.path.resolve() for pair in pairs}) < len(pairs):
        raise ValueError("a file is given twice, whose images would count twice; give it once")
    return pairs


def blocks(pair: ArrayPair, *, classes: int) -> Iterator[np.ndarray]:
    """Yield the records of a file, uint8[rows,length], a few thousand at a time.

    With the last byte of an array zipfile compares its checksum.
    """
    with (
        npz.parsing(os.fspath(pair.path), ".npz", npz.REMEDY),
        zipfile.ZipFile(pair.path) as members,
        members.open(f"{pair.image}.npy") as images,
        members.open(f"{pair.label}.npy") as labels,
    ):
        _header(cast(BinaryIO, images))
        kind = _header(cast(BinaryIO, labels))
        pixels = int(np.prod(pair.shape))
        for first in range(0, pair.rows, _BLOCK):
            count = min(_BLOCK, pair.rows - first)
            rows = _exactly(cast(BinaryIO, images), count * pixels).reshape(count, pixels)
            width = kind.itemsize * (pair.classes or 1)
            raw = _exactly(cast(BinaryIO, labels), count * width).view(kind)
            yield np.hstack([rows, _checked(pair, raw.reshape(count, -1), first, classes)])


def _header(file: BinaryIO) -> np.dtype:
    """Read what stands before an array, and return its type."""
    version = np.lib.format.read_magic(file)
    _, by_columns, kind = npz.HEADERS[version](file)
    if by_columns:
        raise ValueError("its array is in Fortran's order")
    return kind


def _exactly(file: BinaryIO, count: int) -> np.ndarray:
    data = file.read(count)
    if len(data) != count:
        raise EOFError(f"an array ends {count - len(data)} bytes before its header says")
    return np.frombuffer(data, np.uint8)


def _checked(pair: ArrayPair, labels: np.ndarray, first: int, classes: int) -> np.ndarray:
    """Return labels as bytes uint8[rows,4 or 4 * classes], as records hold them."""
    if pair.classes:
        soft = labels.astype("<f4")
        if why := not_probabilities(soft):
            where = f"images {first} to {first + len(labels) - 1}"
            raise npz.DataError(
                f"{pair.path}: labels of {where} {why}; write probabilities of the classes"
            )
        return soft.view(np.uint8)
    if labels.min() < 0 or labels.max() >= classes:
        raise npz.DataError(
            f"{pair.path}: labels go from {labels.min()} to {labels.max()}, outside of {classes} "
            "classes; remove these images, or give --classes"
        )
    return labels.astype("<i4").view(np.uint8)


def write(pairs: Sequence[ArrayPair], args: argparse.Namespace) -> int:
    """Write the shards that are not there yet, and what describes them; return how many images.

    Files whose images are all written are not read again; of another one what comes before is read
    and left, which its checksum needs.
    """
    total = sum(pair.rows for pair in pairs)
    names = [file_name(i, -(-total // args.rows)) for i in range(-(-total // args.rows))]
    sums = directory.read_sums(args.out)
    ends = [min((i + 1) * args.rows, total) for i in range(len(names))]
    todo = [i for i, name in enumerate(names) if not (name in sums and (args.out / name).exists())]
    if todo:
        (args.out / INFO).unlink(missing_ok=True)  # it promises all shards
        with tqdm(total=total, desc="writing", unit=" images", disable=None) as bar:
            _write_all(pairs, args, names, ends, set(todo), bar)
    soft = bool(pairs[0].classes)
    sizes = tuple((args.out / name).stat().st_size for name in names)
    layout = ShardLayout(pairs[0].shape, args.classes, soft, args.rows, sizes, total)
    sums = directory.read_sums(args.out)
    about = {"format": generated.FORMAT, "sha256": [sums[name] for name in names]}
    directory.write_json(args.out / INFO, about | layout._asdict())
    return sum(ends[i] - i * args.rows for i in todo)


def _write_all(
    pairs: Sequence[ArrayPair],
    args: argparse.Namespace,
    names: Sequence[str],
    ends: Sequence[int],
    todo: set[int],
    bar: tqdm,
) -> None:
    starts = np.cumsum([0, *(pair.rows for pair in pairs)]).tolist()
    needed = min(todo) * args.rows
    begin = max(i for i, start in enumerate(starts[:-1]) if start <= needed)
    position, open_shard = starts[begin], contextlib.ExitStack()
    bar.update(position)
    add: Any = None
    with open_shard:
        for pair in pairs[begin:]:
            for rows in blocks(pair, classes=args.classes):
                while len(rows):
                    shard = position // args.rows
                    part, rows = np.split(rows, [ends[shard] - position])
                    path = args.out / names[shard]
                    if shard in todo and add is None:
                        count = ends[shard] - shard * args.rows
                        add = open_shard.enter_context(shards.writing(path, count))
                    if add is not None:
                        for row in part:
                            add(row.tobytes())
                    position += len(part)
                    bar.update(len(part))
                    if position == ends[shard] and add is not None:
                        open_shard.close()  # it gets its name
                        add = None
                        _compare(path, part[-1])
                        directory.add_sum(args.out, path.name, shards.sha256(path))


def _compare(path: Path, last: np.ndarray) -> None:
    """Check that the last record of a shard stands where arithmetic says."""
    descriptor, rows = os.open(path, os.O_RDONLY), shards.length(path)
    try:
        found = RecordPlaces.of(len(last)).read(descriptor, (rows or 1) - 1)
    finally:
        os.close(descriptor)
    if found != last.tobytes():
        raise OSError(
            f"{path} is laid out otherwise than ArrayRecord 0.8 does; install array_record>=0.8"
        )


def check(folder: Path) -> int:
    """Read all shards and their checksums again; return how many images they hold."""
    layout, _ = generated.read_layout(folder, f"{generated.PREFIX}{folder}")
    sums = directory.read_sums(folder)
    reader = generated.ShardedRecords(os.fspath(folder), layout, f"check {time.time_ns()}")
    for i in tqdm(range(len(layout.sizes)), desc="checking", unit=" shards", disable=None):
        name = file_name(i, len(layout.sizes))
        if shards.sha256(folder / name) != sums.get(name):
            raise ValueError(
                f"{folder / name} is not what was written, its sha256 has changed; remove it, and "
                "the command that wrote it writes it again"
            )
        first = i * layout.per_shard
        for start in range(first, min(first + layout.per_shard, layout.size), _BLOCK):
            reader(range(start, min(start + _BLOCK, first + layout.per_shard, layout.size)))
    return layout.size


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Write or check, as the flags say; return what was done."""
    args.out = args.out.expanduser()
    start = time.perf_counter()
    for key in ("classes", "rows"):
        if (value := getattr(args, key)) < 1:
            raise ValueError(f"--{key} {value} must be at least 1")
    if args.check:
        images = check(args.out)
        print(f"{args.out}: {images:,} images; every record, label and sha256 is right")
        return {"directory": str(args.out), "images": images, "written_images": 0}
    pairs = described_all(args.files, classes=args.classes, soft=args.soft)
    settings = {"files": [pair.key() for pair in pairs], "classes": args.classes}
    settings |= {"rows": args.rows, "format": generated.FORMAT}
    text = json.dumps(settings, indent=2) + "\n"
    other = "with other files, --classes, --soft or --rows; give the same as then, or another --out"
    with directory.claimed(args.out, text, lambda before: "" if before == text else other):
        written = write(pairs, args)
    seconds = time.perf_counter() - start
    images = sum(pair.rows for pair in pairs)
    size = sum(path.stat().st_size for path in args.out.glob("*.array_record-*"))
    print(f"{args.out}: {images:,} images, {size / 1e9:,.3f} GB")
    speed = (
        f"wrote {written:,} of them in {seconds:,.1f} s" if written else "all were there already"
    )
    print(f"  {speed}; train with --config.data.extra={generated.PREFIX}{args.out}")
    about = {"directory": str(args.out), "images": images, "bytes": size}
    return about | {"written_images": written, "seconds": round(seconds, 3)}


def main(argv: list[str] | None = None) -> None:
    """Write or check, and say where; or end with a sentence on stderr."""
    args = parse(argv)
    again = "the same command continues"
    with ending(again, f"; {again}"):
        done = prepare(args)
    if args.json:
        print(json.dumps(done))
    sys.stdout.flush()
