"""The steps of a phase: take, log, save, evaluate, stop together, go back after trouble."""

import contextlib
import json
import signal
from collections import deque
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from jaxrobust.data import sources
from jaxrobust.evaluation import records
from jaxrobust.runtime import compilation, hardware, hosts, jsonl
from jaxrobust.runtime.profiling import Trace
from jaxrobust.runtime.progress import StopSignals, say
from jaxrobust.training import alarm, build, metrics, splits
from jaxrobust.training.phase import Run, last, scored
from jaxrobust.training.progress import Progress
from jaxrobust.training.selection import selection
from jaxrobust.training.step import TrainState
from jaxrobust.weights.checkpoint import Checkpoints

_AHEAD = 2  # steps that may wait on the device for their turn, each with its batch
_DATA = 64  # why a host stops, beside the numbers of signals


class Interrupted(Exception):
    """Ctrl-C; everything is saved."""


class Preempted(Interrupted):
    """SIGTERM, of this host or another; everything is saved."""


class HostStopped(Interrupted):
    """Another host met an error, which it names; everything is saved."""


class BadData(sources.DataError):
    """A data error that lost nothing: all hosts saved, and stop together."""


class Diverged(Exception):
    """No finite loss or gradient, for more steps than may be skipped."""


def steps(run: Run, state: TrainState, stop: StopSignals) -> bool:
    """From the state of the last checkpoint to the end of the phase, its evaluation included.

    Returns whether that was reached; False: go on from the last checkpoint, after a rollback. What
    `stop` is asked for holds then too.
    Raises:
      ValueError: a run that cannot go on as it was, before anything compiles.
      Interrupted, Diverged, DataError, OSError: the message says how to go on.
    """
    config, name, phase, latest = run.config, run.name, run.phase, run.latest
    total, every, alone = phase.total_steps, config.log.every_steps, jax.process_count() == 1
    chip = hardware.chip(jax.devices()[0].device_kind)
    start = step = int(state.step)
    checkpoints, done = last(run)
    meta: dict[str, Any] = checkpoints.meta(done) if done else {"examples_consumed": 0}
    _same_groups(run, meta)
    went_back = jsonl.read(run.file("rollbacks.jsonl"))
    rollbacks = hosts.first(len(went_back))
    if rollbacks > config.trouble.rollbacks:
        raise _diverged(run, went_back[-1]["why"] if went_back else "another host went back")
    arguments = build.abstract_arguments(config, name, phase)
    step_fn, seconds, hit = compilation.compiled(phase.step, *arguments)
    say(f"{name}: step compiled in {seconds:.1f} s (compilation cache {'hit' if hit else 'miss'})")
    select, ahead, failure = selection(run), _Ahead(meta), None
    probe, looks_every = build.probe(config, name, phase), config.alarm.every_steps
    if probe and start // looks_every < total // looks_every:
        probe, seconds, _ = compilation.compiled(probe, *arguments[:2])
        say(f"{name}: alarm compiled in {seconds:.1f} s, looks every {looks_every} steps")
    damage = splits.damage(config, run.workdir, run.source)
    batch: Any = None
    saved = hosts.first(latest.latest_step() or 0)

    @cache
    def orders(stop: int):
        return build.orders(phase.mesh, stop=stop, lr_scale=config.trouble.lr**rollbacks)

    def save(checkpoints: Checkpoints) -> None:
        about = {
            "examples_consumed": step * config[name].batch_size,
            "phase": name,
            "bn_group": phase.bn_group,
            "chip_hours": progress.chip_hours(),
            "config": json.loads(config.to_json()),
            "versions": records.versions(),
        }
        checkpoints.save(step, state, about | ahead.noted())

    def sound() -> bool:
        """Whether a rollback may come back to this state: not behind steps without a gradient."""
        return not ahead.skipped or step == total

    def stopped(why: int) -> Exception:
        """Saves, and says why all stop."""
        ahead.drain()
        latest.wait()
        save(latest if sound() else run.stopped)
        run.stopped.wait()
        latest.wait()
        text = (
            f"stopped after step {step} of {total}, saved under {run.workdir}; the same command "
            "continues there"
        )
        if ahead.skipped:
            text += f" (the last {ahead.skipped} in a row found no finite gradient)"
        if failure is not None:
            others = "" if alone else "; the other hosts stop as well"
            return BadData(f"{failure}{others}. Repair the data first: {text}")
        if why == _DATA:
            return HostStopped(f"another host cannot read its data, and names it; {text}")
        return (Preempted if why == signal.SIGTERM else Interrupted)(text)

    def due(epochs: int) -> int:
        """The last step so far at which that many epochs were over, or all were."""
        return step if step == total else step - step % (epochs * phase.steps_per_epoch)

    with (
        metrics.writer(
            run.workdir,
            phase=name,
            start=start,
            tensorboard=config.log.tensorboard,
            enabled=jax.process_index() == 0,
        ) as write,
        Progress(
            name,
            step,
            total,
            config[name].batch_size,
            config.data.workers,
            flops_per_image=build.flops_per_image(config, name) if chip else None,
            chip_hours=meta.get("chip_hours", 0.0),
        ) as progress,
        contextlib.closing(
            splits.batches(config, name, run.source, meta["examples_consumed"])
        ) as stream,
        Trace(run.profile, run.workdir / "profile" / name, step) as trace,
        stop,
    ):
        evaluated = scored(run)  # after the writer has removed lines behind the start
        while True:
            # Both stay true until it is done, at the first step after those without a gradient.
            evaluates = due(config.evaluation.every_epochs) > evaluated
            saves = evaluates or due(config.checkpoint.every_epochs) > saved
            logs = step > start and (step % every == 0 or step == total)
            if saves or logs:
                ahead.drain()
            if ahead.stop:  # the same step on every host: none has taken it
                why, step = ahead.stop
                raise stopped(why)
            if ahead.skipped > config.trouble.skips:
                _roll_back(run, ahead, rollbacks)
                return False
            if logs:
                found = ahead.window()
                found["damaged_images"] = len(damage.known) + hosts.total(len(damage.new))
                found["lr"] = float(phase.schedule(step - 1)) * config.trouble.lr**rollbacks
                for sentence in alarm.warnings(found) if "alarm_loss" in found else ():
                    say(f"{name}: WARNING, up to step {step}: {sentence}")
                write(step, found | (progress.show(step, found) if "loss" in found else {}))
            if saves and sound():
                save(latest)  # before the evaluation, which may take long
                saved = step
            if alone and stop.asked:
                raise stopped(stop.asked)
            if evaluates and sound():  # a rollback would undo the state, but not its evaluation
                write(step, select(step, state))  # the line that `scored` looks for
                evaluated = step
                progress.resume(step)
            if step == total:
                if why := hosts.largest(stop.asked):  # too late for a step's orders
                    raise stopped(why)
                return True
            try:
                with progress.waiting():
                    batch = batch if failure else next(stream)
                damage.meet(batch.damaged)
            except sources.DataError as error:
                failure, batch = error, batch or splits.blank(run)
                if alone:
                    raise stopped(_DATA) from error
            told = orders(0 if alone else _DATA if failure else stop.asked)
            images = splits.device_batch(phase.mesh, batch)
            state, values = step_fn(state, images, told)
            step += 1
            progress.dispatched(values)
            if probe and step % looks_every == 0:
                values |= probe(state, images)
            ahead.add(step, values)
            if trace.dispatched(step, values):
                progress.resume(step)


