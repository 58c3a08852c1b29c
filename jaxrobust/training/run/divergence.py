"""Steps without a finite gradient, norms that no evaluation can use: going back before them."""

import jax

from jaxrobust.runtime.files import jsonl
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text.progress import say
from jaxrobust.training.run.in_flight import Ahead
from jaxrobust.training.run.phase import Run
from jaxrobust.training.run.stopping import Stopped


class Diverged(Stopped):
    """No finite loss or gradient for more steps than may be skipped, or broken statistics."""


class Trouble:
    """What a phase has met of it: `rollbacks` so far, each of which lowers the learning rate."""

    def __init__(self, run: Run) -> None:
        """Read how often the phase went back; `Diverged` if that is more than it may."""
        self._run, self._settings = run, run.config.trouble
        self._file = run.file("rollbacks.jsonl")
        before = jsonl.read(self._file)
        self.rollbacks = hosts.first(len(before))
        if self.rollbacks > self._settings.rollbacks:
            raise self._diverged(before[-1]["why"] if before else "another host went back")

    @property
    def lr_scale(self) -> float:
        """Compute the factor of the schedule's learning rate by now."""
        return self._settings.lr**self.rollbacks

    def skipped(self, ahead: Ahead) -> str:
        """Describe the last steps where more in a row updated nothing than may; empty: not so."""
        if ahead.skipped <= self._settings.skips:
            return ""
        row = ahead.last
        return (
            f"the loss is {row['loss']} at step {row['step']}, its gradient's norm "
            f"{row['gradient_norm']}; {ahead.skipped} steps in a row updated nothing"
        )

    def roll_back(self, step: int, why: str) -> None:
        """Note that the phase goes back to its last checkpoint for the reason `why`, seen at
        `step`; `Diverged` if it may not.
        """
        run = self._run
        run.stopped.clear()  # before the note: a kill in between repeats the steps that led here
        run.latest.wait()  # the last one may not be whole yet, or not for every host
        last, scale = run.latest.latest_step() or 0, self._settings.lr ** (self.rollbacks + 1)
        if jax.process_index() == 0:
            note = {"step": step, "back_to": last, "lr_scale": scale, "why": why}
            jsonl.append(self._file, note)
        if self.rollbacks >= self._settings.rollbacks:
            raise self._diverged(why)
        say(f"{run.name}: {why}. Back to step {last}, with {scale:g} times the learning rate")

    def _diverged(self, why: str) -> Diverged:
        latest, more = self._run.latest, len(jsonl.read(self._file))
        last = latest.latest_step()
        good = f"The last good checkpoint is step {last} under {latest.directory}"
        there = "go on from there"
        if not last:
            good, there = "No checkpoint was written yet", "begin anew at step 0"
        return Diverged(
            f"{why}. {good}. Set trouble.rollbacks={more} to {there} with {self._settings.lr} "
            "times the learning rate, or start again in a new --workdir with a lower one or a "
            "longer warm-up"
        )
