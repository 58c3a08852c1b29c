"""Metrics to `metrics.jsonl` always, to TensorBoard where its extra is installed and asked for."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clu import parameter_overview as overview

from jaxrobust.runtime import jsonl
from jaxrobust.types import Params

Write = Callable[[int, dict[str, float]], None]


@contextlib.contextmanager
def writer(
    workdir: Path, *, phase: str, start: int, tensorboard: bool, enabled: bool
) -> Iterator[Write]:
    """Yield `write(step, scalars)`; a line is on disk, and the file closed, when it returns.

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
    kept = [m for m in jsonl.read(path) if m["phase"] != phase or m["step"] <= start]
    jsonl.replace(path, "".join(json.dumps(m) + "\n" for m in kept))
    board = (
        _tensorboard().SummaryWriter(str(workdir / "tensorboard" / phase)) if tensorboard else None
    )

    def write(step: int, scalars: dict[str, float]) -> None:
        with path.open("a") as lines:
            lines.write(json.dumps({"phase": phase, "step": step} | scalars) + "\n")
        if board is not None:
            for name, value in scalars.items():
                board.add_scalar(name, value, step)
            board.flush()

    try:
        yield write
    finally:
        if board is not None:
            board.close()


def check(*, tensorboard: bool) -> None:
    """Raise ValueError if TensorBoard is asked for but not installed."""
    if tensorboard:
        _tensorboard()


def _tensorboard() -> Any:
    try:  # clu's writer of the same files needs TensorFlow
        import tensorboardX
    except ImportError as error:
        raise ValueError(
            "log.tensorboard=True needs an extra: pip install 'jaxrobust[tensorboard]'"
        ) from error
    return tensorboardX


def parameters(workdir: Path, params: Params, *, enabled: bool) -> str:
    """Write the table of the parameters to `parameters.txt`; return what it counts.

    Args:
      params: of a network; only their shapes and types are read.
      enabled: False on all processes but the first: nothing is written.
    """
    file = workdir / "parameters.txt"
    if enabled:
        jsonl.replace(file, overview.get_parameter_overview(params, include_stats=False) + "\n")
    count = overview.count_parameters(params)
    return f"{count:,} parameters in {len(params)} arrays, which {file} lists"
