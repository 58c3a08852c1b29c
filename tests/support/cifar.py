"""CIFAR's archives in their official formats, of any images: what is not there to be downloaded."""

import hashlib
import io
import pickle
import struct
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np

from jaxrobust.data.prepare import cifar

CLASSES = {
    "cifar10": {
        "label": [
            "airplane",
            "automobile",
            "bird",
            "cat",
            "deer",
            "dog",
            "frog",
            "horse",
            "ship",
            "truck",
        ]
    },
    "cifar100": {
        "coarse_label": [f"coarse_{i}" for i in range(20)],
        "label": [f"fine_{i}" for i in range(100)],
    },
}


class _Python2(pickle._Pickler):
    """Writes texts and NumPy's names as Python 2 wrote the official files."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        head = (
            b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))
        )
        self.write(head + value)
        self.memoize(value)

    def save_text(self, value):
        data = value.encode()
        self.write(b"U" + bytes([len(data)]) + data)
        self.memoize(value)

    dispatch[bytes] = save_bytes
    dispatch[str] = save_text

    def save_global(self, obj, name=None):
        if getattr(obj, "__name__", "") == "_reconstruct":
            self.write(b"cnumpy.core.multiarray\n_reconstruct\n")
            self.memoize(obj)
        else:
            super().save_global(obj, name)


def pickled(value: Any) -> bytes:
    """The pickle that Python 2 would have written."""
    buffer = io.BytesIO()
    _Python2(buffer, 2).dump(value)
    return buffer.getvalue()


def images_of(sizes: Mapping[str, int], dataset: str) -> cifar.ArchiveContents:
    """Noise with labels, `sizes` of it."""
    draw = np.random.default_rng(0)
    classes = {feature: tuple(names) for feature, names in CLASSES[dataset].items()}
    return cifar.ArchiveContents(
        {s: draw.integers(0, 256, (n, 32, 32, 3), np.uint8) for s, n in sizes.items()},
        {
            s: {f: draw.integers(0, len(names), n) for f, names in classes.items()}
            for s, n in sizes.items()
        },
        classes,
    )


def contents(archive: cifar.Archive, images: cifar.ArchiveContents) -> dict[str, bytes]:
    """The files in an archive, by their names in its folder."""
    found = {}
    for split, names in archive.members.items():
        rows = images.images[split].transpose(0, 3, 1, 2).reshape(len(images.images[split]), -1)
        labels = images.labels[split]
        for name, part in zip(names, np.array_split(np.arange(len(rows)), len(names)), strict=True):
            if all(archive.labels.values()):
                batch = {key: labels[f][part].tolist() for f, key in archive.labels.items()}
                batch |= {"data": np.ascontiguousarray(rows[part]), "batch_label": name}
                batch |= {"filenames": [f"{split}_{i}.png" for i in part.tolist()]}
                found[name] = pickled(batch)
            else:
                columns = [labels[feature][part, None].astype(np.uint8) for feature in labels]
                found[name] = np.concatenate([*columns, rows[part]], 1).tobytes()
    for feature, (name, key) in archive.names.items():
        names = images.classes[feature]
        if not key:
            found[name] = "".join(f"{n}\n" for n in [*names, ""]).encode()
    if all(archive.labels.values()):
        meta = {key: list(images.classes[f]) for f, (_, key) in archive.names.items()}
        found[next(iter(archive.names.values()))[0]] = pickled(meta | {"num_vis": 3072})
    return found


def write(path: Path, archive: cifar.Archive, files: Mapping[str, bytes]) -> Path:
    """The archive of these files."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{archive.folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@contextmanager
def official(path: Path, archive: cifar.Archive, **changes: Any) -> Iterator[cifar.Archive]:
    """Take a file for the official archive of its kind, and its images for all that there are."""
    content = path.read_bytes()
    known = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)} | changes
    rows = [a._replace(**known) if a.file == archive.file else a for a in cifar.ARCHIVES]
    with mock.patch.object(cifar, "ARCHIVES", tuple(rows)):
        yield next(a for a in rows if a.file == archive.file)
