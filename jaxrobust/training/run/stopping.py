"""How a run stops before its end: all hosts after the same step, with everything saved."""

import signal
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxrobust.data.sources import registry
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text.progress import StopSignals
from jaxrobust.weights.store.checkpoint import steps

_DATA = 64  # why a host stops, beside the numbers of signals


def again(workdir: Path, phases: Sequence[str]) -> str:
    """Say what the same command does with what a workdir holds of a run's phases."""
    for name in reversed(phases):
        if found := [s for kind in ("latest", "stopped") for s in steps(workdir / name / kind)]:
            return f"the same command continues after step {max(found)} of {name}"
    return "the same command begins anew, because nothing was saved yet"


class Stopped(Exception):
    """A run that all hosts have stopped together; `code` is that of the command."""

    code = 3


class Interrupted(Stopped):
    """Ctrl-C; everything is saved."""

    code = 130


class Preempted(Interrupted):
    """SIGTERM, of this host or another; everything is saved."""

    code = 75


class HostStopped(Interrupted):
    """Another host met an error, which it names; everything is saved."""

    code = 3


class BadData(Stopped, registry.DataError):
    """A data error that lost nothing: all hosts saved, and stop together."""

    code = 2


class Stops:
    """Who stops, and when.

    A host that is asked to, or that cannot read its data, says so with its next step. No device
    takes that step then, and all hosts read in its metrics that and why they stop before it. A
    process that is alone need not ask.
    """

    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals
        self.alone = jax.process_count() == 1
        self.failure: registry.DataError | None = None

    def at_once(self) -> int:
        """Look up the reason for which a process that is alone stops now; 0: none."""
        return self._signals.asked if self.alone else 0

    def to_tell(self) -> int:
        """Choose this host's signal for the next step."""
        return 0 if self.alone else _DATA if self.failure else self._signals.asked

    def now(self) -> int:
        """Agree on the reason to stop where none takes a step, on all processes; 0: none."""
        return hosts.largest(self._signals.asked)

    def failed(self, error: registry.DataError) -> int:
        """Take note of data that cannot be read; return why, for a process that is alone."""
        self.failure = error
        return _DATA if self.alone else 0

    def exception(self, why: int, text: str) -> Exception:
        """Build the exception to raise, once all is saved; `text` says so."""
        if self.failure is not None:
            others = "" if self.alone else "; the other hosts stop as well"
            return BadData(f"{self.failure}{others}. Repair the data first: {text}")
        if why == _DATA:
            return HostStopped(f"another host cannot read its data, and names it; {text}")
        return (Preempted if why == signal.SIGTERM else Interrupted)(text)
