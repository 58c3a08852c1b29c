"""Metrics to `metrics.jsonl` always, and to trackers where they are asked for."""

import json
from collections.abc import Callable
from pathlib import Path

from clu import parameter_overview as overview

from jaxrobust.runtime.files import jsonl, whole
from jaxrobust.training.run.phase import Run
from jaxrobust.types import Params

Write = Callable[[int, dict[str, float]], None]


def writer(run: Run, start: int, *, enabled: bool) -> Write:
    """Return `write(step, scalars)`; a line is on disk, and the file closed, when that returns.

    A bucket's file system (gcsfuse) keeps nothing of a file that is still open when the host goes.
    Lines of this phase behind `start` are removed, because they will be written again; where it is
    not `enabled`, on all processes but the first, nothing is written.
    """
    if not enabled:
        return lambda step, scalars: None
    path, phase = run.workdir / "metrics.jsonl", run.name
    run.trackers.begin(phase, start, run.before)
    kept = [m for m in jsonl.read(path) if m["phase"] != phase or m["step"] <= start]
    jsonl.replace(path, "".join(json.dumps(m) + "\n" for m in kept))

    def write(step: int, scalars: dict[str, float]) -> None:
        with whole.explained(path), path.open("a") as lines:
            lines.write(json.dumps({"phase": phase, "step": step} | scalars) + "\n")
        run.trackers.scalars(step, scalars)

    return write


def parameters(workdir: Path, params: Params, *, enabled: bool) -> str:
    """Write the table of parameters to `parameters.txt`, where `enabled`; return what it counts."""
    file = workdir / "parameters.txt"
    if enabled:
        jsonl.replace(file, overview.get_parameter_overview(params, include_stats=False) + "\n")
    count = overview.count_parameters(params)
    return f"{count:,} parameters in {len(params)} arrays, which {file} lists"
