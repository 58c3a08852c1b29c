"""Shards of `tf.train.Example`s in ArrayRecord: written and read by several processes."""

import contextlib
import functools
import hashlib
import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from jaxrobust.runtime.files import whole
from jaxrobust.runtime.files.download import file_sha256 as sha256

SALT = b"jaxrobust/prepare_imagenet/1/"  # other bytes, another order of the records
PARTIAL = ".partial"
NAMES = ("file_name", "id")  # the feature that names a record
# One record per group, as TFDS writes; JPEG does not get smaller (0.07 %), only 3 times slower.
_OPTIONS = "group_size:1,uncompressed"
CHUNK = 32  # records between two reports
_THREADS, _AHEAD = 8, 32  # reads under way: a shard's images lie all over the source


class Shard(NamedTuple):
    """Records [first, last) of a split, in `path`; `plan` is the table of all the split's images.

    The table is `RawSplit.rows` in the order of records, as `.npy`; for checking, it is
    the split's index. `sha256` is empty where it is not known.
    """

    path: Path
    plan: Path
    origin: Path
    first: int
    last: int
    sha256: str = ""


class WorkDone(NamedTuple):
    """Work done since the last one; `shard` and `sha256` at the end of a shard."""

    images: int
    size: int
    shard: str = ""
    sha256: str = ""
    damage: str = ""


Job = Callable[[Shard], Iterator[WorkDone]]