class _Ahead:
    """Steps that are on the device, and what those that ended there said."""

    def __init__(self, meta: Mapping[str, Any] = MappingProxyType({})) -> None:
        """`meta`: what was `noted` where the run goes on."""
        self._waiting: deque[tuple[int, dict]] = deque()
        self._rows = list(meta.get("unlogged", ()))  # since the last window
        self.last: dict[str, float] = meta.get("last", {})
        self.skipped: int = meta.get("skipped", 0)  # steps in a row that updated nothing
        self.stop: tuple[int, int] | None = None  # why, and how many steps were taken before

    def add(self, step: int, values: dict) -> None:
        """Takes note of a step's metrics, and waits until few enough are on the device."""
        self._waiting.append((step, values))
        if len(self._waiting) > _AHEAD:
            self._settle()

    def noted(self) -> dict[str, Any]:
        """All that a checkpoint has to keep of it, which later steps do not change."""
        return {"unlogged": list(self._rows), "skipped": self.skipped, "last": self.last}

    def drain(self) -> None:
        """Waits for all."""
        while self._waiting:
            self._settle()

    def _settle(self) -> None:
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
        """Means over the steps since the last call that updated something, and how many did not."""
        rows, self._rows = self._rows, []
        good = [row for row in rows if not row["skipped"]]
        keys = sorted({key for row in good for key in row})
        means = {key: float(np.mean([row[key] for row in good if key in row])) for key in keys}
        return means | {"skipped": len(rows) - len(good)}


def _roll_back(run: Run, ahead: _Ahead, rollbacks: int) -> None:
    """Takes note that the phase goes back to its last checkpoint; `Diverged` if it may not."""
    run.stopped.clear()  # before the note: a kill in between repeats the steps that led here
    run.latest.wait()  # the last one may not be whole yet, or not for every host
    last, row = run.latest.latest_step() or 0, ahead.last
    scale = run.config.trouble.lr ** (rollbacks + 1)
    why = (
        f"the loss is {row['loss']} at step {row['step']}, its gradient's norm "
        f"{row['gradient_norm']}; {ahead.skipped} steps in a row updated nothing"
    )
    if jax.process_index() == 0:
        note = {"step": row["step"], "back_to": last, "lr_scale": scale, "why": why}
        jsonl.append(run.file("rollbacks.jsonl"), note)
    if rollbacks >= run.config.trouble.rollbacks:
        raise _diverged(run, why)
    say(f"{run.name}: {why}. Back to step {last}, with {scale:g} times the learning rate")


def _diverged(run: Run, why: str) -> Diverged:
    last, trouble = run.latest.latest_step(), run.config.trouble
    good = f"step {last} under {run.latest.directory}" if last else "none was written yet"
    more = len(jsonl.read(run.file("rollbacks.jsonl")))
    return Diverged(
        f"{why}. The last good checkpoint: {good}. Set trouble.rollbacks={more} to go on from "
        f"there with {trouble.lr} times the learning rate, or start again in a new --workdir with "
        "a lower one or a longer warm-up"
    )


def _same_groups(run: Run, meta: dict[str, Any]) -> None:
    """Refuses to go on with batch norms that take other images together."""
    before, now = meta.get("bn_group", run.phase.bn_group), run.phase.bn_group
    if before != now:
        raise ValueError(
            f"{run.name}: batch norms have taken the statistics of {before} images at a time so "
            f"far, and would take those of {now} on these devices; continue with "
            f"model.options.bn_group={before}, {run.name}.microbatches or devices that keep their "
            "number, or start again in a new --workdir"
        )
