"""A server for folders as buckets of Google Cloud Storage, as far as this package needs one."""

import contextlib
import functools
import io
import itertools
import json
import os
import re
import tempfile
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from http import server
from pathlib import Path

from absl.testing import parameterized

from jaxrobust.runtime.files import buckets
from tests.support.modules import needs

Answer = tuple[int, bytes, dict[str, str]]  # status, body, headers
_PATH = re.compile(r"/(?:(?:download|upload)/)?storage/v1/b/([^/]+)(?:/(o)(?:/(.+))?)?")
_MOMENT = "2024-01-01T00:00:00Z"


class Bucket:
    """Folders of `root` as buckets, on a local port: files are objects, and folders do not exist.

    As much of the JSON API as gcsfs, array_record, TensorStore and Google's client use: lists,
    metadata, ranges, uploads in one request or in a session, preconditions on generations.
    """

    def __init__(self, root: Path):
        self.requests: list[str] = []  # such as "GET /storage/v1/b/..."
        self._root, self._lock = root, threading.RLock()
        self._refused: dict[str, int] = {}  # a pattern of requests, and their status
        self._generations: dict[Path, int] = {}
        self._number = itertools.count(2)
        bucket = self

        class Handler(server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm, wbufsize = True, 1 << 16  # else each answer takes 40 ms

            def log_message(self, *_):
                pass

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, content, headers = bucket._answer(self, body)
                self.send_response(status)
                for key, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_DELETE = answer

        class Server(server.ThreadingHTTPServer):
            request_queue_size = 256  # array_record reads records at once, a connection for each

            def handle_error(self, *_):
                pass  # array_record hangs up in the middle of an answer

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.url,  # gcsfs, and Google's client
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url,  # array_record
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",  # TensorStore looks for no credentials
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for credentials
            "NO_GCE_CHECK": "true",  # nor does google.auth ask machines of the cloud
        }

    def made(self) -> Path:
        """The folder of a new bucket."""
        folder = self._root / f"bucket-{next(self._number)}"
        folder.mkdir()
        return folder

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @contextlib.contextmanager
    def refusing(self, pattern: str, status: int = 403) -> Iterator[None]:
        """Answer requests whose "METHOD PATH" matches a pattern with a status."""
        self._refused[pattern] = status
        try:
            yield
        finally:
            del self._refused[pattern]

    def _answer(self, asked: server.BaseHTTPRequestHandler, body: bytes) -> Answer:
        request = f"{asked.command} {urllib.parse.unquote(asked.path)}"
        parts = urllib.parse.urlsplit(asked.path)
        query = dict(urllib.parse.parse_qsl(parts.query))
        match = _PATH.fullmatch(parts.path)
        assert match, request
        bucket, objects, name = match[1], match[2], urllib.parse.unquote(match[3] or "")
        if asked.command in ("POST", "PUT") and not name:
            name, body = _upload(query, asked.headers["Content-Type"] or "", body)
            request += f" {name}"
        self.requests.append(request)
        for pattern, status in [*self._refused.items()]:
            if re.search(pattern, request):
                return _json({"error": {"code": status, "message": "not allowed"}}, status)
        with self._lock:
            if not (self._root / bucket).is_dir():
                return _missing()
            if not objects:
                return _json({"name": bucket})
            if not name:
                return _json(self._listing(bucket, query))
            return self._of_object(asked, bucket, name, query, body)

    def _of_object(
        self, asked: server.BaseHTTPRequestHandler, bucket: str, name: str, query: dict, body: bytes
    ) -> Answer:
        file, writes = self._root / bucket / name, asked.command in ("POST", "PUT")
        wanted, generation = query.get("ifGenerationMatch"), self._generation(file)
        if wanted not in (None, str(generation)):
            return _json({"error": {"code": 412, "message": "another generation"}}, 412)
        if writes and query.get("uploadType") == "resumable":
            session = urllib.parse.urlencode(query | {"name": name, "uploadType": "session"})
            return 200, b"", {"Location": f"{self.url}/upload/storage/v1/b/{bucket}/o?{session}"}
        if writes:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(body)
            self._generations[file] = next(self._number)
            return _json(self._metadata(file))
        if not generation:
            return _missing()
        if asked.command == "DELETE":
            file.unlink()
            return 204, b"", {}
        if query.get("alt") != "media":
            return _json(self._metadata(file))
        return _content(file.read_bytes(), asked.headers.get("Range"), generation)

    def _generation(self, file: Path) -> int:
        return self._generations.get(file, 1) if file.is_file() else 0

    def _metadata(self, file: Path) -> dict:
        bucket, _, name = file.relative_to(self._root).as_posix().partition("/")
        facts = {"bucket": bucket, "name": name, "size": str(file.stat().st_size)}
        fixed = {"updated": _MOMENT, "timeCreated": _MOMENT}
        return facts | fixed | {"generation": str(self._generation(file))}

    def _listing(self, bucket: str, query: Mapping[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], {}
        for path in sorted(p for p in (self._root / bucket).rglob("*") if p.is_file()):
            name = path.relative_to(self._root / bucket).as_posix()
            if name.startswith(prefix):
                head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
                if found:
                    prefixes[prefix + head + found] = None
                else:
                    items.append(self._metadata(path))
        return {"items": items, "prefixes": list(prefixes)}


@functools.cache
def _server() -> Bucket:
    """One server for all tests of a process, as its libraries remember the address."""
    bucket = Bucket(Path(tempfile.mkdtemp()))
    os.environ.update(bucket.environment)
    return bucket


def _upload(query: dict, content_type: str, body: bytes) -> tuple[str, bytes]:
    """The name and the content of an upload."""
    if query.get("uploadType") != "multipart":
        return query.get("name") or json.loads(body)["name"], body
    boundary = re.search('boundary="?([^"]+)', content_type)[1].encode()
    _, about, content, _ = body.split(b"--" + boundary)
    about, content = (re.split(b"\r?\n\r?\n", part, maxsplit=1)[1] for part in (about, content))
    return json.loads(about)["name"], re.sub(b"\r?\n\\Z", b"", content)


def _content(data: bytes, span: str | None, generation: int) -> Answer:
    headers = {"Content-Type": "application/octet-stream", "X-Goog-Generation": str(generation)}
    if not span:
        return 200, data, headers
    first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", span).groups()
    start = int(first) if first else max(0, len(data) - int(last))
    stop = min(len(data), int(last) + 1) if first and last else len(data)
    return (
        206,
        data[start:stop],
        headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"},
    )


def _json(content: dict, status: int = 200) -> Answer:
    return status, json.dumps(content).encode(), {"Content-Type": "application/json"}


def _missing() -> Answer:
    return _json({"error": {"code": 404, "message": "does not exist"}}, 404)


@needs("gcsfs", "pip install -e '.[gcs]'")
class BucketCase(parameterized.TestCase):
    """A new bucket, and a run in it."""

    def setUp(self):
        super().setUp()
        self.server = _server()
        self.objects = self.server.made()
        self.address = f"gs://{self.objects.name}/runs/1"
        self.addCleanup(buckets.close)

    def opened(self, **options) -> Path:
        return buckets.opened("workdir", self.address, **options)

    def killed(self) -> str:
        """End as after kill -9: nothing more is uploaded."""
        with (
            self.server.refusing(".*"),
            contextlib.redirect_stderr(io.StringIO()) as said,
        ):
            buckets.close()
        return said.getvalue()

    def names(self) -> list[str]:
        folder = self.objects / "runs" / "1"
        return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
