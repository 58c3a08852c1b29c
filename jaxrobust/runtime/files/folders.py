"""Folders that users name: missing ones, those in buckets, and those that cannot be written."""

import contextlib
import difflib
from collections.abc import Iterator
from pathlib import Path

from jaxrobust.runtime.files import whole


def similar(path: Path) -> str:
    """Return the end of a message about a missing path: a similar one, or ""."""
    if path.exists():
        return ""
    names = [other.name for other in path.parent.glob("*")]
    close = difflib.get_close_matches(path.name, names, 1, cutoff=0.7)
    return f"; did you mean {path.with_name(close[0])}?" if close else ""


def mounted(flag: str, text: str) -> Path:
    """Parse a flag's folder: locks, growing logs and renames need a file system, not a bucket."""
    scheme, separator, address = text.partition("://")
    if not separator:
        return Path(text)
    refusal = f"--{flag} {text} is an address, and files are written to a folder"
    bucket, _, path = address.partition("/")
    if scheme != "gs" or not bucket:
        raise ValueError(f"{refusal}; give one, such as --{flag} runs/1")
    mount = f"$HOME/{bucket}"
    raise ValueError(
        f"{refusal}: mount the bucket on every host, mkdir -p {mount} && gcsfuse --implicit-dirs "
        f"--metadata-cache-ttl-secs=0 {bucket} {mount}, and give --{flag} {mount}/{path}"
    )


@contextlib.contextmanager
def writing(flag: str, folder: Path) -> Iterator[None]:
    """Reject a flag's folder if writing to it in the block fails, except for a full disk."""
    try:
        yield
    except OSError as error:
        if whole.disk_full(error):
            raise
        raise ValueError(
            f"cannot write to --{flag} {folder} ({error.strerror or error}); name a folder that "
            "can be written"
        ) from error
