"""A hub of data sets on a local port, as much of it as `datasets` asks."""

import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Mapping


class DataHub:
    """Serves `repositories`, name -> {path: bytes}, in one revision each; gated ones refuse."""

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]], gated: str = ""):
        self.repositories, self.gated = repositories, gated
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, body, headers = hub.answer(self.path)
                self.send_response(status)
                for key, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_POST = do_GET

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, name: str) -> str:
        """The one revision of a repository, by its content."""
        return hashlib.sha1(repr(sorted(self.repositories[name].items())).encode()).hexdigest()

    def answer(self, url: str) -> tuple[int, bytes, dict[str, str]]:
        """(status, body, headers)."""
        path = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
        match = re.fullmatch(
            r"(?:/api)?/datasets/(?P<name>[^/]+/[^/]+)"
            r"(?:/(?P<verb>revision|tree|resolve)/(?P<revision>[^/]+)(?:/(?P<rest>.*))?)?",
            path,
        )
        if not match or match["name"] not in self.repositories:
            return 404, b"", {"X-Error-Code": "RepoNotFound"}
        name, verb, rest = match["name"], match["verb"], match["rest"] or ""
        files, commit = self.repositories[name], self.commit(name)
        told = {"X-Repo-Commit": commit, "Content-Type": "application/json"}
        if name == self.gated:
            return 403, b"", {"X-Error-Code": "GatedRepo"}
        if (match["revision"] or "main") not in ("main", commit):
            return 404, b"", {"X-Error-Code": "RevisionNotFound"}
        if verb == "resolve":
            if rest not in files:
                return 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            tag = {"ETag": f'"{hashlib.sha1(files[rest]).hexdigest()}"'}
            return 200, files[rest], told | tag
        if verb == "tree":
            listed = [_entry(file, files) for file in _children(rest, files)]
            return (200 if listed else 404), json.dumps(listed).encode(), told
        siblings = [{"rfilename": file} for file in files]
        about = {"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []}
        return 200, json.dumps(about).encode(), told


def _children(folder: str, files: Mapping[str, bytes]) -> list[str]:
    """What lies directly in a folder; folders end with /."""
    start = f"{folder}/" if folder else ""
    inside = [file[len(start) :].partition("/") for file in files if file.startswith(start)]
    return sorted({start + head + slash for head, slash, _ in inside})


def _entry(path: str, files: Mapping[str, bytes]) -> dict:
    if path.endswith("/"):
        return {"type": "directory", "path": path[:-1], "oid": "0" * 40, "size": 0}
    oid = hashlib.sha1(files[path]).hexdigest()
    return {"type": "file", "path": path, "oid": oid, "size": len(files[path])}
