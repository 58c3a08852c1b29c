"""Traces of a few training steps, to view in XProf."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxrobust.runtime.text.progress import say


class Profile(NamedTuple):
    """The steps to trace, counted from where a command starts or continues a phase."""

    start: int
    steps: int


def profile(text: str) -> Profile:
    """Parse `--profile START:STEPS`."""
    if not re.fullmatch(r"\d+:0*[1-9]\d*", text):
        raise ValueError(
            f"--profile {text} is not START:STEPS; write two integers, such as 10:5 for 5 steps "
            "after the first 10"
        )
    start, steps = map(int, text.split(":"))
    return Profile(start, steps)


class PhaseTrace:
    """Traces a phase from its start to its end; without a profile it does nothing.

    Each host writes its part into `directory`, under the same name.
    """

    def __init__(self, profile: Profile | None, directory: Path, step: int) -> None:
        self._directory = directory.absolute()
        self._first = self._last = -1
        if profile:
            self._first, self._last = step + profile.start, step + profile.start + profile.steps
        self._step = step
        self._running = False
        self._annotation: Any = None  # gives XProf the step number and the host time

    def dispatched(self, step: int, values: Any) -> bool:
        """Register that step `step` was sent to the device; `values` are some of its results.

        Returns whether the trace began or ended here. The device had to finish first, so this time
        does not count as training.
        """
        self._step = step
        self._annotate(None)
        if step not in (self._first, self._last):
            if self._running:
                self._annotate(step + 1)
            return False
        jax.block_until_ready(values)  # the trace should hold complete steps
        if step == self._first:
            self._begin()
        else:
            self._end()
        return True

    def _begin(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.session_id = f"step-{self._first}"  # by default, each host uses its current time
        jax.profiler.start_trace(self._directory, profiler_options=options)
        self._running = True
        self._annotate(self._first + 1)

    def _end(self) -> None:
        self._annotate(None)
        self._running = False
        jax.profiler.stop_trace()
        say(
            f"{self._directory.name}: steps {self._first + 1} to {self._step} were traced; view "
            f"them with: pip install xprof; xprof --logdir {self._directory}"
        )

    def _annotate(self, step: int | None) -> None:
        if self._annotation:
            self._annotation.__exit__(None, None, None)
            self._annotation = None
        if step is not None:
            self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
            self._annotation.__enter__()

    def __enter__(self) -> "PhaseTrace":
        if self._step == self._first:
            self._begin()
        return self

    def __exit__(self, *unused: object) -> None:
        if self._running:
            self._end()
        elif self._step < self._first:
            say(
                f"{self._directory.name}: nothing was traced, because the phase ended at step "
                f"{self._step}, but --profile starts after step {self._first}"
            )