def order(rows: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Return the order of records: by sha256(SALT + "CLASS/NAME"), the same wherever the images
    lie.

    Args:
      rows: the table of a split.
      classes: in the order of labels.
    Returns:
      i64[N], a permutation.
    """
    keys = [
        os.fsencode(classes[label]) + b"/" + name
        for name, label in zip(rows["name"].tolist(), rows["label"].tolist(), strict=True)
    ]
    digests = b"".join(hashlib.sha256(SALT + key).digest()[:8] for key in keys)
    return np.lexsort((keys, np.frombuffer(digests, ">u8")))


def file_name(name: str, split: str, i: int, count: int) -> str:
    """Return the name of shard `i` of `count`, as TFDS writes it."""
    return f"{name}-{split}.array_record-{i:05}-of-{count:05}"


def example(features: Mapping[str, bytes | int]) -> bytes:
    """Return one serialised `tf.train.Example` with these features."""
    from tensorflow_datasets.proto import tf_example_pb2

    message = tf_example_pb2.Example()
    for key, value in features.items():
        feature = message.features.feature[key]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        else:
            feature.int64_list.value.append(value)
    return message.SerializeToString(deterministic=True)


def length(path: Path) -> int | None:
    """How many records a shard has; None when there is no whole shard."""
    from array_record.python.array_record_module import ArrayRecordReader

    if not path.exists():
        return None
    try:
        reader = ArrayRecordReader(str(path))
        count = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError, IndexError):  # cut off, or not a record file
        return None
    return count


@contextlib.contextmanager
def writing(path: Path, count: int) -> Iterator[Callable[[bytes], None]]:
    """Give what writes a record of a shard, which gets its name when it is whole."""
    from array_record.python.array_record_module import ArrayRecordWriter

    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    with whole.explained(path):
        try:
            writer = ArrayRecordWriter(str(partial), _OPTIONS)
            yield writer.write
            writer.close()
        except RuntimeError as error:
            reason = str(error).partition(";")[0].removeprefix("write() failed: ")
            raise OSError(f"cannot write {path}: {reason}") from error
    if length(partial) != count:
        raise OSError(f"cannot write {path}: it does not hold {count} records afterwards")
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def write(shard: Shard) -> Iterator[WorkDone]:
    """Write a shard of files that lie in a tar file or in folders."""
    rows = np.array(np.load(shard.plan, mmap_mode="r")[shard.first : shard.last])
    images = zip(rows.tolist(), _read_ahead(shard.origin, rows), strict=True)
    records = (
        (len(data), {"image": data, "label": label, "file_name": name})
        for (name, _, label, _, _), data in images
    )
    return put(shard, records)


def put(
    shard: Shard, records: Iterable[tuple[int, Mapping[str, bytes | int]]]
) -> Generator[WorkDone]:
    """Write the records of a shard, each with the size of its image in bytes."""
    images = size = 0
    with writing(shard.path, shard.last - shard.first) as add:
        for length_of, features in records:
            add(example(features))
            images, size = images + 1, size + length_of
            if images == CHUNK:
                yield WorkDone(images, size)
                images = size = 0
    yield WorkDone(images, size, shard.path.name, sha256(shard.path))


def _read_ahead(origin: Path, rows: np.ndarray) -> Iterator[bytes]:
    """Yield the images in the order of `rows`, several of them being read."""
    descriptor = os.open(origin, os.O_RDONLY) if origin.is_file() else None
    read = functools.partial(_read, origin, descriptor)
    pending: deque[Future[bytes]] = deque()
    pool = ThreadPoolExecutor(_THREADS)
    try:
        for row in rows.tolist():
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
        except OSError as error:  # it does not say which file
            raise OSError(error.errno, error.strerror, str(origin)) from error
    if len(data) != size:
        raise ValueError(
            f"{path} has changed: {os.fsdecode(name)} had {size:,} bytes, and now {len(data):,}; "
            "begin again in another --out"
        )
    return data


def check(shard: Shard) -> Iterator[WorkDone]:
    """Read a shard; the last event says what is wrong with it, if anything."""
    images, damage = 0, ""
    try:
        for count, length_of in _parsed(shard):
            images += count
            yield WorkDone(count, length_of)
        if images != shard.last - shard.first:
            damage = f"has {images} records, not {shard.last - shard.first}"
        elif shard.sha256 and sha256(shard.path) != shard.sha256:
            damage = "is not what was written, its sha256 has changed"
        elif not shard.sha256:
            damage = "has no sha256 on record"
    except FileNotFoundError:
        damage = "is missing"
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        damage = " ".join(str(error).split())
    yield WorkDone(0, 0, shard.path.name, damage=damage)


def _parsed(shard: Shard) -> Iterator[tuple[int, int]]:
    from array_record.python.array_record_module import ArrayRecordReader
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    if not shard.path.exists():
        raise FileNotFoundError(shard.path)
    labels, names = _index(shard.plan)
    reader = ArrayRecordReader(str(shard.path))
    total = reader.num_records()
    for begin in range(0, total, CHUNK):
        size = 0
        for i, record in enumerate(reader.read(begin, min(begin + CHUNK, total)), begin):
            try:
                feature = tf_example_pb2.Example.FromString(record).features.feature
                image = feature["image"].bytes_list.value[0]
                label = feature["label"].int64_list.value[0]
                name = next(filter(None, (feature[key].bytes_list.value for key in NAMES)))[0]
            except (DecodeError, IndexError, StopIteration) as error:
                raise ValueError(f"record {i} is no example of this data set ({error})") from error
            row = shard.first + i
            if not image or row >= len(names) or (label, name) != (labels[row], names[row]):
                raise ValueError(f"record {i} is not what the index says")
            size += len(image)
        yield min(CHUNK, total - begin), size
    reader.close()


@functools.lru_cache(2)
def _index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as arrays:
        return arrays["labels"], arrays["names"]


def work(job: Job, shards: Sequence[Shard], workers: int) -> Generator[WorkDone]:
    """Yield the events of `job` on all shards, by `workers` processes; in this one if that is 1.

    Closing the iterator ends the processes; so does the end of this one, who reads their reports.
    """
    workers = min(workers, len(shards))
    if workers < 2:
        yield from itertools.chain.from_iterable(map(job, shards))
        return
    context = multiprocessing.get_context("spawn")  # no copies of another process' pipe ends
    processes = []
    readers: list[Connection] = []
    try:
        for i in range(workers):
            reader, writer = context.Pipe(duplex=False)
            given = (job, shards[i::workers], writer)
            process = context.Process(target=_work, args=given, daemon=True)
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
            for shard in shards:
                for event in job(shard):
                    events.send(event)
            events.send(None)
        except BrokenPipeError:
            raise
        except Exception as error:
            events.send(error)
