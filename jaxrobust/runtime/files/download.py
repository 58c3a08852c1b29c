"""Cached downloads that resume after an interruption and reject web pages in place of files."""

import contextlib
import hashlib
import http.client
import logging
import os
import shlex
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from jaxrobust.runtime.files import caches, locks

_TRIES = 5  # attempts in a row without a new byte
_NETWORK = (  # not every OSError: retrying does not help against a full disk
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)
_BLOCK = 1 << 20
_PAGE = 1 << 20  # bytes of a web page to read

Tell = Callable[[str], None]


class Unreachable(OSError):
    """The network or the server does not answer; the same command may succeed later."""


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Stop the hub's client from logging each attempt twice; the outcome is reported here."""
    client = logging.getLogger("huggingface_hub.utils._http")
    level = client.level
    client.setLevel(logging.ERROR)
    try:
        yield
    finally:
        client.setLevel(level)


def fetch(
    url: str, cache: str, *, sha256: str | None = None, name: str | None = None, tell: Tell = print
) -> Path:
    """Download a URL and return its file, continuing an interrupted download.

    Args:
      url: `http://...` or `https://...`.
      cache: the subfolder of the package's cache to use: weights, data.
      sha256: of the file, or its first digits, if known; a file that differs is removed.
      name: of the file in the cache; default: the last part of the address.
      tell: receives status messages, line by line.
    Raises:
      ValueError: a mistake in the address, or an unexpected file.
      Unreachable: no answer, several times in a row.
    """
    parts = urllib.parse.urlsplit(url)
    name = name or Path(urllib.parse.unquote(parts.path)).name
    if not parts.hostname or not name:
        raise ValueError(f"{url} names no file; give the address of the file itself")
    path = caches.folder(cache) / hashlib.sha256(url.encode()).hexdigest()[:12] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(name + ".lock")
    with locks.held(lock, resource=f"the download of {url}", otherwise="give a file", wait=True):
        _downloaded(url, path, sha256, tell)
    check_sha256(path, sha256, remove=True)
    return path


def file_sha256(path: Path) -> str:
    """Hash a file's bytes as `sha256sum` does."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, wanted: str | None, *, remove: bool = False) -> str:
    """Return the hash of a file; raise `ValueError` if it is not the expected one."""
    digest = file_sha256(path)
    if not wanted or _is(digest, wanted):
        return digest
    if remove:
        path.unlink()
    raise ValueError(
        f"{path} has sha256 {digest}, expected {wanted}: a different or damaged file"
        + ("; it was removed; run the same command again" if remove else "")
    )


def _is(digest: str, wanted: str) -> bool:
    """Return whether a hash equals the expected one, or starts with its eight or more digits."""
    wanted = wanted.lower()
    return digest == wanted or (len(wanted) >= 8 and digest.startswith(wanted))


def _downloaded(url: str, path: Path, sha256: str | None, tell: Tell) -> None:
    if path.is_file():
        if sha256 is None or _is(file_sha256(path), sha256):
            return tell(f"{path}: already downloaded")
        tell(f"{path} does not have the requested sha256: downloading it again")
        path.unlink()
    part, failures = path.with_name(path.name + ".part"), 0
    while True:
        tries = _TRIES
        old_size = part.stat().st_size if part.exists() else 0
        try:
            if _continue(url, part, tell):
                os.replace(part, path)
                return _etag(part).unlink(missing_ok=True)
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            _refuse(url, error)
            reason = f"the server answers {error.code} {error.reason}"
        except _NETWORK as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
            if isinstance(getattr(error, "reason", error), socket.gaierror):
                tries = 2  # this machine cannot resolve the server's name
        size = part.stat().st_size if part.exists() else 0
        failures = 0 if size > old_size else failures + 1
        if failures >= tries:
            fetching = shlex.join(["curl", "-L", "-o", path.name, url])
            done = f" ({size:,} bytes are saved; the same command resumes there)" if size else ""
            raise Unreachable(
                f"{url}: {reason}, {failures} times in a row{done}; if this machine has no "
                f"network, run `{fetching}` on another machine and give the file"
            )
        tell(f"{url}: {reason} at {size:,} bytes; trying again")
        _pause(failures)


def _pause(failures: int) -> None:
    time.sleep(min(2**failures, 30))


def _etag(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _refuse(url: str, error: urllib.error.HTTPError) -> None:
    """Raise `ValueError` for a response that retrying would not change."""
    remedies = {
        401: "it requires a login; download it in a browser and give the file",
        403: "access is forbidden; download it in a browser and give the file",
        404: "there is no such file; check the address",
        410: "the file is gone; find another address",
    }
    if error.code < 500 and error.code not in (408, 416, 429):
        why = remedies.get(error.code, "check the address")
        raise ValueError(f"{url}: the server answers {error.code} {error.reason}: {why}") from error


def _answer(url: str, headers: dict[str, str]) -> Any:
    """Open the file's address, and confirm if Google Drive asks for confirmation."""
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    title, address = "", url
    for _ in range(2):
        answer = browser.open(urllib.request.Request(address, headers=headers), timeout=30)
        if answer.headers.get_content_type() != "text/html":
            return answer
        with answer:
            page = answer.read(_PAGE).decode("utf-8", "replace")
        title, confirmed = read_page(page, answer.url)
        if not confirmed:
            break
        address = confirmed
    raise ValueError(
        f"{url} is a web page{title and f' ({title!r})'}, not a file: a login, quota or "
        "confirmation page; open it in a browser, save the file itself and give that"
    )


