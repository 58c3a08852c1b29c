"""A phase of a run: its parts, files and checkpoints."""

import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxrobust.data.sources import registry
from jaxrobust.runtime.devices import in_use
from jaxrobust.runtime.devices.profiling import Profile
from jaxrobust.runtime.files import jsonl
from jaxrobust.runtime.processes import hosts
from jaxrobust.training import build
from jaxrobust.training.run import goodput
from jaxrobust.training.run.trackers import NONE, Trackers
from jaxrobust.weights.store.checkpoint import Checkpoints


class PhaseRun(NamedTuple):
    """What stays constant over the steps of a phase."""

    config: Any
    workdir: Path
    name: str
    phase: build.Phase
    source: registry.Source
    profile: Profile | None
    latest: Checkpoints  # to return to after trouble
    best: Checkpoints
    stopped: Checkpoints  # saved when stopping in trouble, after the latest
    trackers: Trackers = NONE
    earlier_steps: int = 0  # in the phases before
    clock: goodput.Clock = goodput.NONE

    def file(self, name: str) -> Path:
        """Return the path of a file of this phase."""
        return self.workdir / self.name / name


def last(run: PhaseRun) -> tuple[Checkpoints, int | None]:
    """Return the checkpoints to continue from, and their step; all hosts follow the first one.
    None: there are none.
    """
    both = (run.latest, run.stopped)
    steps = [hosts.first(-1 if (k := c.latest_step()) is None else k) for c in both]
    later = int(steps[1] > steps[0])
    return both[later], None if steps[later] < 0 else steps[later]


def note_resumption(run: PhaseRun, step: int) -> None:
    """Record in `resumptions.jsonl` that a process resumes from a step's checkpoint, and when."""
    if jax.process_index() == 0:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        note = {"step": step, "time": now, "devices": in_use.devices()}
        jsonl.append(run.file("resumptions.jsonl"), note)


def scored(run: PhaseRun) -> int:
    """Return the last step evaluated on the selection split; 0: none was, or the best weights are
    gone, so it must be repeated.
    """
    rows = jsonl.read(run.workdir / "metrics.jsonl")
    here = [m["step"] for m in rows if m["phase"] == run.name and "selection_robust" in m]
    return hosts.first(0 if run.best.latest_step() is None else max(here, default=0))
