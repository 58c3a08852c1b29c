"""Locks that admit one process to a run's folder or a ledger, and say which one.

The kernel's locks (`fcntl.lockf`) end with their process, even after kill -9, and children do not
inherit them. NFS, Lustre and GPFS share them between hosts; buckets (gcsfuse) do not, and some file
systems have none. The file therefore also names the holder, which updates a heartbeat in it. In a
bucket at `gs://`, the lock is an object that is written only if no other process did meanwhile.
Without kernel locks, two processes that start at the same moment both continue.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxrobust.runtime.text import patience, terminal

_BEAT = 30.0  # seconds between two heartbeats
_PATIENCE = 150.0  # without one, another host's process is gone; gcsfuse may hide it for 60 s
_GRACE = 5.0  # a process killed on this host may still be freeing memory
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # from a file system

_held: dict[str, dict[str, Any]] = {}  # by this process, which the kernel would let in again
ELSEWHERE: dict[Path, Callable[[Path], Any]] = {}  # for locks in a folder, what replaces `_File`


@contextlib.contextmanager
def held(path: Path, *, resource: str, otherwise: str, wait: bool = False) -> Iterator[None]:
    """Keep all other processes out of the block; the lock file remains, empty.

    Args:
      path: of the lock file.
      resource: how messages refer to what is locked.
      otherwise: the alternative to waiting, for the message.
      wait: whether to wait until the other process is done, however long that takes.
    Raises:
      ValueError: it is locked: by whom, since when, what to do. With `wait`, only by this process.
      OSError: the file cannot be written.
    """
    me = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
    me["since"] = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    name = os.path.realpath(path)
    if (holder := _held.setdefault(name, me)) is not me:
        raise ValueError(_refusal(path, resource, otherwise, holder))
    try:
        with patience.lasting(f"waiting for {resource}"):
            file, ended = _taken(path, me, resource, otherwise, wait), threading.Event()
        living = threading.Thread(target=_live, args=(file, me, ended), daemon=True)
        living.start()
        try:
            yield
        finally:
            ended.set()
            living.join()  # it must not write to a later file with the same descriptor
            with contextlib.suppress(OSError):
                file.write(b"")
            file.close()
    finally:
        del _held[name]


def wait_for(file: Any) -> None:
    """Wait until no other process writes to an open file; closing it lets the next one in."""
    try:
        with patience.of(f"waiting to write to {file.name}"):
            fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _taken(path: Path, me: dict[str, Any], resource: str, otherwise: str, wait: bool) -> Any:
    begun, first, warned = time.monotonic(), None, False
    kind = next((ELSEWHERE[place] for place in ELSEWHERE if path.is_relative_to(place)), _File)
    while True:
        # Reopened each time, or NFS would return stale content. No other function may open the
        # file, because closing it anywhere in this process releases the lock.
        file = kind(path)
        free, holder = file.free, _read(file)
        here = holder is None or holder["host"] == socket.gethostname()
        waited = time.monotonic() - begun
        if free and (not _runs(holder) if here else waited > _PATIENCE):
            with contextlib.suppress(FileExistsError):  # in a bucket, another one came first
                _sign(file, me)
                return file
        file.close()
        lives = first is not None and holder is not None and holder != first
        late = waited > (_GRACE if here else _PATIENCE)
        if (lives or late) and not wait:
            raise ValueError(_refusal(path, resource, otherwise, holder))
        if wait and not warned and waited > 1:
            warned = True
            terminal.tell(f"{resource} is in use {_words(holder)}: waiting")
        if first is None and not (here or wait):
            most = f"waiting up to {_PATIENCE:.0f} s for a sign of life"
            terminal.tell(f"{resource} was in use {_words(holder)}: {most}")
        first = first or holder
        time.sleep(0.2)


class _File:
    """A lock file on a disk."""

    def __init__(self, path: Path) -> None:
        self._file, self.free = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # EAGAIN, EACCES: it is locked
            self.free = False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise

    def read(self) -> bytes:
        return os.pread(self._file, 4096, 0)

    def write(self, text: bytes) -> None:
        os.pwrite(self._file, text, 0)
        os.ftruncate(self._file, len(text))
        os.fsync(self._file)  # flush it to a bucket

    def close(self) -> None:
        os.close(self._file)


def _read(file: Any) -> dict[str, Any] | None:
    """Read the holder's note in a lock; None: there is no holder, or no note yet."""
    try:
        holder = json.loads(file.read())
        return holder if {"host", "pid", "since", "started", "sign"} <= holder.keys() else None
    except (ValueError, AttributeError):
        return None


def _sign(file: Any, me: dict[str, Any], number: int = 0) -> None:
    """Write who holds the lock; a reader never sees half of it, since only digits change."""
    file.write(json.dumps(me | {"sign": f"{number:09d}"}).encode())


def _live(file: Any, me: dict[str, Any], ended: threading.Event) -> None:
    number = 0
    while not ended.wait(_BEAT):
        number += 1
        with contextlib.suppress(OSError):  # the lock's holder will notice a full disk
            _sign(file, me, number)


def _runs(holder: dict[str, Any] | None) -> bool:
    """Return whether a process of this host still runs, and its id has not been reused."""
    if holder is None or holder["pid"] == os.getpid():  # this process does not hold it
        return False
    try:
        os.kill(holder["pid"], 0)
    except OSError as error:
        if not isinstance(error, PermissionError):  # else it is another user's
            return False
    return bool(_started(holder["pid"]) == holder["started"])


def _started(pid: int) -> str | None:
    """Read when a process started, by Linux's clock; None: it has ended, or this is unknown."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else fields[18]  # a zombie has ended


def _words(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "by another process"
    return f"by process {holder['pid']} on {holder['host']} since {holder['since']}"


def _refusal(path: Path, resource: str, otherwise: str, holder: dict[str, Any] | None) -> str:
    elsewhere = holder is not None and holder["host"] != socket.gethostname()
    gone = f", or remove {path} if that host is gone" if elsewhere else ""
    return f"{resource} is in use {_words(holder)}; wait for it, end it, or {otherwise}{gone}"
