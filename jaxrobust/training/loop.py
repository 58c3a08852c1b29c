"""The steps of a phase: take, log, save, evaluate, stop together, go back after trouble."""

import contextlib
import json
import math
import signal
from collections import deque
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust.data import loading, pipeline, sources
from jaxrobust.evaluation import records
from jaxrobust.runtime import compilation, hardware, sharding
from jaxrobust.runtime.profiling import Profile, Trace
from jaxrobust.runtime.progress import Progress, StopSignals, say
from jaxrobust.training import alarm, build, metrics, results
from jaxrobust.training.step import TrainState, averaged
from jaxrobust.types import Batch
from jaxrobust.weights.checkpoint import Checkpoints

PHASES = ("pretrain", "train")
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


class Run(NamedTuple):
    """One phase of a run: what does not change from step to step."""

    config: Any
    workdir: Path
    name: str
    phase: build.Phase
    source: sources.Source
    profile: Profile | None
    latest: Checkpoints  # to go back to after trouble
    best: Checkpoints
    stopped: Checkpoints  # of a stop in trouble, behind the latest

    def file(self, name: str) -> Path:
        """A file of this phase."""
        return self.workdir / self.name / name


def last(run: Run) -> tuple[Checkpoints, int | None]:
    """Where to go on from: which checkpoints, and their step; None: there is none.

    For all hosts the first one's word.
    """
    both = (run.latest, run.stopped)
    steps = [results.first_host(-1 if (k := c.latest_step()) is None else k) for c in both]
    which = int(steps[1] > steps[0])
    return both[which], None if steps[which] < 0 else steps[which]


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
    went_back = metrics.read(run.file("rollbacks.jsonl"))
    rollbacks = results.first_host(len(went_back))
    if rollbacks > config.trouble.rollbacks:
        raise _diverged(run, went_back[-1]["why"] if went_back else "another host went back")
    arguments = build.abstract_arguments(config, name, phase)
    step_fn, seconds, hit = compilation.compiled(phase.step, *arguments)
    say(f"{name}: step compiled in {seconds:.1f} s (compilation cache {'hit' if hit else 'miss'})")
    select, ahead, failure = _selection(run), _Ahead(meta), None
    probe, looks_every = build.probe(config, name, phase), config.alarm.every_steps
    if probe and start // looks_every < total // looks_every:
        probe, seconds, _ = compilation.compiled(probe, *arguments[:2])
        say(f"{name}: alarm compiled in {seconds:.1f} s, looks every {looks_every} steps")
    damage = results.damage(config, run.workdir, run.source)
    batch: Any = None
    saved = results.first_host(latest.latest_step() or 0)

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
            hosts = "" if alone else "; the other hosts stop as well"
            return BadData(f"{failure}{hosts}. Repair the data first: {text}")
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
        contextlib.closing(batches(config, name, run.source, meta["examples_consumed"])) as stream,
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
                found["damaged_images"] = len(damage.known) + results.over_hosts(len(damage.new))
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
                if why := results.most_of_hosts(stop.asked):  # too late for a step's orders
                    raise stopped(why)
                return True
            try:
                with progress.waiting():
                    batch = batch if failure else next(stream)
                damage.meet(batch.damaged)
            except sources.DataError as error:
                failure, batch = error, batch or _blank(run)
                if alone:
                    raise stopped(_DATA) from error
            told = orders(0 if alone else _DATA if failure else stop.asked)
            images = device_batch(phase.mesh, batch)
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
        metrics.append(run.file("rollbacks.jsonl"), note)
    if rollbacks >= run.config.trouble.rollbacks:
        raise _diverged(run, why)
    say(f"{run.name}: {why}. Back to step {last}, with {scale:g} times the learning rate")


def _diverged(run: Run, why: str) -> Diverged:
    last, trouble = run.latest.latest_step(), run.config.trouble
    good = f"step {last} under {run.latest.directory}" if last else "none was written yet"
    more = len(metrics.read(run.file("rollbacks.jsonl")))
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


