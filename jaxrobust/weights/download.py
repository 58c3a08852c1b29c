"""Files of weights from the internet, kept in a cache: any URL, or a repository of a model hub."""

import contextlib
import hashlib
import http.client
import os
import re
import shlex
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from jaxrobust.runtime import folders, locks
from jaxrobust.weights import files, web_page
from jaxrobust.weights.hashes import file_sha256

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # what a hub repository calls its weights
SETTINGS = "config.json"  # what lies beside them
_HUB = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w.%-]+))?(?:/([\w./-]+))?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TRIES = 5  # in a row without a new byte
_NETWORK = (  # not every OSError: a full disk does not get better by trying again
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)
_BLOCK = 1 << 20
_PAGE = 1 << 20  # bytes of a web page that are looked at

Tell = Callable[[str], None]


class Unreachable(OSError):
    """The network or the server does not answer; the same command may work later."""

    def __str__(self) -> str:
        return str(self.args[0])


class Fetched(NamedTuple):
    """A file, and the settings that lay beside it (a hub's `config.json`), if any."""

    path: Path
    settings: Path | None = None


def fetch(
    source: str, *, sha256: str | None = None, name: str | None = None, tell: Tell = print
) -> Fetched:
    """Return a remote file in the cache, downloaded unless it is there.

    Args:
      source: `https://...[#sha256=HEX]`, or `hf://ORG/REPO[@REVISION][/FILE]`, by default the first
        of `WEIGHTS` there is.
      sha256: of the file, or how it begins, if known; another file is refused and removed.
      name: of the file in the cache; default: what the address ends with.
      tell: is told what happens, line by line.
    Raises:
      ValueError: a mistake in the source, or a file that is not the expected one.
      Unreachable: no answer, several times in a row.
    """
    if source.startswith("hf://"):
        found = _from_hub(source, tell)
        check_sha256(found.path, sha256)
        return found
    if not source.startswith(("https://", "http://")):
        raise ValueError(f"{source}: give a file, https://..., or hf://ORG/REPO[@REVISION][/FILE]")
    url, _, pinned = source.partition("#sha256=")
    wanted = sha256 or pinned or None
    path = _from_url(url, wanted, name, tell)
    check_sha256(path, wanted, remove=True)
    return Fetched(path)


def check_sha256(path: Path, wanted: str | None, *, remove: bool = False) -> str:
    """Return the hash of a file; `ValueError` where it is not the one that is wanted."""
    found = file_sha256(path)
    if not wanted or _is(found, wanted):
        return found
    if remove:
        path.unlink()
    raise ValueError(
        f"{path} has sha256 {found}, expected {wanted}: another file, or a damaged one"
        + ("; it was removed, the same command gets it again" if remove else "")
    )


def _is(found: str, wanted: str) -> bool:
    """Tell whether a hash is the wanted one, or begins with the eight digits or more of it that
    publishers write into the names of files.
    """
    wanted = wanted.lower()
    return found == wanted or (len(wanted) >= 8 and found.startswith(wanted))


def parse_hub(source: str) -> tuple[str, str | None, str | None]:
    """Return (repository, revision, file) of `hf://ORG/REPO[@REVISION][/FILE]`.

    A revision that has a slash itself (`refs/pr/1`) needs it written as %2F.
    """
    match = _HUB.fullmatch(source)
    if not match:
        raise ValueError(
            f"{source}: write hf://ORG/REPO[@REVISION][/FILE], such as "
            "hf://timm/convnext_tiny.fb_in1k"
        )
    revision = urllib.parse.unquote(match[2]) if match[2] else None
    return match[1], revision, match[3]


