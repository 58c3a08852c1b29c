"""Files at `gs://` addresses: commands work in a temporary folder that follows the bucket.

Changes are uploaded every few seconds and before each checkpoint, which Orbax writes to the bucket
itself. Objects cannot grow, so each upload of a file that does, such as `metrics.jsonl`, is a new
object, `metrics.jsonl.part-000001`, and a download joins them. If the file was replaced,
the part ends in `-all` and earlier ones no longer count.
"""

import atexit
import contextlib
import functools
import importlib.util
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.runtime.files import locks
from jaxrobust.runtime.text import patience, terminal

_SCHEME = "gs://"
EVERY_S = 10.0  # seconds between uploads
_GROWING = (".jsonl", ".images")  # suffixes of files that grow or are replaced, and never edited
_TEXTS = (".json", ".jsonl", ".txt", ".html", ".md")
_LARGE = (".images", ".pb")  # listings and reports do without them
_PART = re.compile(r"(.+)\.part-(\d{6})(-all)?")
_CHECKPOINT = re.compile(r"/(latest|best|stopped|epochs|kept)/\d+[./]")  # Orbax reads and writes it
_LOCAL = re.compile(r"\..*\.part-[0-9a-f]{8}|(.*\.)?lock")  # half-written files, and locks
_SHARED = "xla-cache"  # a folder of compiled programs, which each host makes for itself
_END = 4096  # bytes at the end of an upload that show whether the file has only grown since
_mirrors: dict[str, "_Mirror"] = {}  # by bucket


class BucketError(OSError):
    """A bucket refuses or does not answer; the message is a sentence."""


def opened(flag: str, text: str, *, light: bool = False) -> Path:
    """Parse a flag's path; for a `gs://` address, return the local folder that follows it.

    With `light`, large files that listings do not need are not downloaded.
    """
    if "://" not in text:
        return Path(text)
    bucket, _, name = text.removeprefix(_SCHEME).partition("/")
    name = name.strip("/")
    if not text.startswith(_SCHEME) or not bucket or not name:
        raise ValueError(
            f"--{flag} {text} is neither a folder nor {_SCHEME}BUCKET/FOLDER; give one of these"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(
            f"--{flag} {text}: to use Google Cloud Storage, pip install 'jaxrobust[gcs]', or mount "
            "the bucket with gcsfuse and give the local path"
        )
    try:
        if bucket not in _mirrors:
            _mirrors[bucket] = _Mirror(bucket)
        return fetched(_mirrors[bucket].root / name, light=light)
    except (BucketError, ValueError) as error:
        raise ValueError(f"--{flag} {text}: {error}") from error


def address(path: Path) -> str | None:
    """Return the `gs://` address that a local path follows; None if it follows none."""
    mirror = _mirror_of(path)
    return None if mirror is None else f"{mirror.address}/{mirror.name_of(path)}"


def fetched(path: Path, *, light: bool = False) -> Path:
    """Download what a path follows, if it follows an address, and return the path."""
    if mirror := _mirror_of(path):
        mirror.fetch(path, light=light)
    return path


def upload(path: Path) -> None:
    """Upload all changes in the bucket that a path follows; raise `BucketError` if that fails."""
    if mirror := _mirror_of(path):
        mirror.upload()


def check(path: Path) -> None:
    """Raise `BucketError` if a path follows a bucket that does not answer."""
    if mirror := _mirror_of(path):
        with answering(mirror.address):
            mirror.bucket.reload()


def close() -> None:
    """Upload all changes; what cannot be uploaded stays here, and a line on stderr says where."""
    while _mirrors:
        _mirrors.popitem()[1].close()


@contextlib.contextmanager
def answering(place: str) -> Iterator[None]:
    """Turn the errors of Google's libraries inside into sentences."""
    import requests
    from google.api_core import exceptions
    from google.auth import exceptions as credentials

    try:
        yield
    except credentials.DefaultCredentialsError as error:
        raise BucketError(
            f"{place} needs a login: gcloud auth application-default login"
        ) from error
    except (exceptions.Forbidden, exceptions.Unauthorized) as error:
        raise BucketError(
            f"{place} is not accessible to this account ({_reason(error)}); grant it "
            "roles/storage.objectUser and roles/storage.legacyBucketReader on the bucket"
        ) from error
    except exceptions.NotFound as error:
        raise BucketError(f"{place} does not exist ({_reason(error)}); check its name") from error
    except (
        *(exceptions.GoogleAPIError, credentials.GoogleAuthError),
        *(requests.RequestException, ConnectionError),
    ) as error:
        raise BucketError(
            f"{place} does not answer ({_reason(error)}); check the network and the bucket"
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "message", error)).split())[:200] or type(error).__name__


