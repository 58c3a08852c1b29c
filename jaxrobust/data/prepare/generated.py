"""`jaxrobust prepare generated FILE.npz... --out DIR`: shard tens of millions of images.

Each FILE has `image`, uint8[N,H,W,3], and `label`, integers [N] or, with `--soft`, probabilities
[N,classes], the format of the images published by Wang et al. 2023 (arXiv 2302.04638). Together, in
the order given, they are one data set. Files are streamed, never loaded, so memory does not grow
with their size. DIR then holds ArrayRecord shards, SHA256SUMS and generated.json;
--config.data.extra=generated:DIR reads them at random. Repeat the command to continue an
interrupted run; --check reads everything again.

Exit codes: 0 done; 2 a mistake or a rejected file, with one sentence on stderr; 3 stopped for
another reason, which it names (full disk); 130 interrupted.
"""

import argparse
import contextlib
import json
import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jaxrobust.data.prepare import command, writer
from jaxrobust.data.sources import generated, npz
from jaxrobust.data.sources.generated import INFO, RecordPlaces, ShardLayout, file_name
from jaxrobust.runtime.commandline.arguments import ending

NAME = "generated"
_BLOCK = 4096  # rows in memory at a time: 12 MB of 32x32 pixels


class ArrayPair(NamedTuple):
    """Images and labels of a file, as its headers describe them."""

    path: Path
    image: str
    label: str
    rows: int
    shape: tuple[int, int, int]
    classes: int  # of soft labels, else 0
    sums: tuple[int, int]  # CRC of both


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, where hyphens and underscores are the same."""
    parser = command.parser(__doc__, NAME)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="The .npz files.")
    parser.flag("out", type=Path, required=True, help="Folder for the shards.")
    parser.flag("classes", type=int, default=10, help="Number of classes; default: %(default)s.")
    parser.flag("soft", action="store_true", help="Labels are class probabilities.")
    parser.flag("rows", type=int, default=250_000, help="Images per shard; default: %(default)s.")
    parser.flag("check", action="store_true", help="Verify every byte of OUT instead of writing.")
    parser.flag("json", action="store_true", help="Print one JSON object on the last line.")
    return parser.parse_args(argv)


def described(files: Sequence[Path], *, classes: int, soft: bool) -> list[ArrayPair]:
    """Read the headers of files; raise a `ValueError` that says what is wrong with their arrays."""
    pairs: list[ArrayPair] = []
    for path in files:
        file = npz.opened(os.fspath(path))
        keys = next((keys for keys in npz.WHOLE if set(keys) <= file.arrays.keys()), None)
        if keys is None:
            names = ", ".join(file.arrays) or "nothing"
            raise ValueError(
                f"{path} holds {names}; write it with numpy.savez(PATH, image=..., label=...)"
            )
        image, label = keys
        shape = npz.image_shape(file, image)
        count = file.arrays[image][0][0]
        _check_labels(f"{path}: {label}", file.arrays[label], count, classes if soft else 0)
        sums = (file.sums[image], file.sums[label])
        pairs.append(ArrayPair(path, *keys, count, shape, classes if soft else 0, sums))
        if shape != pairs[0].shape:
            first, other = ("x".join(map(str, sides)) for sides in (pairs[0].shape, shape))
            raise ValueError(
                f"{path} has {other} images, but {pairs[0].path} has {first} images; prepare each "
                "shape in its own folder"
            )
    if len({pair.path.resolve() for pair in pairs}) < len(pairs):
        raise ValueError("a file is given twice, so its images would count twice; give it once")
    return pairs


def _check_labels(
    name: str, array: tuple[tuple[int, ...], np.dtype], count: int, classes: int
) -> None:
    """Reject labels of another shape or type; `classes` is 0 unless labels are soft."""
    shape, kind = array
    if classes:
        if (shape, kind.kind) == ((count, classes), "f"):
            return
        wanted = f"floats[{count}, {classes}], the class probabilities of each image"
        remedy = "leave --soft out" if kind.kind in "iu" else "set --classes, or change the labels"
    else:
        if shape in ((count,), (count, 1)) and kind.kind in "iu":
            return
        wanted = f"one integer for each of the {count} images"
        remedy = "write class numbers starting at 0, or give --soft for probabilities"
    raise ValueError(f"{name} is {kind}{list(shape)}, not {wanted}; {remedy}")


def blocks(pair: ArrayPair, *, classes: int) -> Iterator[np.ndarray]:
    """Yield the records of a file, uint8[rows,length], a few thousand at a time.

    zipfile checks an array's checksum when its last byte is read.
    """
    with (
        npz.parsing(os.fspath(pair.path), ".npz", npz.REMEDY),
        zipfile.ZipFile(pair.path) as members,
        members.open(f"{pair.image}.npy") as images,
        members.open(f"{pair.label}.npy") as labels,
    ):
        npz.read_header(images, in_rows=True)
        _, kind = npz.read_header(labels, in_rows=True)
        pixels = int(np.prod(pair.shape))
        for first in range(0, pair.rows, _BLOCK):
            count = min(_BLOCK, pair.rows - first)
            rows = _exactly(images, count * pixels).reshape(count, pixels)
            width = kind.itemsize * (pair.classes or 1)
            values = _exactly(labels, count * width).view(kind).reshape(count, -1)
            if pair.classes:
                values = values.astype("<f4")
                if why := generated.not_probabilities(values):
                    where = f"images {first} to {first + count - 1}"
                    raise npz.DataError(
                        f"{pair.path}: labels of {where} {why}; write class probabilities"
                    )
            elif values.min() < 0 or values.max() >= classes:
                raise npz.DataError(
                    f"{pair.path}: labels go from {values.min()} to {values.max()}, outside 0 to "
                    f"{classes - 1}; remove the images with such labels, or set --classes"
                )
            else:
                values = values.astype("<i4")
            yield np.hstack([rows, values.view(np.uint8)])


def _exactly(file: IO[bytes], count: int) -> np.ndarray:
    data = file.read(count)
    if len(data) != count:
        raise EOFError(f"an array is {count - len(data)} bytes shorter than its header says")
    return np.frombuffer(data, np.uint8)


def write(pairs: Sequence[ArrayPair], args: argparse.Namespace) -> int:
    """Write the missing shards and the description; return the number of images written.

    Skip files whose images are all written. Read a partly written file from its start, discarding
    what precedes the gap, because its checksum needs every byte.
    """
    out, total = args.out, sum(pair.rows for pair in pairs)
    bounds = [*range(0, total, args.rows), total]
    names = [file_name(i, len(bounds) - 1) for i in range(len(bounds) - 1)]
    sums = writer.read_sums(out)
    todo = [i for i, name in enumerate(names) if not (name in sums and (out / name).exists())]
    if todo:
        (out / INFO).unlink(missing_ok=True)  # it promises that all shards exist
        with tqdm(total=total, desc="writing", unit=" images", disable=None) as bar:
            _write_shards(pairs, args, names, bounds, todo, bar.update)
    soft = bool(pairs[0].classes)
    sizes = tuple((out / name).stat().st_size for name in names)
    layout = ShardLayout(pairs[0].shape, args.classes, soft, args.rows, sizes, total)
    sums = writer.read_sums(out)
    about = {"format": generated.FORMAT, "sha256": [sums[name] for name in names]}
    writer.write_json(out / INFO, about | layout._asdict())
    return sum(bounds[i + 1] - bounds[i] for i in todo)


def _write_shards(
    pairs: Sequence[ArrayPair],
    args: argparse.Namespace,
    names: Sequence[str],
    bounds: Sequence[int],
    todo: Sequence[int],
    advance: Callable[[int], Any],
) -> None:
    starts = np.cumsum([0, *(pair.rows for pair in pairs)]).tolist()
    begin = max(i for i, start in enumerate(starts[:-1]) if start <= bounds[todo[0]])
    position = starts[begin]
    advance(position)
    with contextlib.ExitStack() as open_shard:
        add: Callable[[bytes], None] | None = None
        for pair in pairs[begin:]:
            for rows in blocks(pair, classes=args.classes):
                while len(rows):
                    shard = position // args.rows
                    first, last = bounds[shard], bounds[shard + 1]
                    part, rows = np.split(rows, [last - position])
                    path = args.out / names[shard]
                    if shard in todo and add is None:
                        add = open_shard.enter_context(writer.writing(path, last - first))
                    if add is not None:
                        for row in part:
                            add(row.tobytes())
                    position += len(part)
                    advance(len(part))
                    if position == last and add is not None:
                        open_shard.close()  # closing gives it its final name
                        add = None
                        _compare(path, last - first, part[-1].tobytes())
                        writer.add_sum(args.out, path.name, writer.sha256(path))


def _compare(path: Path, rows: int, last: bytes) -> None:
    """Check that the last record of a shard is where the computed layout puts it."""
    with path.open("rb") as file:
        record = RecordPlaces.of(len(last)).read(file.fileno(), rows - 1)
    if record != last:
        raise OSError(
            f"{path} does not have the layout of ArrayRecord 0.8; install array_record>=0.8"
        )


def check(folder: Path) -> int:
    """Read all shards again and verify their checksums; return the number of images."""
    layout, _ = generated.read_layout(folder, f"{generated.PREFIX}{folder}")
    sums = writer.read_sums(folder)
    reader = generated.ShardedRecords(os.fspath(folder), layout, f"check {time.time_ns()}")
    for i in tqdm(range(len(layout.sizes)), desc="checking", unit=" shards", disable=None):
        name = file_name(i, len(layout.sizes))
        if writer.sha256(folder / name) != sums.get(name):
            raise ValueError(
                f"{folder / name} has changed since it was written (its sha256 differs); remove it "
                "and repeat the command that wrote it"
            )
        first = i * layout.per_shard
        last = min(first + layout.per_shard, layout.size)
        for start in range(first, last, _BLOCK):
            reader(range(start, min(start + _BLOCK, last)))
    return layout.size


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Write or check the data set, as the flags say; return a summary."""
    args.out = args.out.expanduser()
    start = time.perf_counter()
    for key in ("classes", "rows"):
        if (value := getattr(args, key)) < 1:
            raise ValueError(f"--{key} {value} must be at least 1")
    if args.check:
        images = check(args.out)
        print(f"{args.out}: {images:,} images; all records, labels and hashes are correct")
        return {"directory": str(args.out), "images": images, "written_images": 0}
    pairs = described(args.files, classes=args.classes, soft=args.soft)
    files = [
        [p.path.name, p.rows, *p.shape, p.classes, *p.sums] for p in pairs
    ]  # independent of the current folder
    settings = {"files": files, "classes": args.classes}
    settings |= {"rows": args.rows, "format": generated.FORMAT}
    text = json.dumps(settings, indent=2) + "\n"
    other = "with other files, --classes, --soft or --rows; repeat these, or give another --out"
    with writer.claimed(args.out, text, lambda old_text: "" if old_text == text else other):
        written = write(pairs, args)
    seconds = time.perf_counter() - start
    images = sum(pair.rows for pair in pairs)
    size = sum(path.stat().st_size for path in args.out.glob("*.array_record-*"))
    print(f"{args.out}: {images:,} images, {size / 1e9:,.3f} GB")
    speed = (
        f"wrote {written:,} of them in {seconds:,.1f} s" if written else "all were already there"
    )
    print(f"  {speed}; train with --config.data.extra={generated.PREFIX}{args.out}")
    about = {"directory": str(args.out), "images": images, "bytes": size}
    return about | {"written_images": written, "seconds": round(seconds, 3)}


def main(argv: list[str] | None = None) -> None:
    """Write or check the files and print their path; exit with one sentence if that fails."""
    args = parse(argv)
    again = "run the same command to continue"
    with ending(again, f"; {again}"):
        done = prepare(args)
    if args.json:
        print(json.dumps(done))
    sys.stdout.flush()
