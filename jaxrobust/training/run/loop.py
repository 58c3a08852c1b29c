"""The steps of a phase: train, log, save, evaluate, stop together, roll back after trouble."""

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import jax

from jaxrobust.config import plain
from jaxrobust.data.sources import registry
from jaxrobust.runtime.devices import compilation, hardware, tpus
from jaxrobust.runtime.devices.profiling import PhaseTrace
from jaxrobust.runtime.files import provenance
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text.progress import say
from jaxrobust.training import build
from jaxrobust.training.run import metrics, splits
from jaxrobust.training.run.best_weights import selection
from jaxrobust.training.run.phase import PhaseRun, last, scored
from jaxrobust.training.run.phase_progress import Progress, compiling
from jaxrobust.training.run.stopping import Stops, StopSignals, Trouble
from jaxrobust.training.update import alarm, inner, objectives
from jaxrobust.training.update.step import TrainState, averaged
from jaxrobust.types import threats
from jaxrobust.weights.store.checkpoint import Checkpoints
from jaxrobust.weights.trained import kept


class Due(NamedTuple):
    """What to do before the next step."""

    logs: bool
    saves: bool
    keeps: bool
    evaluates: bool


class Every(NamedTuple):
    """How often a phase does each of these; the last step does all."""

    log_steps: int
    checkpoint_epochs: int
    evaluation_epochs: int
    steps_per_epoch: int
    total_steps: int
    keep_epochs: int = 0  # 0: never, not even at the end


def due(step: int, every: Every, *, start: int, saved: int, evaluated: int, copied: int = 0) -> Due:
    """Decide the actions after `step` steps, for a run that was resumed at `start`.

    A checkpoint, a copy or an evaluation stays due until done: if the step has no gradient, it
    happens at the first later step that does. `saved`, `evaluated`, `copied`: the last ones.
    """
    ends = step == every.total_steps

    def last(epochs: int) -> int:
        return step if ends else step - step % (epochs * every.steps_per_epoch)

    evaluates = last(every.evaluation_epochs) > evaluated
    keeps = every.keep_epochs > 0 and last(every.keep_epochs) > copied
    return Due(
        logs=step > start and (step % every.log_steps == 0 or ends),
        saves=evaluates or keeps or last(every.checkpoint_epochs) > saved,
        keeps=keeps,
        evaluates=evaluates,
    )


def steps(run: PhaseRun, state: TrainState, signals: StopSignals) -> bool:
    """Train from the last checkpoint's state to the end of the phase, including its evaluation.

    Returns whether the end was reached; False: continue from the last checkpoint, rolled back.
    """
    with _Loop(run, state, signals).opened() as loop, run.clock.of("training"):
        run.clock.reached(run.name, loop.start, write=True)
        while True:
            done = {"saved": loop.saved, "evaluated": loop.evaluated, "copied": loop.kept}
            now = due(loop.step, loop.every, start=loop.start, **done)
            # Steps run ahead of their results. Before anything is written, all of them must finish:
            # one may be the last that another host takes, or may have had no gradient, and nothing
            # may show that a stop or a rollback undoes.
            if now.saves or now.logs:
                loop.ahead.drain()
            if loop.ahead.stop:  # the same step on every host, and none has taken it
                raise loop.stopped(*loop.ahead.stop)
            if trouble := loop.troubled(now):
                loop.trouble.roll_back(*trouble)
                return False
            if now.logs:
                loop.log()
            if now.saves and loop.sound():  # a rollback may return to it
                loop.save(run.latest)  # before the evaluation, which may take long
                loop.saved = loop.step
                run.clock.reached(run.name, loop.step, write=True)
            if why := loop.stops.at_once():
                raise loop.stopped(why, loop.step)
            if now.keeps and loop.sound():
                loop.keep()
            if now.evaluates and loop.sound():  # a rollback would undo the state but not its score
                loop.evaluate()
            if loop.step == run.phase.total_steps:
                loop.heed()
                return True
            loop.take()


