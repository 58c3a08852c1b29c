"""Metrics to `metrics.jsonl` always, to TensorBoard where its extra is installed and asked for."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from jaxrobust.runtime import locks

Write = Callable[[int, dict[str, float]], None]


@contextlib.contextmanager
def writer(
    workdir: Path, *, phase: str, start: int, tensorboard: bool, enabled: bool
) -> Iterator[Write]:
    """Yields `write(step, scalars)`; a line is on disk, and the file closed, when it returns.

    A bucket's file system (gcsfuse) keeps nothing of a file that is still open when the host goes.

    Args:
      phase: goes into every line, and names TensorBoard's folder.
      start: the step that the run continues at; lines of this phase behind it are removed, because
        they will be written again.
      enabled: False on all processes but the first: nothing is written.
    Raises:
      ValueError: TensorBoard asked for but not installed.
    """
    if not enabled:
        yield lambda step, scalars: None
        return
    path = workdir / "metrics.jsonl"
    kept = [m for m in read(path) if m["phase"] != phase or m["step"] <= start]
    replace(path, "".join(json.dumps(m) + "\n" for m in kept))
    board = _writers().SummaryWriter(str(workdir / "tensorboard" / phase)) if tensorboard else None

    def write(step: int, scalars: dict[str, float]) -> None:
        with path.open("a") as lines:
            lines.write(json.dumps({"phase": phase, "step": step} | scalars) + "\n")
        if board is not None:
            board.write_scalars(step, scalars)

    try:
        yield write
    finally:
        if board is not None:
            board.close()


def read(path: Path) -> list[dict]:
    """The objects of a file of JSON lines; a last line that was cut off does not count.

    Raises:
      ValueError: another line is damaged; names it.
    """
    rows = []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"{line.decode().strip()[:40]} is no JSON object")
            rows.append(row)
        except ValueError as error:
            if number < len(lines) or line.endswith(b"\n"):
                raise ValueError(
                    f"{path}, line {number} is damaged ({error}); remove that line"
                ) from error
    return rows


def append(path: Path, row: dict) -> None:
    """Adds an object to a file of JSON lines, in place of a last line that was cut off.

    Other processes may append to the same file at the same time.
    """
    with path.open("a+b") as lines:
        locks.wait_for(lines)
        mend(lines)
        lines.write(json.dumps(row).encode() + b"\n")
        lines.flush()
        os.fsync(lines.fileno())


def mend(lines: BinaryIO) -> None:
    """Makes the last line of an open file end, or removes it where it was cut off, as `read` does.

    Writing goes on at the end.
    """
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
    """Writes a file whole or not at all, also where the power fails or the disk is full."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else the new name may outlive the content
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)  # on a full disk every byte counts
        raise


def check(*, tensorboard: bool) -> None:
    """Raises ValueError if TensorBoard is asked for but not installed."""
    if tensorboard:
        _writers()


def _writers():
    try:  # imports TensorFlow: not before somebody asks for it
        from clu import metric_writers
    except ImportError as error:
        raise ValueError(
            "log.tensorboard=True needs an extra: pip install -e '.[tensorboard]'"
        ) from error
    return metric_writers