def _mirror_of(path: Path) -> "_Mirror | None":
    return next((one for one in _mirrors.values() if path.is_relative_to(one.root)), None)


class _Uploaded(NamedTuple):
    """A local file as the bucket has it."""

    inode: int
    changed: int  # ns
    size: int  # bytes
    end: bytes
    number: int  # of its last part

    @classmethod
    def of(cls, status: os.stat_result, content: bytes, number: int) -> "_Uploaded":
        return cls(status.st_ino, status.st_mtime_ns, len(content), content[-_END:], number)


class _Mirror:
    """A folder that follows a bucket, except for checkpoints and locks."""

    def __init__(self, name: str) -> None:
        import fsspec
        from google.cloud import storage

        # TensorStore writes objects that a cached listing would lack.
        fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
        self.address, self._process = f"{_SCHEME}{name}", os.getpid()
        with answering(self.address), patience.of(f"connecting to {self.address}"):
            self.bucket = storage.Client().get_bucket(name)  # as Orbax does
        self.root = Path(tempfile.mkdtemp(prefix="jaxrobust-")).resolve() / name
        self._files: dict[Path, _Uploaded] = {}
        self._turn, self._ended = threading.Lock(), threading.Event()
        terminal.ADDRESSES[str(self.root)] = self.address
        locks.ELSEWHERE[self.root] = functools.partial(_Lock, self)
        atexit.register(self.close)
        threading.Thread(target=self._follow, daemon=True).start()

    def name_of(self, path: Path) -> str:
        """Return the name of a path's object."""
        return path.relative_to(self.root).as_posix()

    def fetch(self, path: Path, *, light: bool) -> None:
        """Download a file, or all files in a folder."""
        name, parts = self.name_of(path), dict[str, list[tuple[int, bool, Any]]]()
        with answering(f"{self.address}/{name}"), self._turn, ThreadPoolExecutor(16) as pool:
            for blob in self.bucket.list_blobs(prefix=name):
                file, *part = _parsed(blob.name)
                here = file == name or file.startswith(f"{name}/")
                skipped = light and (file.endswith(_LARGE) or "tfevents" in file)
                if here and not (skipped or file.endswith("/") or _CHECKPOINT.search(file)):
                    parts.setdefault(file, []).append((*part, blob))
            for file, rows in parts.items():
                rows.sort(key=lambda row: row[0])
                start = max((i for i, row in enumerate(rows) if row[1]), default=0)  # the last -all
                blobs = [blob for *_, blob in rows[start:]]
                content = b"".join(pool.map(lambda blob: blob.download_as_bytes(), blobs))
                local = self.root / file
                local.parent.mkdir(parents=True, exist_ok=True)
                local.write_bytes(content)
                self._files[local] = _Uploaded.of(local.stat(), content, rows[-1][0])

    def upload(self) -> None:
        """Upload what has changed since the last time."""
        with answering(f"{self.address}, whose local copy is in {self.root.parent},"), self._turn:
            states: dict[Path, os.stat_result] = {}
            for file in self.root.rglob("*"):
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    if not (_LOCAL.fullmatch(file.name) or _SHARED in file.parts or file.is_dir()):
                        states[file] = file.stat()
            # Lines, as they were now, follow all other files, because they refer to these.
            for file in sorted(states, key=lambda file: file.suffix == ".jsonl"):
                with contextlib.suppress(FileNotFoundError):
                    self._upload(file, states[file])
            for file in [file for file in self._files if not file.exists()]:
                self._remove(self.name_of(file))
                del self._files[file]

    def _upload(self, file: Path, state: os.stat_result) -> None:
        old, name = self._files.get(file), self.name_of(file)
        if old and (old.inode, old.changed) == (state.st_ino, state.st_mtime_ns):
            return
        content, number = file.read_bytes(), old.number if old else 0
        if file.suffix == ".jsonl":  # complete lines
            content = content[: content.rfind(b"\n", 0, state.st_size) + 1]
        grows = file.suffix in _GROWING
        is_same = old and old.inode == state.st_ino and content[: old.size].endswith(old.end)
        part = content[old.size if old and is_same and grows else 0 :]
        if file.suffix in _TEXTS:
            part = part.replace(str(self.root).encode(), self.address.encode())
        if not grows:
            self.bucket.blob(name).upload_from_string(part)
        elif old and not is_same:
            number = self._add(name, number, "-all", part)
            self._remove(name, below=number)
        elif part:
            number = self._add(name, number, "", part)
        self._files[file] = _Uploaded.of(state, content, number)

    def _add(self, name: str, number: int, kind: str, content: bytes) -> int:
        """Store a part under the next free number, since another host may add parts too."""
        from google.api_core import exceptions

        while True:
            number += 1
            blob = self.bucket.blob(f"{name}.part-{number:06d}{kind}")
            try:
                blob.upload_from_string(content, if_generation_match=0)
                return number
            except exceptions.PreconditionFailed:
                if blob.download_as_bytes() == content:  # a repeated request of ours
                    return number

    def _remove(self, name: str, below: int | None = None) -> None:
        for blob in self.bucket.list_blobs(prefix=name):
            other, number, _ = _parsed(blob.name)
            if other == name and (below is None or number < below):
                blob.delete()

    def _follow(self) -> None:
        last = ""
        while not self._ended.wait(EVERY_S):
            try:
                self.upload()
                last = ""
            except BucketError as error:
                if str(error) != last:
                    terminal.tell(f"WARNING: {error}; trying again every {EVERY_S:.0f} s")
                last = str(error)

    def close(self) -> None:
        """Upload the rest and remove the folder; if that fails, keep it."""
        if self._ended.is_set() or os.getpid() != self._process:
            return
        self._ended.set()
        try:
            self.upload()
        except BucketError as error:
            copying = f"gcloud storage rsync --recursive {self.root} {self.address}"
            print(f"jaxrobust: {error}; upload the files later: {copying}", file=sys.stderr)
        else:
            shutil.rmtree(self.root.parent, ignore_errors=True)


