"""Folders that users name: missing ones, and those that cannot be written."""

import contextlib
import difflib
import tempfile
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


def check_renames(flag: str, folder: Path) -> None:
    """Reject a flag's folder if folders in it cannot be renamed, as finished checkpoints are."""
    with tempfile.TemporaryDirectory(prefix=".renames-", dir=folder) as trial:
        old = Path(trial) / "old"
        old.mkdir()
        (old / "file").touch()
        try:
            old.rename(old.with_name("new"))
        except OSError as error:
            raise ValueError(
                f"--{flag} {folder} is on a file system that cannot rename folders "
                f"({error.strerror}), such as a flat bucket mounted by gcsfuse: give "
                f"--{flag} gs://BUCKET/FOLDER, or mount a bucket with a hierarchical namespace "
                "(gcloud storage buckets create gs://BUCKET --uniform-bucket-level-access "
                "--enable-hierarchical-namespace)"
            ) from error


@contextlib.contextmanager
def writing(flag: str, folder: Path) -> Iterator[None]:
    """Reject a flag's folder if writing to it in the block fails, except for a full disk."""
    try:
        yield
    except OSError as error:
        if whole.disk_full(error):
            raise
        raise ValueError(
            f"cannot write to --{flag} {folder} ({error.strerror or error}); name a writable folder"
        ) from error
