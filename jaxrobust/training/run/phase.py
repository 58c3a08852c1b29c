"""One phase of a run: its parts, its files, its checkpoints."""

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
from jaxrobust.training.run.trackers import NONE, Trackers
from jaxrobust.weights.store.checkpoint import Checkpoints


class PhaseRun(NamedTuple):
    """One phase of a run: what does not change from step to step."""

    config: Any
    workdir: Path
    name: str
    phase: build.Phase
    source: registry.Source
    profile: Profile | None
    latest: Checkpoints  # to go back to after trouble
    best: Checkpoints
    stopped: Checkpoints  # of a stop in trouble, after the latest
    trackers: Trackers = NONE
    earlier_steps: int = 0  # of the phases before

    def file(self, name: str) -> Path:
        """Name a file of this phase."""
        return self.workdir / self.name / name


def last(run: PhaseRun) -> tuple[Checkpoints, int | None]:
    """Find the checkpoints to continue from, for all hosts those of the first, and their step;
    None: there is none.
    """
    both = (run.latest, run.stopped)
    steps = [hosts.first(-1 if (k := c.latest_step()) is None else k) for c in both]
    later = int(steps[1] > steps[0])
    return both[later], None if steps[later] < 0 else steps[later]


def note_resumption(run: PhaseRun, step: int) -> None:
    """Add to `resumptions.jsonl` that a process continues from the checkpoint of a step, and
    when.
    """
    if jax.process_index() == 0:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        note = {"step": step, "time": now, "devices": in_use.devices()}
        jsonl.append(run.file("resumptions.jsonl"), note)


def scored(run: PhaseRun) -> int:
    """Find the last step that was evaluated on the selection split; 0: none was, or the best
    weights are gone, so that it has to be done again.
    """
    rows = jsonl.read(run.workdir / "metrics.jsonl")
    here = [m["step"] for m in rows if m["phase"] == run.name and "selection_robust" in m]
    return hosts.first(0 if run.best.latest_step() is None else max(here, default=0))
