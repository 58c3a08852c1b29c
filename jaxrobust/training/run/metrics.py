"""Metrics: from steps on the device to `metrics.jsonl` and, on request, trackers."""

import json
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from clu import parameter_overview as overview

from jaxrobust.runtime.files import jsonl, whole
from jaxrobust.training.run.phase import PhaseRun
from jaxrobust.types import Params

Write = Callable[[int, dict[str, float]], None]
_AHEAD = 2  # steps that may be queued on the device, each with its batch


def writer(run: PhaseRun, start: int, *, enabled: bool) -> Write:
    """Return `write(step, scalars)`; when it returns, the line is on disk and the file is closed.

    A bucket's file system (gcsfuse) loses a file that is still open when the host disappears. Lines
    of this phase after `start` are removed, because they will be rewritten. If not `enabled`, as on
    all processes but the first, nothing is written.
    """
    if not enabled:
        return lambda step, scalars: None
    path, phase = run.workdir / "metrics.jsonl", run.name
    run.trackers.begin(phase, start, run.earlier_steps)
    rows = [m for m in jsonl.read(path) if m["phase"] != phase or m["step"] <= start]
    jsonl.replace(path, "".join(json.dumps(m) + "\n" for m in rows))

    def write(step: int, scalars: dict[str, float]) -> None:
        with whole.explained(path), path.open("a") as lines:
            lines.write(json.dumps({"phase": phase, "step": step} | scalars) + "\n")
        run.trackers.scalars(step, scalars)

    return write


def parameters(workdir: Path, params: Params, *, enabled: bool) -> str:
    """Write the table of parameters to `parameters.txt`, if `enabled`; return a summary."""
    file = workdir / "parameters.txt"
    if enabled:
        jsonl.replace(file, overview.get_parameter_overview(params, include_stats=False) + "\n")
    count = overview.count_parameters(params)
    return f"{count:,} parameters in {len(params)} arrays, listed in {file}"


class Ahead:
    """Steps in flight on the device, and the metrics of finished ones."""

    def __init__(self, meta: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Start with nothing on the device; `meta`: what was `noted` where the run resumes."""
        self._waiting: deque[tuple[int, dict]] = deque()
        self._rows = list(meta.get("unlogged", ()))  # since the last window
        self.last: dict[str, float] = meta.get("last", {})
        self.skipped: int = meta.get("skipped", 0)  # steps in a row without an update
        self.stop: tuple[int, int] | None = None  # why, and the number of steps taken before

    def add(self, step: int, values: dict) -> None:
        """Add a step's metrics, and wait until few enough steps are in flight."""
        self._waiting.append((step, values))
        if len(self._waiting) > _AHEAD:
            self._take()

    def noted(self) -> dict[str, Any]:
        """Copy what a checkpoint stores about past steps; later steps do not change it."""
        return {"unlogged": list(self._rows), "skipped": self.skipped, "last": self.last}

    def drain(self) -> None:
        """Wait for all steps in flight."""
        while self._waiting:
            self._take()

    def _take(self) -> None:
        step, values = self._waiting.popleft()
        row = {key: value.item() for key, value in jax.device_get(values).items()}
        why = row.pop("stop")
        if why and self.stop is None:
            self.stop = (why, step - 1)
        if self.stop is None:
            self.skipped = self.skipped + 1 if row["skipped"] else 0
            self.last = row | {"step": step}
            self._rows.append(row)

    def window(self) -> dict[str, float]:
        """Return means over the steps since the last call, and how many of them updated nothing."""
        rows, self._rows = self._rows, []
        good = [row for row in rows if not row["skipped"]]
        keys = sorted({key for row in good for key in row})
        means = {key: float(np.mean([row[key] for row in good if key in row])) for key in keys}
        return means | {"skipped": len(rows) - len(good)}
