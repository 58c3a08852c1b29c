"""How a run stops early or rolls back: all hosts after the same step, with everything saved."""

import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import jax

from jaxrobust.data.sources import registry
from jaxrobust.runtime.files import jsonl
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text.progress import say
from jaxrobust.training.run.metrics import Ahead
from jaxrobust.training.run.phase import PhaseRun
from jaxrobust.weights.store.steps import steps

_DATA = 64  # reason for a host to stop, in place of a signal number


def again(workdir: Path, phases: Sequence[str]) -> str:
    """Say how to continue with the same command, given what a workdir holds of a run's phases."""
    for name in reversed(phases):
        if saved := [s for kind in ("latest", "stopped") for s in steps(workdir / name / kind)]:
            return f"run the same command to continue after step {max(saved)} of {name}"
    return "run the same command to start over, because nothing was saved yet"


class StopSignals:
    """Records Ctrl-C and SIGTERM as the signal's number, so that the loop can save.

    A second Ctrl-C stops at once. SIGTERM does not: Slurm and Kubernetes may send it twice.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, object] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.signal = int(number)
            say("stopping after this step, then saving (Ctrl-C: stop at once, without saving)")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


class Stopped(Exception):
    """All hosts have stopped a run together; `code` is the command's exit code."""

    code = 3


class Interrupted(Stopped):
    """Ctrl-C; everything is saved."""

    code = 130


class Preempted(Interrupted):
    """SIGTERM, on this host or another; everything is saved."""

    code = 75


class HostStopped(Interrupted):
    """Another host met an error, which it reports; everything is saved."""

    code = 3


class BadData(Stopped, registry.DataError):
    """A data error without loss: all hosts saved and stop together."""

    code = 2


class Stops:
    """Decides who stops, and when.

    A host that is asked to stop, or cannot read its data, says so with its next step. No device
    then takes that step, and all hosts read in its metrics that they stop before it, and why. A
    single process need not ask.
    """

    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals
        self.alone = jax.process_count() == 1
        self.failure: registry.DataError | None = None

    def at_once(self) -> int:
        """Return the reason for which a single process stops now; 0: none."""
        return self._signals.signal if self.alone else 0

    def to_tell(self) -> int:
        """Return this host's signal for the next step."""
        return 0 if self.alone else _DATA if self.failure else self._signals.signal

    def now(self) -> int:
        """Agree on a reason to stop when no process takes a step; 0: none."""
        return hosts.largest(self._signals.signal)

    def failed(self, error: registry.DataError) -> int:
        """Record data that cannot be read; return the reason, if this process is alone."""
        self.failure = error
        return _DATA if self.alone else 0

    def exception(self, why: int, text: str) -> Exception:
        """Build the exception to raise once all is saved, as `text` says."""
        if self.failure is not None:
            others = "" if self.alone else "; the other hosts stop too"
            return BadData(f"{self.failure}{others}. Repair the data before you continue: {text}")
        if why == _DATA:
            return HostStopped(f"another host cannot read its data (see its message); {text}")
        return (Preempted if why == signal.SIGTERM else Interrupted)(text)


class Diverged(Stopped):
    """More steps without a finite loss or gradient than allowed, or broken statistics."""


class Trouble:
    """The trouble of a phase: `rollbacks` so far, each of which lowers the learning rate."""

    def __init__(self, run: PhaseRun) -> None:
        """Read how often the phase rolled back; `Diverged` if that is more than allowed."""
        self._run, self._settings = run, run.config.trouble
        self._file = run.file("rollbacks.jsonl")
        rollbacks = jsonl.read(self._file)
        self.rollbacks = hosts.first(len(rollbacks))
        if self.rollbacks > self._settings.rollbacks:
            raise self._diverged(rollbacks[-1]["why"] if rollbacks else "another host rolled back")

    @property
    def lr_scale(self) -> float:
        """Return the current factor of the schedule's learning rate."""
        return self._settings.lr**self.rollbacks

    def skipped(self, ahead: Ahead) -> str:
        """Describe the last steps if more in a row updated nothing than allowed; otherwise ""."""
        if ahead.skipped <= self._settings.skips:
            return ""
        row = ahead.last
        return (
            f"the loss is {row['loss']} at step {row['step']}, with gradient norm "
            f"{row['gradient_norm']}; {ahead.skipped} steps in a row updated no weights"
        )

    def roll_back(self, step: int, why: str) -> None:
        """Record that the phase returns to its last checkpoint for the reason `why`, seen at
        `step`; `Diverged` if it may not.
        """
        run = self._run
        run.stopped.clear()  # first, so that a kill in between repeats the steps that led here
        run.latest.wait()  # the last one may still be incomplete, or on some hosts only
        last, scale = run.latest.latest_step() or 0, self._settings.lr ** (self.rollbacks + 1)
        if jax.process_index() == 0:
            jsonl.append(self._file, {"step": step, "back_to": last, "lr_scale": scale, "why": why})
        if self.rollbacks >= self._settings.rollbacks:
            raise self._diverged(why)
        say(f"{run.name}: {why}. Returning to step {last}, with {scale:g} times the learning rate")

    def _diverged(self, why: str) -> Diverged:
        latest, more = self._run.latest, len(jsonl.read(self._file))
        last = latest.latest_step()
        good = f"The last good checkpoint is step {last} in {latest.directory}"
        there = "continue from there"
        if not last:
            good, there = "No checkpoint was written yet", "start over at step 0"
        return Diverged(
            f"{why}. {good}. Set trouble.rollbacks={more} to {there} with {self._settings.lr} "
            "times the learning rate, or start again in a new --workdir with a lower learning rate "
            "or a longer warm-up"
        )