def _parsed(name: str) -> tuple[str, int, bool]:
    """Return the file that an object belongs to, its number there, and whether it is all of it."""
    match = _PART.fullmatch(name)
    return (match[1], int(match[2]), match[3] is not None) if match else (name, 0, True)


class _Lock:
    """A lock as an object: each write requires that no other process wrote since the last read."""

    free = True  # as far as is known before the first write

    def __init__(self, mirror: _Mirror, path: Path) -> None:
        self._bucket, self._name = mirror.bucket, mirror.name_of(path)
        self._place, self._generation = f"{mirror.address}/{self._name}", 0

    def read(self) -> bytes:
        """Read who holds the lock, for the next write."""
        with answering(self._place):
            blob = self._bucket.get_blob(self._name)
            self._generation = blob.generation if blob else 0
            return bytes(blob.download_as_bytes()) if blob else b""

    def write(self, text: bytes) -> None:
        """Replace the text; raise `FileExistsError` if another process did since the last read."""
        from google.api_core import exceptions

        blob = self._bucket.blob(self._name)
        with answering(self._place):
            try:
                blob.upload_from_string(text, if_generation_match=self._generation)
                self._generation = blob.generation
            except exceptions.PreconditionFailed as error:
                if self.read() != text:  # else a repeated request of ours
                    raise FileExistsError(f"{self._place} was taken by another process") from error

    def close(self) -> None:
        """Do nothing: no connection is kept."""
