"""JSON-lines files, and atomic writes."""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from jaxrobust.runtime.files import locks, whole


def read(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; a truncated last line is ignored."""
    rows = []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"{line.decode().strip()[:40]} is not a JSON object")
            rows.append(row)
        except ValueError as error:
            if number == 1 and isinstance(error, UnicodeDecodeError):
                raise ValueError(f"{path} is not a text file; give a results.jsonl") from error
            if number < len(lines) or line.endswith(b"\n"):
                raise ValueError(
                    f"{path}, line {number} is damaged ({error}); remove that line"
                ) from error
    return rows


def append(path: Path, row: dict[str, Any]) -> None:
    """Append a line, replacing a truncated one; safe with several processes."""
    with whole.explained(path), path.open("a+b") as lines:
        locks.wait_for(lines)
        mend(lines)
        lines.write(json.dumps(row).encode() + b"\n")
        lines.flush()
        os.fsync(lines.fileno())


def mend(lines: BinaryIO) -> None:
    """End the last line of an open file or, if it is truncated (see `read`), remove it."""
    lines.seek(0)
    text = lines.read()
    last = text.rpartition(b"\n")[2]
    try:
        json.loads(last)
    except ValueError:
        lines.truncate(len(text) - len(last))
        lines.seek(0, os.SEEK_END)
    else:
        lines.write(b"\n")


def replace(path: Path, text: str) -> None:
    """Write a file atomically, even if the power fails or the disk is full."""
    with whole.writing(path, len(text)) as part:
        part.write_text(text)