def batches(config, name: str, source: sources.Source, start: int) -> pipeline.Batches:
    """This process' part of the training stream of a phase, from a position on."""
    return pipeline.train_batches(
        source,
        batch_size=config[name].batch_size,
        seed=config.seed + PHASES.index(name),
        augmentation=config.data.augmentation,
        image_size=config.model.image_size,
        start=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.data.workers,
        strict=config.data.strict,
    )


def device_batch(mesh, batch) -> Batch:
    """The global batch, from this process' part of it."""
    return Batch(*sharding.global_arrays(mesh, (batch.images, batch.labels)))


def _blank(run: Run):
    """Images for a step that no host takes."""
    whole = build.abstract_batch(run.config, run.name)
    rows = len(whole.images) // jax.process_count()
    images, labels = (np.zeros((rows, *x.shape[1:]), x.dtype) for x in whole)
    return loading.TrainBatch(images, labels, np.full(rows, -1, np.int32))


def _selection(run: Run):
    """`select(step, state) -> dict`: evaluates on the selection split, keeps the best weights."""
    config, name, phase, latest, best = run.config, run.name, run.phase, run.latest, run.best
    settings, source = config.evaluation, results.open_split(config, "selection_split")
    evaluate = build.evaluation(config, phase.mesh, steps=settings.steps)
    meets = None if config.data.strict else results.damage(config, run.workdir, source)
    read = {"preprocessing": config.data.preprocessing, "meets": meets}
    metric = "clean" if config[name].objective == "clean" else "robust"

    def select(step: int, state: TrainState) -> dict[str, float]:
        raw = state.params, state.stats
        chosen = averaged(state) if settings.weights == "ema" else raw
        weights = results.Weights(*jax.device_put(chosen, sharding.replicated(phase.mesh)))
        reached = results.count(evaluate, weights, source, settings, config, phase.mesh, **read)
        say(
            f"{name}: step {step}, selection split: clean {reached['clean']:.1%}, "
            f"robust {reached['robust']:.1%}"
        )
        latest.wait()  # two writers at once mix up their meetings of hosts
        before = best.latest_step()
        if before is None or reached[metric] >= best.meta(before)[metric]:
            best.save(step, weights, reached)
            best.wait()
        if jax.process_index() == 0:  # a kill may have come before the line in metrics.jsonl
            file = run.file("selection.jsonl")
            rows = [r for r in metrics.read(file) if r["step"] < step] + [{"step": step} | reached]
            metrics.replace(file, "".join(json.dumps(row) + "\n" for row in rows))
        if metric == "robust" and (sentence := _overfitting(run)):
            say(f"{name}: WARNING: {sentence}")
        return {f"selection_{key}": value for key, value in reached.items()}

    return select


def _overfitting(run: Run) -> str | None:
    """What `alarm.overfitting` says of the evaluations so far; on the first process."""
    scored = metrics.read(run.file("selection.jsonl"))
    logged = [m for m in metrics.read(run.workdir / "metrics.jsonl") if m["phase"] == run.name]
    since, training = 0, []
    for row in scored:
        between = [
            m["robust"] for m in logged if since < m["step"] <= row["step"] and "robust" in m
        ]
        training.append(float(np.mean(between)) if between else math.nan)
        since = row["step"]
    images = scored[-1]["images"] if scored else 1
    return alarm.overfitting([row["robust"] for row in scored], training, images=images)


def scored(run: Run) -> int:
    """The last step of the phase that was evaluated on the selection split; 0: none was.

    Or the best weights are gone, so that it has to be done again.
    """
    rows = metrics.read(run.workdir / "metrics.jsonl")
    here = [m["step"] for m in rows if m["phase"] == run.name and "selection_robust" in m]
    kept = run.best.latest_step() is not None
    return results.first_host(max(here, default=0) if kept else 0)