def _continue(url: str, part: Path, tell: Tell) -> bool:
    """Append the missing bytes of a file to `part`; return whether it is then complete."""
    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "jaxrobust", "Accept-Encoding": "identity"}
    tag = _etag(part).read_text() if start and _etag(part).exists() else ""
    if tag:  # otherwise the file might have changed
        headers |= {"Range": f"bytes={start}-", "If-Range": tag}
    try:
        answer = _answer(url, headers)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # more bytes are here than on the server
            part.unlink()
            _etag(part).unlink(missing_ok=True)
        raise
    with answer:
        resumes = answer.status == 206
        sent = answer.headers.get("Content-Range", f"bytes {start}-")
        if resumes and not sent.startswith(f"bytes {start}-"):
            _etag(part).unlink()  # the next attempt starts from scratch
            raise ConnectionError(f"asked for bytes {start}-, but the server sent {sent}")
        if start and not resumes:
            tell(f"{url}: the file changed, or its server cannot resume; starting over")
            start = 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length is not None else None
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        _etag(part).write_text("" if tag.startswith("W/") else tag)  # a weak tag proves nothing
        size = f"{total:,} bytes" if total else "of unknown size"
        tell(f"{url}: {size}" + (f", from {start:,}" if start else ""))
        bar = tqdm(initial=start, total=total, unit="B", unit_scale=True, disable=None, leave=False)
        with part.open("ab" if resumes else "wb") as file, bar:
            while block := answer.read(_BLOCK):
                file.write(block)
                bar.update(len(block))
            return total is None or file.tell() == total


# The form with which Google Drive asks before sending a file too large for its virus scan.
_FORM = "download-form"


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.title, self.action = "", ""
        self.fields: dict[str, str] = {}
        self._in_title = self._in_form = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        if tag == "title":
            self._in_title = True
        elif tag == "form" and values.get("id") == _FORM:
            self._in_form, self.action = True, values.get("action", "")
        elif tag == "input" and self._in_form and values.get("type") == "hidden":
            self.fields[values.get("name", "")] = values.get("value", "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self._in_title = False
        elif tag == "form":
            self._in_form = False

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data


def read_page(page: str, url: str) -> tuple[str, str]:
    """Return a page's title and, if it asks for confirmation, the file's address, else ""."""
    form = _Page()
    form.feed(page)
    title = " ".join(form.title.split())[:80]
    if not form.action:
        return title, ""
    address = urllib.parse.urlsplit(urllib.parse.urljoin(url, form.action))
    fields = dict(urllib.parse.parse_qsl(address.query)) | form.fields
    return title, address._replace(query=urllib.parse.urlencode(fields)).geturl()
