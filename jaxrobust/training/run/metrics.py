"""Metrics to `metrics.jsonl` always, and to trackers where they are asked for."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from clu import parameter_overview as overview

from jaxrobust.runtime.files import jsonl, whole
from jaxrobust.training.run.trackers import NONE, Trackers
from jaxrobust.types import Params

Write = Callable[[int, dict[str, float]], None]


@contextlib.contextmanager
def writer(
    workdir: Path,
    *,
    phase: str,
    start: int,
    enabled: bool,
    trackers: Trackers = NONE,
    before: int = 0,
) -> Iterator[Write]:
    """Yield `write(step, scalars)`; a line is on disk, and the file closed, when it returns.

    A bucket's file system (gcsfuse) keeps nothing of a file that is still open when the host goes.
    Lines of this phase behind `start` are removed, because they will be written again; where it is
    not `enabled`, on all processes but the first, nothing is written. `before`: steps of the phases
    before this one, for trackers, which whoever opened them closes.
    """
    if not enabled:
        yield lambda step, scalars: None
        return
    path = workdir / "metrics.jsonl"
    trackers.begin(phase, start, before)
    kept = [m for m in jsonl.read(path) if m["phase"] != phase or m["step"] <= start]
    jsonl.replace(path, "".join(json.dumps(m) + "\n" for m in kept))

    def write(step: int, scalars: dict[str, float]) -> None:
        with whole.explained(path), path.open("a") as lines:
            lines.write(json.dumps({"phase": phase, "step": step} | scalars) + "\n")
        trackers.scalars(step, scalars)

    yield write


def parameters(workdir: Path, params: Params, *, enabled: bool) -> str:
    """Write the table of parameters to `parameters.txt`, where `enabled`; return what it counts."""
    file = workdir / "parameters.txt"
    if enabled:
        jsonl.replace(file, overview.get_parameter_overview(params, include_stats=False) + "\n")
    count = overview.count_parameters(params)
    return f"{count:,} parameters in {len(params)} arrays, which {file} lists"
