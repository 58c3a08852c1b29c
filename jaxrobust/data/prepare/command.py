"""What the commands of all data sets share: their flags, their bar, their errors and reports."""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxrobust.data.prepare import directory, shards
from jaxrobust.data.prepare.shards import Job, Shard, WorkDone
from jaxrobust.data.splits.subsets import index_name
from jaxrobust.runtime.commandline.arguments import Arguments, WholeDocument, stop
from jaxrobust.runtime.files.download import Unreachable


def parser(doc: str, name: str) -> Arguments:
    """Return a parser with the flags of every data set; `doc` is its --help."""
    more = doc.split("\n", 2)[2]
    how: dict[str, Any] = {"epilog": more, "formatter_class": WholeDocument}
    return Arguments(doc, prog=f"jaxrobust prepare {name}", **how)


def common_flags(flags: Arguments) -> None:
    """Add the flags that every data set has."""
    workers = min(os.cpu_count() or 1, 32)
    flags.flag(
        "workers", type=int, default=workers, help="Number of processes; default: %(default)s."
    )
    flags.flag("check", action="store_true", help="Read every byte of OUT instead of writing it.")
    flags.flag("json", action="store_true", help="Print one JSON object on the last line.")


def run(args: argparse.Namespace, prepare: Callable[[argparse.Namespace], dict[str, Any]]) -> None:
    """Prepare or check, as the flags say; print what was done, or end with a sentence on stderr."""
    args.out = os.path.expanduser(args.out)
    try:
        if "://" in args.out:
            remedy = "write to a local folder, then `gcloud storage cp -r` copies it"
            raise ValueError(f"--out {args.out}: {remedy}")
        if args.workers < 1:
            raise ValueError(f"--workers {args.workers} must be at least 1")
        result = _check(args) if args.check else prepare(args)
    except KeyboardInterrupt:
        stop("interrupted; the same command continues", 130)
    except ValueError as error:
        stop(error, 2)
    except Unreachable as error:  # which says that already
        stop(error, 3)
    except OSError as error:
        stop(f"{error}{'' if args.check else '; the same command continues'}", 3)
    if not args.check:
        _report(result)
    if args.json:
        print(json.dumps(result))


