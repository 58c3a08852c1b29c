"""Atomic file writes, with the permissions that the umask gives."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota, `ulimit -f`


class DiskFull(OSError):
    """A file did not fit; the message says what to do."""

    def __str__(self) -> str:
        return str(self.strerror)


def disk_full(error: BaseException | None) -> bool:
    """Return whether an error or its cause is a full disk, a quota or a file size limit."""
    return _reason(error) is not None


def _reason(error: BaseException | None) -> str | None:
    """Return the system's message about a full disk; None for other errors."""
    while error is not None:
        for number in _NO_ROOM:
            words = os.strerror(number)
            if getattr(error, "errno", None) == number or words in str(error):
                return words
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def explained(path: Path, size: int | None = None) -> Iterator[None]:
    """Turn a full disk into a sentence about the file that did not fit and its `size`."""
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if (reason := _reason(error)) is None:
            raise
        takes = "" if size is None else f"it needs {amount(size)}, but "
        free = shutil.disk_usage(next(p for p in path.absolute().parents if p.is_dir())).free
        raise DiskFull(
            errno.ENOSPC,
            f"cannot write {path} ({reason}): {takes}only {amount(free)} is free there; free "
            "some space, or write elsewhere",
        ) from error


def amount(size: int) -> str:
    """Format a number of bytes for people."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**power:
            return f"{size / 1024**power:.1f} {unit}"
    return f"{size} bytes"


@contextlib.contextmanager
def writing(path: Path, size: int | None = None) -> Iterator[Path]:
    """Yield the path of an empty file next to `path`, which replaces it in the end.

    Any library may write it; it gets the umask's permissions. If the block raises, the power fails
    or the disk is full, `path` stays as it was.
    """
    part = path.with_name(f".{path.name}.part-{secrets.token_hex(4)}")
    with explained(path, size):
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        mode = part.stat().st_mode & 0o777
        try:
            yield part
            if part.stat().st_mode & 0o777 != mode:
                part.chmod(mode)
            with part.open("rb") as file:
                os.fsync(file.fileno())  # else the new name may outlive the content
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)  # on a full disk every byte counts
            raise
