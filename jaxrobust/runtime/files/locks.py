"""One process at a time at a run's folder or a ledger, and who it is.

The kernel's locks (`fcntl.lockf`) end with their process, also at kill -9, and children do not
inherit them; NFS, Lustre and GPFS carry them from host to host. A bucket (gcsfuse) does not, and
some file systems have none: so the file also names its holder, who gives a sign of life in it. Two
processes that start there in the same moment both continue.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxrobust.runtime.text import patience, terminal

_BEAT = 30.0  # seconds between two signs of life
_PATIENCE = 150.0  # without one, another host's process is gone: gcsfuse may hide it for 60 s
_GRACE = 5.0  # one of this host that was killed may have memory to give back first
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # of a file system

_held: dict[str, dict[str, Any]] = {}  # of this process, which the kernel would let in again


@contextlib.contextmanager
def held(path: Path, *, resource: str, otherwise: str, wait: bool = False) -> Iterator[None]:
    """Keep all other processes out of the block with this file, which stays, empty.

    Args:
      path: of the lock.
      resource: the words for what is locked.
      otherwise: what to do instead of waiting.
      wait: until another process has done with it, however long that takes.
    Raises:
      ValueError: somebody has it: who, since when, and what to do. With `wait`, only this process.
      OSError: the file cannot be written.
    """
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    me = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    me |= {"started": _started(os.getpid())}
    name = os.path.realpath(path)
    if (holder := _held.setdefault(name, me)) is not me:
        raise ValueError(_refusal(path, resource, otherwise, holder))
    try:
        with patience.lasting(f"waiting for {resource}"):
            file, ended = _taken(path, resource, otherwise, wait), threading.Event()
        living = threading.Thread(target=_live, args=(file, me, ended), daemon=True)
        try:
            _sign(file, me)
            living.start()
            yield
        finally:
            ended.set()
            if living.ident is not None:
                living.join()  # it must not write to a file that is opened under this number next
            with contextlib.suppress(OSError):
                os.ftruncate(file, 0)
            os.close(file)
    finally:
        del _held[name]


def wait_for(file: Any) -> None:
    """Wait until no other process writes to an open file; closing it lets the next one in."""
    try:
        with patience.of(f"waiting for who writes to {file.name}"):
            fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _taken(path: Path, resource: str, otherwise: str, wait: bool) -> int:
    begun, first, warned = time.monotonic(), None, False
    while True:
        # Opened again each time: else NFS shows what it read before. No other function may open
        # the file, as closing it anywhere in this process gives the lock back.
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        free, holder = _lock(file), _read(file)
        here = holder is None or holder["host"] == socket.gethostname()
        waited = time.monotonic() - begun
        if free and (not _runs(holder) if here else waited > _PATIENCE):
            return file
        os.close(file)
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


def _lock(file: int) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # EAGAIN, EACCES: it is locked
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _read(file: int) -> dict[str, Any] | None:
    """Read who holds a lock, as the holder wrote; None: no process does, or it is not known yet."""
    try:
        holder = json.loads(os.pread(file, 4096, 0))
        return holder if {"host", "pid", "since", "started", "sign"} <= holder.keys() else None
    except (ValueError, AttributeError):
        return None


def _sign(file: int, me: dict[str, Any], number: int = 0) -> None:
    """Write who holds the lock; a reader never meets half of it, as only digits change."""
    text = json.dumps(me | {"sign": f"{number:09d}"}).encode()
    if not number:
        os.ftruncate(file, 0)
    os.pwrite(file, text, 0)
    os.fsync(file)  # to a bucket


def _live(file: int, me: dict[str, Any], ended: threading.Event) -> None:
    number = 0
    while not ended.wait(_BEAT):
        number += 1
        with contextlib.suppress(OSError):  # a full disk is the holder's to notice
            _sign(file, me, number)


def _runs(holder: dict[str, Any] | None) -> bool:
    """Tell whether a process of this host is there, and no other one under its number."""
    if holder is None or holder["pid"] == os.getpid():  # this one does not hold it
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return bool(_started(holder["pid"]) == holder["started"])


def _started(pid: int) -> str | None:
    """Read when a process was started, by Linux's clock; None: it has ended, or it is not known."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else fields[18]  # a zombie waits for its parent's interest


def _words(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "by another process"
    return f"by process {holder['pid']} on {holder['host']} since {holder['since']}"


def _refusal(path: Path, resource: str, otherwise: str, holder: dict[str, Any] | None) -> str:
    elsewhere = holder is not None and holder["host"] != socket.gethostname()
    gone = f", or remove {path} if that host is gone" if elsewhere else ""
    return f"{resource} is in use {_words(holder)}: wait for it, end it, or {otherwise}{gone}"