def _check(args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    folder = _finished(args.out, args.name)
    sums = directory.read_sums(folder)
    damage = {
        name: "is missing or has changed"
        for name, digest in sums.items()
        if ".array_record-" not in name
        and not ((folder / name).exists() and shards.sha256(folder / name) == digest)
    }
    every = [] if damage else _shards(folder, sums)
    checked = working(shards.check, "checking", every, every, args.workers)
    with contextlib.closing(checked) as events:
        damage |= {event.shard: event.damage for event in events if event.damage}
    if damage:
        name, what = next(iter(damage.items()))
        more = f" (and {len(damage) - 1} more)" * (len(damage) > 1)
        remedy = "remove what is damaged, the command that wrote it writes it again"
        raise OSError(f"{folder / name} {what}{more}; {remedy}")
    images = images_of(every)
    print(f"{folder}: {images:,} images; every record, label and sha256 is right")
    seconds = round(time.perf_counter() - start, 3)
    return {"directory": str(folder), "images": images, "files": len(sums), "seconds": seconds}


def _finished(out: str, name: str | None) -> Path:
    dirs = sorted(path.parent for path in Path(out).glob(f"{name or '*'}/*/{directory.SETTINGS}"))
    if len(dirs) != 1:
        names = ", ".join(str(path.relative_to(out)) for path in dirs) or "none"
        remedy = "--name says which" if dirs else "give the --out that it was written to"
        raise ValueError(f"{out} holds {names} of the data sets that this tool writes; {remedy}")
    if not (dirs[0] / directory.INFO).exists():
        raise ValueError(f"{dirs[0]} is not finished; the command that began it continues")
    return dirs[0]


def _shards(folder: Path, sums: dict[str, str]) -> list[Shard]:
    """List the shards of a finished directory, with the index of their split as the plan."""
    info = json.loads((folder / directory.INFO).read_text())
    parts = []
    for split in info["splits"]:
        ends = np.cumsum([int(text) for text in split["shardLengths"]]).tolist()
        index = folder / index_name(split["name"])
        for i, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
            name = shards.file_name(info["name"], split["name"], i, len(ends))
            parts.append(Shard(folder / name, index, folder, first, last, sums.get(name, "")))
    return parts


def write(plan: directory.DatasetPlan, job: Job, todo: Sequence[Shard], workers: int) -> int:
    """Write shards of a data set and their sha256; return how many images they hold."""
    every = [shard for part in plan.shards.values() for shard in part]
    with contextlib.closing(working(job, "writing", every, todo, workers)) as events:
        for event in events:
            if event.shard:
                directory.add_sum(plan.directory, event.shard, event.sha256)
    return images_of(todo)


def done(folder: Path) -> dict[str, Any]:
    """Summarise a finished directory, of which nothing was written now."""
    info = json.loads((folder / directory.INFO).read_text())
    splits = {
        part["name"]: {
            "images": sum(map(int, part["shardLengths"])),
            "of": None,
            "bytes": int(part["numBytes"]),
            "shards": len(part["shardLengths"]),
        }
        for part in info["splits"]
    }
    about = {"directory": str(folder), "name": info["name"], "version": info["version"]}
    classes = len((folder / "label.labels.txt").read_text().splitlines())
    about |= {"classes": classes, "splits": splits, "notes": []}
    return about | {"written_images": 0, "written_bytes": 0}


def effort(images: int, size: int, *, start: float, listed: float) -> dict[str, Any]:
    """Sum up what was written since `listed`, after it was listed since `start`."""
    seconds = time.perf_counter() - listed
    return {
        "written_images": images,
        "written_bytes": size,
        "listing_seconds": round(listed - start, 3),
        "writing_seconds": round(seconds, 3),
        "mb_per_second": round(size / seconds / 1e6, 1),
    }


def images_of(part: Sequence[Shard]) -> int:
    """Count the images of shards."""
    return sum(shard.last - shard.first for shard in part)


def working(
    job: Job, what: str, every: Sequence[Shard], todo: Sequence[Shard], workers: int
) -> Generator[WorkDone]:
    """Yield the events of `job` on the shards `todo`, with images/s, MB/s and the time left.

    These are on stderr: a bar over all shards, or plain lines.
    """
    terminal = sys.stderr.isatty()
    with (
        contextlib.closing(shards.work(job, todo, workers)) as events,
        open(os.devnull, "w") as nowhere,
        tqdm(
            desc=what,
            total=images_of(every),
            initial=images_of(every) - images_of(todo),
            file=sys.stderr if terminal else nowhere,
            dynamic_ncols=terminal,
            bar_format="{desc} {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} "
            "[{elapsed}<{remaining}, {rate_fmt}{postfix}]",
            unit=" images",
        ) as bar,
    ):
        start = reported = time.perf_counter()
        size = 0
        for event in events:
            size += event.size
            now = time.perf_counter()
            bar.set_postfix_str(f"{size / max(now - start, 1e-9) / 1e6:,.0f} MB/s", refresh=False)
            bar.update(event.images)
            if not terminal and now - reported > 10:
                reported = now
                say(str(bar))
            yield event


def say(message: str) -> None:
    """Print a line on stderr."""
    print(message, file=sys.stderr, flush=True)


def _report(done: dict[str, Any]) -> None:
    print(f"{done['directory']}: {done['classes']:,} classes")
    for split, part in done["splits"].items():
        whole = ""
        if part["of"]:
            same = part["of"] == part["images"]
            whole = ", as many as ImageNet has" if same else f" of ImageNet's {part['of']:,}"
        count = f"{part['shards']:,} shard{'s' * (part['shards'] > 1)}"
        size = f"{part['bytes'] / 1e9:,.3f} GB in {count}"
        print(f"  {split}: {part['images']:,} images{whole}; {size}")
    for note in done["notes"]:
        print(f"  {note}")
    print(
        f"  wrote {done['written_images']:,} images in {done['writing_seconds']:,.1f} s "
        f"({done['mb_per_second']:,.0f} MB/s), listed them in {done['listing_seconds']:,.1f} s"
        if done["written_images"]
        else "  all of it was there already"
    )