class _Loop:
    """What changes from step to step, and the parts with their own lifetime."""

    write: metrics.Write
    progress: Progress
    stream: Any
    trace: PhaseTrace

    def __init__(self, run: PhaseRun, state: TrainState, signals: StopSignals) -> None:
        config, phase = run.config, run.phase
        self.run, self.state, self.signals, self.stops = run, state, signals, Stops(signals)
        self.start = self.step = int(state.step)
        checkpoints, done = last(run)
        self.meta: dict[str, Any] = checkpoints.meta(done) if done else {"examples_consumed": 0}
        same_groups(run, self.meta)
        if checkpoints is not run.stopped:  # then there is a good one to return to
            evaluates(run, state)
        self.trouble, self.ahead = Trouble(run), metrics.Ahead(self.meta)
        self.every = Every(
            log_steps=config.log.every_steps,
            checkpoint_epochs=config.checkpoint.every_epochs,
            evaluation_epochs=config.evaluation.every_epochs,
            steps_per_epoch=phase.steps_per_epoch,
            total_steps=phase.total_steps,
            keep_epochs=config.checkpoint.keep_every_epochs,
        )
        self.compiled, self.probe = _compiled(run, self.start)
        self.select = selection(run, self.heed)
        self.damage = splits.damage(config, run.workdir, run.source)
        self.batch: Any = None
        self.dead = ""  # the last warning about channels
        self.saved, self.evaluated = hosts.first(run.latest.latest_step() or 0), 0
        self.kept = hosts.first(max(kept.steps_of(run.workdir, run.name), default=0))
        self.control = cache(self._control)

    def _control(self, stop: int, epsilon_share: float) -> Any:
        scales = {"lr_scale": self.trouble.lr_scale, "epsilon_share": epsilon_share}
        return build.control(self.run.phase.mesh, stop=stop, **scales)

    def _epsilon_share(self, step: int) -> float:
        attack, steps = self.run.config.attack, self.run.phase.steps_per_epoch
        return inner.share(step, steps, attack.warmup_epochs, attack.delay_epochs)

    @contextlib.contextmanager
    def opened(self) -> Iterator["_Loop"]:
        run, config, name = self.run, self.run.config, self.run.name
        chip = hardware.chip(jax.devices()[0].device_kind)
        with contextlib.ExitStack() as stack:
            self.write = metrics.writer(run, self.start, enabled=jax.process_index() == 0)
            progress = Progress(
                config,
                name,
                self.step,
                run.phase.total_steps,
                flops_per_image=build.flops_per_image(config, name) if chip else None,
                chip_hours=self.meta.get("chip_hours", 0.0),
                times=run.clock,
            )
            self.progress = stack.enter_context(progress)
            batches = splits.batches(config, name, run.source, self.meta["examples_consumed"])
            self.stream = stack.enter_context(contextlib.closing(batches))
            trace = PhaseTrace(run.profile, run.workdir / "profile" / name, self.step)
            self.trace = stack.enter_context(trace)
            stack.enter_context(self.signals)
            self.evaluated = scored(run)  # after the writer has removed lines after the start
            yield self

    def sound(self) -> bool:
        """Return whether a rollback may return here: not after steps without a gradient."""
        return not self.ahead.skipped or self.step == self.run.phase.total_steps

    def troubled(self, now: Due) -> tuple[int, str] | None:
        """Return the step to go back to and the reason; None: the run may continue."""
        if why := self.trouble.skipped(self.ahead):
            return int(self.ahead.last["step"]), why
        if not (now.saves or now.keeps or now.evaluates):
            return None
        norms = alarm.of_norms(self.state.stats)
        if norms.dead and norms.dead != self.dead:
            say(f"{self.run.name}: WARNING at step {self.step}: {norms.dead}")
        self.dead = norms.dead
        return (self.step, f"at step {self.step} {norms.broken}") if norms.broken else None

    def log(self) -> None:
        name, row = self.run.name, self.ahead.window()
        row["damaged_images"] = len(self.damage.known) + hosts.total(len(self.damage.new))
        row["lr"] = float(self.run.phase.schedule(self.step - 1)) * self.trouble.lr_scale
        attack = self.run.config.attack
        if inner.grows(attack) and objectives.named(self.run.config[name].objective).attacks:
            share, balls = self._epsilon_share(self.step - 1), threats(attack)
            names = [f"_{ball.norm}" for ball in balls] if len(balls) > 1 else [""]
            grown = zip(names, balls, strict=True)
            row |= {f"epsilon{name}": ball.epsilon * share for name, ball in grown}
        for sentence in alarm.warnings(row) if "alarm_loss" in row else ():
            say(f"{name}: WARNING up to step {self.step}: {sentence}")
        shown = self.progress.show(self.step, row) if "loss" in row else {}
        self.write(self.step, row | shown)

    def save(self, checkpoints: Checkpoints) -> None:
        config, name = self.run.config, self.run.name
        about = {
            "examples_consumed": self.step * config[name].batch_size,
            "phase": name,
            "bn_group": self.run.phase.bn_group,
            "chip_hours": self.progress.chip_hours(),
            "config": plain(config),
            "versions": provenance.versions(),
        }
        with self.run.clock.of("saving"):
            checkpoints.save(self.step, self.state, about | self.ahead.noted())

    def keep(self) -> None:
        """Keep a copy of both weights; rollbacks do not go back further."""
        both = kept.Kept(self.state.params, self.state.stats, *averaged(self.state))
        length = self.run.phase.steps_per_epoch
        with self.run.clock.of("saving"):
            self.run.latest.wait()  # two writers at once would confuse their host barriers
            kept.keep(self.run.workdir, self.run.name, self.step, both, steps_per_epoch=length)
        self.kept = self.step

    def heed(self) -> None:
        """Stop where no further step can tell all hosts to: in an evaluation, at the end."""
        if why := self.stops.now():
            raise self.stopped(why, self.step)

    def evaluate(self) -> None:
        """Evaluate, and write the line that `scored` looks for."""
        with self.run.clock.of("evaluating"):
            self.write(self.step, self.select(self.step, self.state))
            self.run.trackers.pictures(self.step)
        self.run.clock.reached(self.run.name, self.step, write=True)
        self.evaluated = self.step
        self.progress.resume(self.step)

    def take(self) -> None:
        try:
            with self.progress.waiting():
                self.batch = self.batch if self.stops.failure else next(self.stream)
            self.damage.add(self.batch.damaged)
        except registry.DataError as error:
            self.batch = self.batch or splits.blank(self.run)
            if why := self.stops.failed(error):
                raise self.stopped(why, self.step) from error
        control = self.control(self.stops.to_tell(), self._epsilon_share(self.step))
        images = splits.device_batch(self.run.phase.mesh, self.batch)
        self.state, values = self.compiled(self.state, images, control)
        self.step += 1
        self.run.clock.reached(self.run.name, self.step)
        self.progress.dispatched(self.step, values)
        if self.probe and self.step % self.run.config.alarm.every_steps == 0:
            values |= self.probe(self.state, images, control)
        self.ahead.add(self.step, values)
        if self.trace.dispatched(self.step, values):
            self.progress.resume(self.step)

    def stopped(self, why: int, step: int) -> Exception:
        run, self.step = self.run, step
        self.ahead.drain()
        run.clock.reached(run.name, step)
        with run.clock.of("saving"):
            run.latest.wait()
            is_sound = self.sound() and not alarm.of_norms(self.state.stats).broken
            self.save(run.latest if is_sound else run.stopped)
            run.stopped.wait()
            run.latest.wait()
        text = (
            f"stopped after step {step} of {run.phase.total_steps}, saved in {run.workdir}; run "
            "the same command to continue"
        )
        if self.ahead.skipped:
            text += f" (the last {self.ahead.skipped} steps had no finite gradient)"
        return self.stops.exception(why, text)


