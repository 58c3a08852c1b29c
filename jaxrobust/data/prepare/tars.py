"""What the official tar files hold. They are read header by header and never unpacked.

ImageNet's 1.28 million headers cost 20 s of CPU, and a small read from the disk each.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from jaxrobust.data.prepare.known import (
    VALIDATION_NAME,
    TarredImage,
    check_synset,
    known,
    validation_label,
)

FILES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
_OTHERS = {
    b"\x1f\x8b": "compressed (gzip); decompress it first",
    b"BZh": "compressed (bzip2); decompress it first",
    b"\xfd7zXZ": "compressed (xz); decompress it first",
    b"(\xb5/\xfd": "compressed (zstd); decompress it first",
    b"PK\x03\x04": "a zip file; give the folder that it unpacks to",
    b"<": "a web page, no tar file; download it again",
}


def rows(path: Path) -> tuple[str, Iterator[TarredImage]]:
    """("train" or "validation", the images) of a tar file."""
    first = next(members(path), ("", 0, 0))[0]
    if re.fullmatch(r"n\d{8}\.tar", first):
        return "train", _train(path)
    if VALIDATION_NAME.fullmatch(first):
        return "validation", (
            TarredImage(name, "", validation_label(path, name), offset, size)
            for name, offset, size in members(path)
        )
    raise ValueError(
        f"{path} begins with {first or 'no file'!r}: it is neither {FILES[0]} (of files "
        f"n########.tar) nor {FILES[1]} (of files ILSVRC2012_val_########.JPEG)"
    )


def _train(path: Path) -> Iterator[TarredImage]:
    labels = {synset: label for label, synset in enumerate(known().synsets)}
    for outer, start, size in members(path):
        synset, ending = os.path.splitext(outer)
        if ending != ".tar" or synset not in labels:
            raise ValueError(f"{path}: {outer} is not the tar file of one of ImageNet's classes")
        for inner, offset, length in members(path, start, start + size, within=outer):
            check_synset(f"{path}: {outer}", inner, synset)
            yield TarredImage(inner, "", labels[synset], offset, length)


def members(
    path: Path, start: int = 0, stop: int | None = None, *, within: str = ""
) -> Iterator[tuple[str, int, int]]:
    """(name, offset in `path`, size) of every file of the tar file in bytes [start, stop)."""
    where = f"{path}: {within}" if within else f"{path}"
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size if stop is None else stop
        file.seek(start)
        head = file.read(8)
        for magic, what in _OTHERS.items():
            if head.startswith(magic):
                raise ValueError(f"{where} is {what}")
        file.seek(start)
        position = start
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115, `file` is what is closed
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every header
                position = member.offset
                if member.offset_data + member.size > end:
                    break
                if member.isfile():
                    yield Path(member.name).name, member.offset_data, member.size
            else:
                position = tar.offset
        except tarfile.TarError as error:
            if position == start and end - start >= tarfile.BLOCKSIZE:
                raise ValueError(f"{where} is not a tar file ({error})") from error
        # `next` also ends at what is no header; a whole tar file ends with zeros.
        file.seek(position)
        if position + tarfile.BLOCKSIZE > end or any(file.read(tarfile.BLOCKSIZE)):
            raise ValueError(
                f"{where} is truncated or damaged: no whole file or end at byte "
                f"{position - start:,} of {end - start:,}; copy it again"
            )
