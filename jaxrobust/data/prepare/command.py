"""Flags, processes, progress, errors and reports that all `prepare` commands share."""

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from jaxrobust.data.prepare import writer
from jaxrobust.data.prepare.writer import Job, Shard, WorkDone
from jaxrobust.data.splits.subsets import Index, index_name, read_index
from jaxrobust.runtime.commandline.arguments import Arguments, stop
from jaxrobust.runtime.files.download import Unreachable

_NAMES = ("file_name", "id")  # features that may name a record


def parser(doc: str, name: str) -> Arguments:
    """Build the parser of `jaxrobust prepare NAME`; `doc` is its --help."""
    return Arguments(doc, prog=f"jaxrobust prepare {name}")


def common_flags(flags: Arguments) -> None:
    """Add the flags shared by the data sets that become ArrayRecord."""
    workers = min(os.cpu_count() or 1, 32)
    flags.flag(
        "workers", type=int, default=workers, help="Number of processes; default: %(default)s."
    )
    flags.flag("check", action="store_true", help="Verify every byte of OUT instead of writing.")
    flags.flag("json", action="store_true", help="Print one JSON object on the last line.")


def run(args: argparse.Namespace, prepare: Callable[[argparse.Namespace], dict[str, Any]]) -> None:
    """Prepare or check the data; print a summary, or exit with one sentence on stderr."""
    args.out = os.path.expanduser(args.out)
    try:
        if "://" in args.out:
            remedy = "write to a local folder, then copy it with `gcloud storage cp -r`"
            raise ValueError(f"--out {args.out}: {remedy}")
        if args.workers < 1:
            raise ValueError(f"--workers {args.workers} must be at least 1")
        result = _check_folder(args) if args.check else prepare(args)
    except KeyboardInterrupt:
        stop("interrupted; run the same command to continue", 130)
    except ValueError as error:
        stop(error, 2)
    except Unreachable as error:  # its message already says so
        stop(error, 3)
    except OSError as error:
        stop(f"{error}{'' if args.check else '; run the same command to continue'}", 3)
    if not args.check:
        _report(result)
    if args.json:
        print(json.dumps(result))