def _from_hub(source: str, tell: Tell) -> Fetched:
    repository, revision, name = parse_hub(source)
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ValueError(
            f"{source} needs the hub's own client: pip install 'jaxrobust[hub]' (or give the "
            "https:// address of the file)"
        ) from error
    endpoint = os.environ.get("HF_ENDPOINT") or None
    cache = folders.cache("weights") / "hub"

    def get(file: str) -> Path | None:
        try:
            path = huggingface_hub.hf_hub_download(
                repository,
                file,
                revision=revision,
                cache_dir=cache,
                endpoint=endpoint,
            )
        except errors.LocalEntryNotFoundError as error:  # it asked nobody, or nobody answered
            known = huggingface_hub.try_to_load_from_cache(
                repository, file, cache_dir=cache, revision=revision
            )
            if not (known is None or isinstance(known, str)):  # it did not exist when asked last
                return None
            reason = f"{error.__cause__ or error}".partition("\n")[0]
            raise Unreachable(
                f"{source}: the hub does not answer ({reason}), and {file} is not in the cache; "
                f"try again, set HF_ENDPOINT to a mirror, or run `{_by_hand(source)}` where there "
                "is a network and give DIR"
            ) from error
        except errors.EntryNotFoundError:
            return None
        return _as_the_hub_says(Path(path))

    try:
        tell(f"{repository}: asking the hub")
        found = next((path for file in ([name] if name else WEIGHTS) if (path := get(file))), None)
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{source}: its authors ask for your consent first: give it at "
            f"https://huggingface.co/{repository}, log in with `hf auth login` (or set HF_TOKEN), "
            "and run the same command again"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{source}: {repository} has no revision {revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{source}: the hub has no repository {repository}, or a private one; check its name, "
            "or log in with `hf auth login`"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise ValueError(f"{source}: {str(error).partition(chr(10))[0]}") from error
    if found is None:
        api = huggingface_hub.HfApi(endpoint=endpoint)
        holds = _weights_in(api, repository, revision)
        raise ValueError(
            f"{source}: {repository} holds no {name or ' or '.join(WEIGHTS)}; "
            + (f"name one of its files: {', '.join(holds)}" if holds else "")
            + ("" if holds else "it is no repository of PyTorch weights, give another one")
        )
    return Fetched(found, get(SETTINGS))


def _by_hand(source: str) -> str:
    """Return the command that fetches what a source names, for a machine that has a network."""
    repository, revision, name = parse_hub(source)
    words = ["hf", "download", repository, *([name] if name else [WEIGHTS[0], SETTINGS])]
    words += ["--revision", revision] if revision else []
    return shlex.join([*words, "--local-dir", "DIR"])


def _as_the_hub_says(path: Path) -> Path:
    """Return a file of the hub's cache itself; its real name there is its hash, if it is a large
    one.
    """
    said = path.resolve()
    if _SHA256.fullmatch(said.name) and file_sha256(said) != said.name:
        said.unlink()
        path.unlink(missing_ok=True)
        raise ValueError(
            f"{path.name} has another sha256 than the hub says ({said.name}): a damaged download; "
            "it was removed, the same command gets it again"
        )
    return path


def _weights_in(api: Any, repository: str, revision: str | None) -> list[str]:
    """Return the addresses of the files that may hold weights in a repository; empty: none, or
    nobody knows.
    """
    at = f"hf://{repository}" + (f"@{urllib.parse.quote(revision, safe='')}" if revision else "")
    with contextlib.suppress(Exception):  # this only makes a refusal more helpful
        there = api.list_repo_files(repository, revision=revision)
        return [f"{at}/{file}" for file in there if Path(file).suffix in files.SUFFIXES][:5]
    return [f"{at}/FILE"]


def _from_url(url: str, sha256: str | None, name: str | None, tell: Tell) -> Path:
    """Return the file of a URL; what an interrupted download left is continued."""
    parts = urllib.parse.urlsplit(url)
    name = name or Path(urllib.parse.unquote(parts.path)).name
    if not parts.hostname or not name:
        raise ValueError(f"{url} names no file; give the address of the file itself")
    path = folders.cache("weights") / hashlib.sha256(url.encode()).hexdigest()[:12] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(name + ".lock")
    with locks.held(lock, what=f"the download of {url}", otherwise="give a file", wait=True):
        return _whole(url, path, sha256, tell)


def _whole(url: str, path: Path, sha256: str | None, tell: Tell) -> Path:
    """Return `path`, when all of the file is there."""
    if path.is_file():
        if sha256 is None or _is(file_sha256(path), sha256):
            tell(f"{path}: downloaded before")
            return path
        tell(f"{path} has another sha256 than the one asked for: downloading it again")
        path.unlink()
    part, failures = path.with_name(path.name + ".part"), 0
    while True:
        tries = _TRIES
        before = part.stat().st_size if part.exists() else 0
        try:
            if _continue(url, part, tell):
                os.replace(part, path)
                _etag(part).unlink(missing_ok=True)
                return path
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            _refuse(url, error)
            reason = f"the server answers {error.code} {error.reason}"
        except _NETWORK as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
            if isinstance(getattr(error, "reason", error), socket.gaierror):
                tries = 2  # this machine asks in vain who the server is
        size = part.stat().st_size if part.exists() else 0
        failures = 0 if size > before else failures + 1
        if failures >= tries:
            fetching = shlex.join(["curl", "-L", "-o", path.name, url])
            kept = f" ({size:,} bytes are kept, the same command continues there)" if size else ""
            raise Unreachable(
                f"{url}: {reason}, {failures} times in a row{kept}; where this machine has no "
                f"network, run `{fetching}` on one that has, and give the file"
            )
        tell(f"{url}: {reason} at {size:,} bytes; trying again")
        _pause(failures)


def _pause(failures: int) -> None:
    time.sleep(min(2**failures, 30))


def _etag(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _refuse(url: str, error: urllib.error.HTTPError) -> None:
    """Raise `ValueError` for an answer that another try does not change."""
    told = {
        401: "it wants a login; download it in a browser and give the file",
        403: "it is forbidden; download it in a browser and give the file",
        404: "there is no such file; check the address",
        410: "the file is gone; look for another address",
    }
    if error.code < 500 and error.code not in (408, 416, 429):
        why = told.get(error.code, "check the address")
        raise ValueError(f"{url}: the server answers {error.code} {error.reason}: {why}") from error


def _answer(url: str, headers: dict[str, str]) -> Any:
    """Return the answer that holds the file; a drive's question whether it is meant is answered.

    Raises:
      ValueError: the answer is a web page.
    """
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    title, address = "", url
    for _ in range(2):
        answer = browser.open(urllib.request.Request(address, headers=headers), timeout=30)
        if answer.headers.get_content_type() != "text/html":
            return answer
        with answer:
            page = answer.read(_PAGE).decode("utf-8", "replace")
        title, confirmed = web_page.read(page, answer.url)
        if not confirmed:
            break
        address = confirmed
    raise ValueError(
        f"{url} is a web page{title and f' ({title!r})'}, not a file: a login, quota or "
        "confirmation page; open it in a browser, save the file itself and give that"
    )


def _continue(url: str, part: Path, tell: Tell) -> bool:
    """Append what is missing of a file to `part`; return whether that is all of it."""
    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "jaxrobust", "Accept-Encoding": "identity"}
    tag = _etag(part).read_text() if start and _etag(part).exists() else ""
    if tag:  # otherwise nobody knows whether it is the same file still
        headers |= {"Range": f"bytes={start}-", "If-Range": tag}
    try:
        answer = _answer(url, headers)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # more is here than there
            part.unlink()
            _etag(part).unlink(missing_ok=True)
        raise
    with answer:
        resumes = answer.status == 206
        sent = answer.headers.get("Content-Range", f"bytes {start}-")
        if resumes and not sent.startswith(f"bytes {start}-"):
            _etag(part).unlink()  # the next try begins at the start
            raise ConnectionError(f"asked for bytes {start}-, the server sends {sent}")
        if start and not resumes:
            tell(f"{url}: it changed, or its server cannot resume; from the start")
            start = 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length is not None else None
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        _etag(part).write_text("" if tag.startswith("W/") else tag)  # a weak one is no proof
        size = f"{total:,} bytes" if total else "of unknown size"
        tell(f"{url}: {size}" + (f", from {start:,}" if start else ""))
        bar = tqdm(initial=start, total=total, unit="B", unit_scale=True, disable=None, leave=False)
        with part.open("ab" if resumes else "wb") as file, bar:
            while block := answer.read(_BLOCK):
                file.write(block)
                bar.update(len(block))
            return total is None or file.tell() == total