def _compiled(run: PhaseRun, start: int) -> tuple[Any, Any]:
    config, name, phase = run.config, run.name, run.phase
    arguments = build.abstract_arguments(config, name, phase)
    program = compilation.program(f"{config.model.name}: step of {name}", *arguments)
    with compiling(name, "the step", program, always=True):
        step, seconds, hit = tpus.compile_timed(phase.step, *arguments)
    say(f"{name}: step compiled in {seconds:.1f} s (compilation cache {'hit' if hit else 'miss'})")
    probe, every = build.probe(config, name, phase), config.alarm.every_steps
    if probe and start // every < phase.total_steps // every:
        program = compilation.program(f"{config.model.name}: alarm of {name}", *arguments)
        with compiling(name, "the alarm", program):
            probe, seconds, _ = tpus.compile_timed(probe, *arguments)
        say(f"{name}: alarm compiled in {seconds:.1f} s, runs every {every} steps")
    return step, probe


def evaluates(run: PhaseRun, state: TrainState) -> None:
    """Refuse to resume with running statistics that make every evaluation meaningless."""
    if broken := alarm.of_norms(state.stats).broken:
        step = int(state.step)
        where = f"its checkpoint at step {step}" if step else "the weights it starts from"
        remedy = "start again in a new --workdir" if step else "start from other weights"
        raise ValueError(
            f"{run.name}: in {where}, {broken}, so an evaluation would be meaningless; {remedy}"
        )


def same_groups(run: PhaseRun, meta: dict[str, Any]) -> None:
    """Refuse to resume with batch norms over groups of another size."""
    old, now = meta.get("bn_group", run.phase.bn_group), run.phase.bn_group
    if old != now:
        raise ValueError(
            f"{run.name}: so far, batch norms have computed statistics over {old} images at a "
            f"time, but on these devices they would use {now}. Set model.options.bn_group={old}, "
            f"change {run.name}.microbatches or the devices to restore {old}, or start again in a "
            "new --workdir"
        )