def _check_folder(args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    pattern = f"{args.name or '*'}/*/{writer.SETTINGS}"
    folders = sorted(path.parent for path in Path(args.out).glob(pattern))
    if len(folders) != 1:
        names = ", ".join(str(path.relative_to(args.out)) for path in folders) or "no data set"
        remedy = "choose one with --name" if folders else "give the folder that you wrote it to"
        raise ValueError(f"{args.out} holds {names} written by this tool; {remedy}")
    (folder,) = folders
    if not (folder / writer.INFO).exists():
        raise ValueError(f"{folder} is incomplete; rerun the command that started it")
    sums = writer.read_sums(folder)
    damage = {
        name: "is missing or has changed"
        for name, digest in sums.items()
        if ".array_record-" not in name
        and not ((folder / name).exists() and writer.sha256(folder / name) == digest)
    }
    shards: list[Shard] = []
    if not damage:
        info = json.loads((folder / writer.INFO).read_text())
        for part in info["splits"]:
            bounds = np.cumsum([0, *map(int, part["shardLengths"])]).tolist()
            shards += writer.shards_of(folder, info["name"], part["name"], bounds)
    job = functools.partial(check, sums=sums)
    with contextlib.closing(working(job, "checking", shards, shards, args.workers)) as events:
        damage |= {event.shard: event.result for event in events if event.result}
    if damage:
        name, fault = next(iter(damage.items()))
        more = f" (and {len(damage) - 1} more)" * (len(damage) > 1)
        remedy = "remove the damaged files and rerun the command that wrote them"
        raise OSError(f"{folder / name} {fault}{more}; {remedy}")
    images = images_of(shards)
    print(f"{folder}: {images:,} images; all records, labels and hashes are correct")
    seconds = round(time.perf_counter() - start, 3)
    return {"directory": str(folder), "images": images, "files": len(sums), "seconds": seconds}


def check(shard: Shard, *, sums: Mapping[str, str]) -> Iterator[WorkDone]:
    """Read a shard; the last event describes any damage."""
    images, damage = 0, ""
    digest = sums.get(shard.path.name)
    try:
        for event in _parsed(shard):
            images += event.images
            yield event
        if images != shard.last - shard.first:
            damage = f"has {images} records, not {shard.last - shard.first}"
        elif not digest:
            damage = "has no sha256 on record"
        elif writer.sha256(shard.path) != digest:
            damage = "has changed since it was written (its sha256 differs)"
    except FileNotFoundError:
        damage = "is missing"
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        damage = " ".join(str(error).split())
    yield WorkDone(0, 0, shard.path.name, damage)


def _parsed(shard: Shard) -> Iterator[WorkDone]:
    from array_record.python.array_record_module import ArrayRecordReader
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    if not shard.path.exists():
        raise FileNotFoundError(shard.path)
    labels, names = _index(shard.path.parent, shard.split)
    reader = ArrayRecordReader(str(shard.path))
    total = reader.num_records()
    for begin in range(0, total, writer.CHUNK):
        size = 0
        for i, record in enumerate(reader.read(begin, min(begin + writer.CHUNK, total)), begin):
            try:
                feature = tf_example_pb2.Example.FromString(record).features.feature
                image = feature["image"].bytes_list.value[0]
                label = feature["label"].int64_list.value[0]
                name = next(filter(None, (feature[key].bytes_list.value for key in _NAMES)))[0]
            except (DecodeError, IndexError, StopIteration) as error:
                raise ValueError(
                    f"record {i} is not an example of this data set ({error})"
                ) from error
            row = shard.first + i
            if not image or row >= len(names) or (label, name) != (labels[row], names[row]):
                raise ValueError(f"record {i} differs from the index")
            size += len(image)
        yield WorkDone(min(writer.CHUNK, total - begin), size)
    reader.close()


@functools.lru_cache(2)
def _index(folder: Path, split: str) -> Index:
    index = read_index(folder, split)
    if index is None:
        raise ValueError(f"{folder / index_name(split)} is missing or damaged")
    return index


def work(job: Job, shards: Sequence[Shard], workers: int) -> Generator[WorkDone]:
    """Yield the events of `job` on all shards, run by `workers` processes; in-process if that is 1.

    Closing the iterator, or the end of this process, which reads their reports, ends the others.
    """
    workers = min(workers, len(shards))
    if workers < 2:
        yield from itertools.chain.from_iterable(map(job, shards))
        return
    context = multiprocessing.get_context("spawn")  # does not inherit pipe ends of other processes
    processes = []
    readers: list[Connection] = []
    try:
        for i in range(workers):
            reader, writer = context.Pipe(duplex=False)
            arguments = (job, shards[i::workers], writer)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            writer.close()
            processes.append(process)
            readers.append(reader)
        while readers:
            for reader in cast(list[Connection], wait(readers)):
                try:
                    message = reader.recv()
                except EOFError:
                    message = ChildProcessError("a worker process was killed (out of memory?)")
                if isinstance(message, Exception):
                    raise message
                if message is None:
                    readers.remove(reader)
                else:
                    yield message
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _work(job: Job, shards: Sequence[Shard], events: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process decides
    with contextlib.suppress(BrokenPipeError):  # the first process is gone
        try:
            for event in itertools.chain.from_iterable(map(job, shards)):
                events.send(event)
            events.send(None)
        except BrokenPipeError:
            raise
        except Exception as error:
            events.send(error)


def write(plan: writer.DatasetPlan, job: Job, todo: Sequence[Shard], workers: int) -> None:
    """Write the shards of a data set and their sha256."""
    with contextlib.closing(working(job, "writing", plan.shards(), todo, workers)) as events:
        for event in events:
            if event.shard:
                writer.add_sum(plan.folder, event.shard, event.result)


def done(folder: Path) -> dict[str, Any]:
    """Summarize a finished folder when nothing had to be written."""
    info = json.loads((folder / writer.INFO).read_text())
    splits = {
        part["name"]: {
            "images": sum(map(int, part["shardLengths"])),
            "of": None,
            "bytes": int(part["numBytes"]),
            "shards": len(part["shardLengths"]),
        }
        for part in info["splits"]
    }
    classes = len((folder / "label.labels.txt").read_text().splitlines())
    return {
        **{"directory": str(folder), "name": info["name"], "version": info["version"]},
        **{"classes": classes, "splits": splits, "notes": []},
        **{"written_images": 0, "written_bytes": 0},
    }


def effort(shards: Sequence[Shard], size: int, *, start: float, listed: float) -> dict[str, Any]:
    """Summarize what was written since `listed`; listing began at `start`."""
    seconds = time.perf_counter() - listed
    return {
        "written_images": images_of(shards),
        "written_bytes": size,
        "listing_seconds": round(listed - start, 3),
        "writing_seconds": round(seconds, 3),
        "mb_per_second": round(size / seconds / 1e6, 1),
    }


def images_of(shards: Sequence[Shard]) -> int:
    """Count the images in the shards."""
    return sum(shard.last - shard.first for shard in shards)


def working(
    job: Job, task: str, shards: Sequence[Shard], todo: Sequence[Shard], workers: int
) -> Generator[WorkDone]:
    """Yield the events of `job` on the shards `todo`, with images/s, MB/s and time left.

    Progress goes to stderr: a bar over all shards, or plain lines.
    """
    terminal = sys.stderr.isatty()
    with (
        contextlib.closing(work(job, todo, workers)) as events,
        open(os.devnull, "w") as nowhere,
        tqdm(
            desc=task,
            total=images_of(shards),
            initial=images_of(shards) - images_of(todo),
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
        share = ""
        if part["of"]:
            same = part["of"] == part["images"]
            share = ", as many as ImageNet has" if same else f" of ImageNet's {part['of']:,}"
        count = f"{part['shards']:,} shard{'s' * (part['shards'] > 1)}"
        size = f"{part['bytes'] / 1e9:,.3f} GB in {count}"
        print(f"  {split}: {part['images']:,} images{share}; {size}")
    for note in done["notes"]:
        print(f"  {note}")
    print(
        f"  wrote {done['written_images']:,} images in {done['writing_seconds']:,.1f} s "
        f"({done['mb_per_second']:,.0f} MB/s), listed them in {done['listing_seconds']:,.1f} s"
        if done["written_images"]
        else "  everything was already there"
    )
