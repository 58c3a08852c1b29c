"""`python -m jaxrobust.data.prepare imagenet SOURCE --out OUT`: ImageNet as ArrayRecord.

SOURCE is a folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or these files, or an
ImageFolder with train/ and val/ (or validation/), of ImageNet or, with --name, of other classes.

OUT/imagenet2012/5.1.0 is then what `tfds build` would write, except that images are copied byte
for byte (TFDS converts 22 CMYK images and a PNG); jaxrobust, TFDS and Grain read it. Records are
in the order of sha256(SALT + "CLASS/NAME"), so every shard mixes the classes, and tar files and
folders give the same shards. The same command continues what was interrupted and writes again what
is missing or cut off; --check reads everything. SHA256SUMS is for `sha256sum -c` after copying.

OUT is local; `gcloud storage cp -r OUT/imagenet2012 gs://BUCKET/` copies it to a bucket.

Exit codes: 0 done; 2 a mistake, or a source that is not whole, with one sentence on stderr; 3
stopped for another reason that it names (full disk, damaged shards); 130 interrupted, resumable.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxrobust.data.prepare import directory, shards, source
from jaxrobust.data.prepare.directory import Plan
from jaxrobust.data.prepare.known import IMAGENET, known
from jaxrobust.data.prepare.shards import Event, Shard
from jaxrobust.data.prepare.source import Content
from jaxrobust.data.subsets import index_name
from jaxrobust.runtime.commandline import Arguments, stop

_SHARD_BYTES = 128 * 10**6
_SHARDS = {"train": 1024, "validation": 64}  # of the whole ImageNet, as TFDS writes it
_TAKEN = ("digits", "fake")  # names that `open_source` keeps for its own


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line; hyphens and underscores are the same."""
    more = __doc__.split("\n", 2)[2]
    raw = argparse.RawDescriptionHelpFormatter
    parser = Arguments(__doc__, epilog=more, formatter_class=raw)
    parser.add_argument("source", nargs="*", type=Path, help="Folder, or the tar files.")
    parser.flag(
        "out", required=True, help="Folder of NAME/VERSION: a data_dir for jaxrobust and TFDS."
    )
    parser.flag("name", help="Name of a data set with classes of its own; default: imagenet2012.")
    parser.flag(
        "allow_partial", action="store_true", help="Take a part of ImageNet, with its 1,000 labels."
    )
    parser.flag(
        "shards",
        nargs=2,
        type=int,
        metavar=("TRAIN", "VALIDATION"),
        help="Numbers of shards; default: 1024 64 for the whole ImageNet, else so many that each "
        "has 128 MB.",
    )
    workers = min(os.cpu_count() or 1, 32)
    parser.flag(
        "workers", type=int, default=workers, help="Number of processes; default: %(default)s."
    )
    parser.flag("check", action="store_true", help="Read every byte of OUT instead of writing it.")
    parser.flag("json", action="store_true", help="Print one JSON object on the last line.")
    args = parser.parse_args(argv)
    if args.check == bool(args.source):
        parser.error("give a SOURCE to write from, or --check")
    return args


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Write the data set; return what was done."""
    if args.name in _TAKEN or not re.fullmatch(r"[a-z][a-z0-9_]*", args.name or "x"):
        raise ValueError(
            f"--name {args.name}: write a name of small letters, digits and _, not "
            f"{' or '.join(_TAKEN)}"
        )
    _say(f"listing {', '.join(map(str, args.source))}")
    start = time.perf_counter()
    content = source.scan(args.source, name=args.name, allow_partial=args.allow_partial)
    for split, part in content.splits.items():
        rows = part.rows[shards.order(part.rows, content.classes)]
        content.splits[split] = part._replace(rows=rows)
    folder = Path(args.out) / content.name / directory.version(content.name)
    plan = Plan(folder, content, _shards(folder, content, args.shards))
    listed = time.perf_counter()
    with directory.claimed(plan):
        images, size = _write(plan, args.workers)
        directory.finish(plan)
    seconds = time.perf_counter() - listed
    return {
        "directory": str(folder),
        "name": content.name,
        "version": directory.version(content.name),
        "classes": len(content.classes),
        "splits": {
            split: {
                "images": len(rows),
                "of": known().sizes[split] if content.name == IMAGENET else None,
                "bytes": int(rows["size"].sum()),
                "shards": len(plan.shards[split]),
            }
            for split, (_, rows) in content.splits.items()
        },
        "notes": content.notes,
        "written_images": images,
        "written_bytes": size,
        "listing_seconds": round(listed - start, 3),
        "writing_seconds": round(seconds, 3),
        "mb_per_second": round(size / seconds / 1e6, 1),
    }


def _shards(folder: Path, content: Content, wanted: list[int] | None) -> dict[str, list[Shard]]:
    """Return the shards of each split; `wanted` are their numbers for train and validation."""
    lengths = {split: len(rows) for split, (_, rows) in content.splits.items()}
    whole = content.name == IMAGENET and lengths.items() <= known().sizes.items()
    found = {}
    for split, (origin, rows) in content.splits.items():
        count = _SHARDS[split] if whole else round(int(rows["size"].sum()) / _SHARD_BYTES)
        count = min(max(count, 1), len(rows))
        if wanted:
            count = wanted[list(_SHARDS).index(split)]
        if not 1 <= count <= len(rows):
            raise ValueError(f"--shards: {split} with {len(rows):,} images can't be {count} shards")
        bounds = [i * len(rows) // count for i in range(count + 1)]
        found[split] = [
            Shard(
                folder / shards.file_name(content.name, split, i, count),
                folder / f"{split}.npy{shards.PARTIAL}",
                origin,
                bounds[i],
                bounds[i + 1],
            )
            for i in range(count)
        ]
    return found


def _write(plan: Plan, workers: int) -> tuple[int, int]:
    """Write the shards that are not there yet; return (images, bytes) of them."""
    sums = directory.read_sums(plan.directory)
    every = [shard for part in plan.shards.values() for shard in part]
    todo = []
    need = 0
    for split, part in plan.shards.items():
        sizes = plan.content.splits[split].rows["size"]
        for shard in part:
            if shards.length(shard.path) != shard.last - shard.first:
                todo.append(shard)
                need += int(sizes[shard.first : shard.last].sum())
            elif shard.path.name not in sums:  # killed between the shard and its line
                digest = shards.sha256(shard.path)
                directory.add_sum(plan.directory, shard.path.name, digest)
    if not todo:
        return 0, 0
    (plan.directory / directory.INFO).unlink(missing_ok=True)  # it promises all shards
    if (free := shutil.disk_usage(plan.directory).free) < need:
        raise OSError(
            f"{need / 1e9:,.1f} GB are to be written and {free / 1e9:,.1f} GB are free in "
            f"{plan.directory}; make room, or give another --out",
        )
    for split, part in plan.shards.items():
        with part[0].plan.open("wb") as file:
            np.save(file, plan.content.splits[split].rows)
    _say(f"writing {len(todo):,} of {len(every):,} shards, {need / 1e9:,.3f} GB")
    events = shards.work(shards.write, todo, workers)
    with contextlib.closing(_progress(events, "writing", every, todo)) as events:
        for event in events:
            if event.shard:
                directory.add_sum(plan.directory, event.shard, event.sha256)
    return _images(todo), need


def _images(part: Iterable[Shard]) -> int:
    return sum(shard.last - shard.first for shard in part)


def _progress(
    events: Generator[Event], what: str, every: list[Shard], todo: list[Shard]
) -> Generator[Event]:
    """Yield the events, with images/s, MB/s and the time left on stderr: a bar, or plain lines."""
    terminal = sys.stderr.isatty()
    with (
        contextlib.closing(events),
        open(os.devnull, "w") as nowhere,
        tqdm(
            desc=what,
            total=_images(every),
            initial=_images(every) - _images(todo),
            file=sys.stderr if terminal else nowhere,
            dynamic_ncols=terminal,
            bar_format="{desc} {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} "
            "[{elapsed}<{remaining}, {rate_fmt}{postfix}]",
            unit=" images",
        ) as bar,
    ):
        start = said = time.perf_counter()
        size = 0
        for event in events:
            size += event.size
            now = time.perf_counter()
            bar.set_postfix_str(f"{size / max(now - start, 1e-9) / 1e6:,.0f} MB/s", refresh=False)
            bar.update(event.images)
            if not terminal and now - said > 10:
                said = now
                _say(str(bar))
            yield event


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Read a finished data set; return its counts.

    Raises:
      ValueError: there is no such data set.
      OSError: it is damaged; says what.
    """
    out, start = Path(args.out), time.perf_counter()
    found = sorted(path.parent for path in out.glob(f"{args.name or '*'}/*/{directory.SETTINGS}"))
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(out)) for path in found) or "none"
        raise ValueError(
            f"{out} holds {names} of the data sets that this tool writes; "
            f"{'--name says which' if found else 'give the --out that it was written to'}"
        )
    folder = found[0]
    if not (folder / directory.INFO).exists():
        raise ValueError(f"{folder} is not finished; the command that began it continues")
    sums = directory.read_sums(folder)
    damage = {
        name: "is missing or has changed"
        for name, digest in sums.items()
        if ".array_record-" not in name
        and not ((folder / name).exists() and shards.sha256(folder / name) == digest)
    }
    every = [] if damage else _finished(folder, sums)
    events = shards.work(shards.check, every, args.workers)
    with contextlib.closing(_progress(events, "checking", every, every)) as events:
        damage |= {event.shard: event.damage for event in events if event.damage}
    if damage:
        name, what = next(iter(damage.items()))
        more = f" (and {len(damage) - 1} more)" * (len(damage) > 1)
        raise OSError(
            f"{folder / name} {what}{more}; remove what is damaged, the command that wrote it "
            "writes it again"
        )
    done = {
        "directory": str(folder),
        "images": _images(every),
        "files": len(sums),
        "seconds": round(time.perf_counter() - start, 3),
    }
    print(f"{folder}: {done['images']:,} images; every record, label and sha256 is right")
    return done


