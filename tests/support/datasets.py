"""Small data sets on disk for tests: folders of images, TFDS directories, a bucket."""

import io
import json
import re
import threading
import urllib.parse
from collections.abc import Iterable, Mapping
from http import server
from pathlib import Path

import numpy as np
from PIL import Image


def image_bytes(number: int, kind: str = "JPEG", size: tuple[int, int] = (9, 7)) -> bytes:
    """A tiny image file of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256 % 256, 5)).save(buffer, kind)
    return buffer.getvalue()


def write_tree(root: Path, paths: Iterable[str], content: bytes | None = None) -> None:
    """Files at `root/PATH`, each an image of its own unless `content` is said."""
    for number, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image_bytes(number) if content is None else content)


def write_tfds(
    directory: Path,
    name: str,
    features: Mapping,
    splits: Mapping[str, list[Mapping]],
    *,
    shards: int = 1,
) -> None:
    """The data set `name` in `directory`, a version's; a record maps features to bytes or label."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    directory.mkdir(parents=True)
    tfds.features.FeaturesDict(dict(features)).save_config(directory)
    infos = []
    for split, records in splits.items():
        lengths = []
        for shard, rows in enumerate(np.array_split(np.arange(len(records)), shards)):
            file = f"{name}-{split}.array_record-{shard:05d}-of-{shards:05d}"
            writer = ArrayRecordWriter(str(directory / file), "group_size:1")
            for row in rows:
                message = tf_example_pb2.Example()
                for key, value in records[row].items():
                    feature = message.features.feature[key]
                    if isinstance(value, bytes):
                        feature.bytes_list.value.append(value)
                    else:
                        feature.int64_list.value.append(value)
                writer.write(message.SerializeToString())
            writer.close()
            lengths.append(str(len(rows)))
        infos.append(
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": "1",
                "shardLengths": lengths,
            }
        )
    info = {
        "fileFormat": "array_record",
        "moduleName": "tests.datasets",
        "name": name,
        "splits": infos,
        "supervisedKeys": {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}},
        "version": directory.name,
    }
    (directory / "dataset_info.json").write_text(json.dumps(info))


class Bucket:
    """Folders of `root` as buckets of Google Cloud Storage, on a local port, to read from.

    As much of its JSON API as gcsfs and array_record use: lists, metadata, content with ranges.
    """

    def __init__(self, root: Path):
        self.requests: list[str] = []
        bucket = self

        class Handler(server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(403)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self):
                bucket.requests.append(self.path)
                status, body, headers = _answer(root, self.path, self.headers.get("Range"))
                self.send_response(status)
                for key, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body)

        class Server(server.ThreadingHTTPServer):
            request_queue_size = 256  # array_record reads records at once, a connection for each

            def handle_error(self, *_):
                pass  # array_record hangs up in the middle of an answer

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # array_record
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for credentials
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _answer(root: Path, url: str, wanted: str | None) -> tuple[int, bytes, dict[str, str]]:
    parts = urllib.parse.urlsplit(url)
    query = dict(urllib.parse.parse_qsl(parts.query))
    match = re.fullmatch(r"/(?:download/)?storage/v1/b/([^/]+)/o(?:/(.+))?", parts.path)
    bucket, name = match[1], urllib.parse.unquote(match[2] or "")
    json_type = {"Content-Type": "application/json"}
    if not (root / bucket).is_dir() or (name and not (root / bucket / name).is_file()):
        return 404, b'{"error": {"code": 404, "message": "does not exist"}}', json_type
    if not name:
        return 200, json.dumps(_listing(root / bucket, query)).encode(), json_type
    if query.get("alt") != "media":
        return 200, json.dumps(_metadata(root / bucket, name)).encode(), json_type
    data = (root / bucket / name).read_bytes()
    kind = {"Content-Type": "application/octet-stream"}
    if not wanted:
        return 200, data, kind
    first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted).groups()
    start = int(first) if first else max(0, len(data) - int(last))
    stop = min(len(data), int(last) + 1) if first and last else len(data)
    kind["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
    return 206, data[start:stop], kind


def _metadata(bucket: Path, name: str) -> dict:
    moment = "2024-01-01T00:00:00Z"
    size = str((bucket / name).stat().st_size)
    fixed = {"generation": "1", "updated": moment, "timeCreated": moment}
    return {"bucket": bucket.name, "name": name, "size": size} | fixed


def _listing(bucket: Path, query: Mapping[str, str]) -> dict:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    items, prefixes = [], {}
    for path in sorted(p for p in bucket.rglob("*") if p.is_file()):
        name = path.relative_to(bucket).as_posix()
        if name.startswith(prefix):
            head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
            if found:
                prefixes[prefix + head + found] = None
            else:
                items.append(_metadata(bucket, name))
    return {"items": items, "prefixes": list(prefixes)}
