"""Servers on this machine that answer as the internet does: with files, pages, refusals, cuts."""

import hashlib
import http.server
import json
import os
import threading
import time
import urllib.parse
from pathlib import Path
from unittest import mock

from absl.testing import parameterized

from jaxrobust.runtime.files import download


class _Site(http.server.ThreadingHTTPServer):
    """The server of a `Server`, which its handlers ask what to answer."""

    def __init__(self, of: "Server"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.of = of


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Site

    def log_message(self, *unused):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        of = self.server.of
        of.asked.append((self.command, self.path, self.headers["Range"]))
        plain = urllib.parse.urlsplit(self.path).path
        for beginning, (status, code) in of.refusals.items():
            if plain.startswith(beginning):
                return self._sent(status, code=code)
        if (page := of.pages.get(self.path)) is not None:
            return self._sent(200, page.encode(), "text/html; charset=utf-8")
        body = of.files.get(self.path, of.files.get(plain))
        return self._sent(404, code="EntryNotFound") if body is None else self._file(plain, body)

    def _sent(self, status: int, body: bytes = b"", kind: str = "text/plain", code: str = ""):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, path: str, body: bytes):
        of, start = self.server.of, 0
        tag = f'"{hashlib.sha256(body).hexdigest()[:40]}"'
        same = self.headers["If-Range"] in (None, tag)
        if self.headers["Range"] and of.ranges and same:
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            start += of.ahead
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Type", of.kind)
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("ETag", tag)
        if path in of.linked:
            self.send_header("X-Linked-ETag", f'"{of.linked[path]}"')
            self.send_header("X-Linked-Size", str(len(body)))
        self.send_header("X-Repo-Commit", self._commit(path))
        self.end_headers()
        if self.command == "GET":
            cut = of.cut_after.pop(0) if of.cut_after else len(body)
            self.wfile.write(body[start : start + cut])

    def _commit(self, path: str) -> str:
        """A revision of a repository, by the content of all its files."""
        repository, _, rest = path.partition("/resolve/")
        place = f"{repository}/resolve/{rest.partition('/')[0]}/"
        files = sorted((k, v) for k, v in self.server.of.files.items() if k.startswith(place))
        return hashlib.sha1(repr(files).encode()).hexdigest()


class Server:
    """A server of `files` (path -> bytes) that breaks off as often as it is told to."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.ranges = files, True
        self.ahead = 0  # bytes that an answer to a Range skips
        self.asked: list[tuple[str, str, str | None]] = []  # (method, path, Range)
        self.cut_after: list[int] = []  # bytes of the next answers, before the connection drops
        self.kind = "application/octet-stream"
        self.pages: dict[str, str] = {}  # path with its query -> HTML that is sent instead
        self.refusals: dict[
            str, tuple[int, str]
        ] = {}  # beginning of a path -> (status, hub's code)
        self.linked: dict[str, str] = {}  # path -> sha256 that the hub says of a large file
        self._server = _Site(self)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def repository(self, name: str, files: dict[str, bytes]) -> None:
        """Serve files as a repository of the hub."""
        self.files |= {f"/{name}/resolve/main/{file}": body for file, body in files.items()}
        listed = [{"type": "file", "path": file, "oid": "0" * 40, "size": 0} for file in files]
        self.files[f"/api/models/{name}/tree/main"] = json.dumps(listed).encode()


class ServedCase(parameterized.TestCase):
    """A server, and a cache that goes with the test."""

    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        cache = {"XDG_CACHE_HOME": str(self.folder / "cache")}
        self.enter_context(mock.patch.dict(os.environ, cache))
        self.enter_context(mock.patch.object(download, "_pause"))
        self.server = Server({})
        self.addCleanup(self.server.close)

    def left(self) -> list[str]:
        """The files in the cache."""
        files = [p for p in sorted((self.folder / "cache").rglob("*")) if p.is_file()]
        return [p.name for p in files if p.suffix != ".lock"]

    def hub(self) -> None:
        """The server is the hub from here on; skips without the hub's client."""
        try:
            from huggingface_hub.utils import _http
        except ImportError:
            self.skipTest("needs the hub's client: pip install 'jaxrobust[hub]'")
        # It tries five times, with seconds between.
        self.enter_context(mock.patch.object(_http, "time", mock.Mock(wraps=time, sleep=str)))
        self.enter_context(mock.patch.dict(os.environ, {"HF_ENDPOINT": self.server.address}))
