"""Metrics to `metrics.jsonl` always, to TensorBoard where its extra is installed and asked for."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

Write = Callable[[int, dict[str, float]], None]


@contextlib.contextmanager
def writer(
    workdir: Path, *, phase: str, start: int, tensorboard: bool, enabled: bool
) -> Iterator[Write]:
    """Yields `write(step, scalars)`; a line is on disk when it returns.

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
    with path.open("a") as lines:

        def write(step: int, scalars: dict[str, float]) -> None:
            lines.write(json.dumps({"phase": phase, "step": step} | scalars) + "\n")
            lines.flush()
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
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines) or line.endswith("\n"):
                raise ValueError(
                    f"{path}, line {number} is damaged ({error}); remove that line"
                ) from error
    return rows


def append(path: Path, row: dict) -> None:
    """Adds an object to a file of JSON lines, whole or not at all, and drops a line cut off."""
    replace(path, "".join(json.dumps(r) + "\n" for r in [*read(path), row]))


def replace(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


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
