"""Local directories and `gs://` buckets through etils.epath, with errors that say what to do.

Listings and full files use fsspec, on which epath builds: one request each, many in parallel, and
no listing cache, which would take some kilobytes per object of a bucket.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.data.source import DataError

_GS = "gs://"
_BUCKET = (
    "check its name and give this machine access: `gcloud auth application-default login`, or on a "
    "TPU VM roles/storage.objectViewer for its service account"
)


class Entries(NamedTuple):
    """The entries directly in a directory, sorted, without hidden ones."""

    folders: list[str]
    files: list[str]


def place(text: str | os.PathLike) -> Any:
    """Return an `epath.Path`, local or on Google Cloud Storage."""
    from etils import epath

    text = os.fspath(text)
    if "://" in text and not text.startswith(_GS):
        raise DataError(f"{text}: data must be in a local directory or on {_GS}")
    if is_remote(text) and importlib.util.find_spec("gcsfs") is None:
        raise DataError(
            f"{text}: to use Google Cloud Storage, pip install 'jaxrobust[gcs]' (gcsfs), or mount "
            "the bucket with gcsfuse and give the local path"
        )
    return epath.Path(text).expanduser()


def is_remote(path: str | os.PathLike) -> bool:
    """Return whether a path is in a bucket."""
    return os.fspath(path).startswith(_GS)


@contextlib.contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Turn any exception inside into a DataError that names `path` and says what to do."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # OSError; types of google.auth, gcsfs and aiohttp
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = _BUCKET if is_remote(path) else "check it and its permissions"
        raise DataError(f"{path} cannot be read ({reason}); {remedy}") from error


def file_system(path: str | os.PathLike) -> tuple[Any, str]:
    """Return fsspec's file system for a remote path, and the path within it."""
    import fsspec

    return fsspec.core.url_to_fs(os.fspath(path), use_listings_cache=False)


def version(path: str) -> str:
    """Return a text that changes when a file is replaced."""
    with reading(path):
        if not is_remote(path):
            state = os.stat(path)
            return f"{state.st_ino} {state.st_mtime_ns} {state.st_size}"
        files, base = file_system(path)
        info = files.info(base)
        return f"{info['size']} {[info.get(key) for key in ('etag', 'mtime', 'updated')]}"


def entries(path: str | os.PathLike[str]) -> Entries | None:
    """List the entries of a directory; None if there is no such directory."""
    names: dict[bool, list[str]] = {True: [], False: []}
    try:
        with reading(path):
            if is_remote(path):
                files, base = file_system(path)
                for entry in files.ls(base, detail=True):
                    if entry["name"].rstrip("/") != base.rstrip("/"):  # the folder's own marker
                        name = entry["name"].rstrip("/").rpartition("/")[2]
                        names[entry["type"] == "directory"].append(name)
            else:
                with os.scandir(os.fspath(path)) as scan:
                    for entry in scan:
                        names[entry.is_dir()].append(entry.name)
    except DataError as error:
        if isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
            return None
        raise
    return Entries(*(sorted(n for n in names[k] if not n.startswith(".")) for k in (True, False)))


def files_below(path: str | os.PathLike) -> list[str]:
    """Return the files at any depth below a directory, as relative paths in torchvision's order.

    That is folder by folder, both sorted. Links to folders are followed, hidden files skipped.
    """
    path = os.fspath(path)
    if is_remote(path):
        files, base = file_system(path)
        paths = [name[len(base) + 1 :] for name in files.find(base)]
    else:
        skip = len(path) + 1

        def refuse(error: OSError) -> None:
            raise error

        paths = [
            f"{folder[skip:]}/{name}" if len(folder) > skip else name
            for folder, _, names in os.walk(path, onerror=refuse, followlinks=True)
            for name in names
        ]
    visible = [name for name in paths if not name.startswith(".") and "/." not in name]
    return sorted(visible, key=lambda name: name.rpartition("/")[::2])


def read_files(paths: Sequence[str], remedy: str) -> list[bytes]:
    """Return the contents of local files, or of files in a bucket, fetched in parallel."""
    if not paths or not is_remote(paths[0]):
        contents = []
        for path in paths:
            try:
                contents.append(Path(path).read_bytes())
            except OSError as error:
                reason = error.strerror or error
                raise DataError(f"{path} cannot be read ({reason}); {remedy}") from error
        return contents
    with reading(paths[0]):
        files, _ = file_system(paths[0])
        # `cat_ranges` without ranges, because `cat` would treat [, ? and * in a name as patterns.
        contents = files.cat_ranges(list(paths), None, None, on_error="return")
    for path, content in zip(paths, contents, strict=True):
        if isinstance(content, Exception):
            reason = " ".join(str(content).split()) or type(content).__name__
            raise DataError(f"{path} cannot be read ({reason}); {remedy}") from content
    return contents
