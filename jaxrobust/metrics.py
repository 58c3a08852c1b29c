"""Metrics to `metrics.jsonl` always, to TensorBoard where its extra is installed and asked for."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

Write = Callable[[int, dict[str, float]], None]


@contextlib.contextmanager
def writer(workdir: Path, *, phase: str, tensorboard: bool, enabled: bool) -> Iterator[Write]:
    """Yields `write(step, scalars)`; a line is on disk when it returns.

    Args:
      phase: goes into every line, and names TensorBoard's folder.
      enabled: False on all processes but the first: nothing is written.
    Raises:
      ValueError: TensorBoard asked for but not installed.
    """
    if not enabled:
        yield lambda step, scalars: None
        return
    board = _writers().SummaryWriter(str(workdir / "tensorboard" / phase)) if tensorboard else None
    with (workdir / "metrics.jsonl").open("a") as lines:

        def write(step: int, scalars: dict[str, float]) -> None:
            lines.write(json.dumps({"phase": phase, "step": step} | scalars) + "\n")
            lines.flush()
            if board is not None:
                board.write_scalars(step, scalars)

        yield write
    if board is not None:
        board.close()


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
