"""Files that are written whole or not at all, with the permissions that the umask gives."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give the path of an empty file beside `path`, which takes its place at the end of the block.

    The block may write that file with any library. Those that move a temporary file there (such as
    safetensors) leave it readable to its owner alone: it gets what the umask gives any new file.
    Where the block raises, the power fails or the disk is full, `path` is what it was before.
    """
    part = path.with_name(f".{path.name}.part-{secrets.token_hex(4)}")
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