def _finished(folder: Path, sums: dict[str, str]) -> list[Shard]:
    """Return the shards of a finished directory, with the index of their split as the plan."""
    info = json.loads((folder / directory.INFO).read_text())
    found = []
    for split in info["splits"]:
        ends = np.cumsum([int(text) for text in split["shardLengths"]]).tolist()
        for i, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
            name = shards.file_name(info["name"], split["name"], i, len(ends))
            index = folder / index_name(split["name"])
            found.append(Shard(folder / name, index, folder, first, last, sums.get(name, "")))
    return found


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _report(done: dict[str, Any]) -> None:
    print(f"{done['directory']}: {done['classes']:,} classes")
    for split, part in done["splits"].items():
        whole = ""
        if part["of"]:
            same = part["of"] == part["images"]
            whole = ", as many as ImageNet has" if same else f" of ImageNet's {part['of']:,}"
        print(
            f"  {split}: {part['images']:,} images{whole}; {part['bytes'] / 1e9:,.3f} GB in "
            f"{part['shards']:,} shard{'s' * (part['shards'] > 1)}"
        )
    for note in done["notes"]:
        print(f"  {note}")
    print(
        f"  wrote {done['written_images']:,} images in {done['writing_seconds']:,.1f} s "
        f"({done['mb_per_second']:,.0f} MB/s), listed them in {done['listing_seconds']:,.1f} s"
        if done["written_images"]
        else "  all of it was there already"
    )


def main(argv: list[str] | None = None) -> None:
    """Write or check, as the command line says."""
    args = parse(argv)
    try:
        if "://" in args.out:
            raise ValueError(
                f"--out {args.out}: write to a local folder, then `gcloud storage cp -r` copies it"
            )
        if args.workers < 1:
            raise ValueError(f"--workers {args.workers} must be at least 1")
        done = check(args) if args.check else prepare(args)
    except KeyboardInterrupt:
        stop("interrupted; the same command continues", 130)
    except ValueError as error:
        stop(error, 2)
    except OSError as error:
        stop(f"{error}{'' if args.check else '; the same command continues'}", 3)
    if not args.check:
        _report(done)
    if args.json:
        print(json.dumps(done))
