"""A run: its checks, its phases, its end; `loop.py` holds the steps."""

import contextlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxrobust import models
from jaxrobust.config import VERSION, Config, NetworkSpec, completed, of_phase, phases, plain
from jaxrobust.data.sources import registry
from jaxrobust.runtime import pytorch
from jaxrobust.runtime.commandline.arguments import flat
from jaxrobust.runtime.devices import compilation, idle, in_use, sharding
from jaxrobust.runtime.devices.profiling import Profile
from jaxrobust.runtime.files import buckets, folders, jsonl, locks, provenance
from jaxrobust.runtime.processes import hosts, launch
from jaxrobust.runtime.text import patience, terminal
from jaxrobust.runtime.text.progress import say
from jaxrobust.training import build
from jaxrobust.training.run import (
    accuracies,
    best_weights,
    goodput,
    loop,
    metrics,
    phase_progress,
    splits,
    start_runs,
    trackers,
    warnings,
)
from jaxrobust.training.run.phase import PhaseRun, last, note_resumption, scored
from jaxrobust.training.run.stopping import StopSignals
from jaxrobust.training.update import attack_losses, objectives
from jaxrobust.training.update.step import TrainState
from jaxrobust.training.update.value_checks import must_be, one_of
from jaxrobust.types import Weights
from jaxrobust.weights import start as start_weights
from jaxrobust.weights.naming import compose
from jaxrobust.weights.store import hashes
from jaxrobust.weights.store.artifact import Network
from jaxrobust.weights.store.checkpoint import Checkpoints, abstract_state
from jaxrobust.weights.store.steps import steps
from jaxrobust.weights.trained import history, runs

# What may differ between two runs of the same command in one workdir without making it another run;
# records hold their own test settings.
_FREE: tuple[str, ...] = ("log.", "data.dir", "data.workers", "data.strict", "data.max_damaged")
_FREE += ("test.", "mesh.", "alarm.", "trouble.", "checkpoint.keep_every_epochs")
_FREE += ("model.options.bn_group",)  # checkpoints record how images were grouped


class PlannedPhase(NamedTuple):
    """A phase before it runs: its view of the config, its training split, its step."""

    config: Config
    source: registry.Source
    phase: build.Phase


def run(
    config: Any, workdir: Path, *, profile: Profile | None = None, draw: trackers.Draw | None = None
) -> None:
    """Train every phase of `config` that has epochs, then evaluate each on the test split.

    The same call on the same workdir continues where the last one stopped, on the same or other
    devices. If it starts from another run by config (`init.weights=run:CONFIG`), that run is
    trained first, unless finished. `profile` selects steps to trace, and `draw` returns the figures
    for `log.to`.
    Raises:
      ValueError: a mistake in the config, the data or the workdir, before anything compiles.
      Interrupted, Diverged, OSError: the run stopped; the message says how to continue.
    """
    first = start_runs.before(config, workdir)
    if first:  # report mistakes in this config before days of training the others
        hosts.together(
            lambda: check(warnings.fitted_batches(config, jax.device_count())[0], workdir)
        )
    for start in first:
        with start_runs.explained(start):
            _run(start.config, start.folder, draw=draw, otherwise=start_runs.OTHERWISE)
    otherwise = "give another --workdir (to train one run on several hosts, use --multihost)"
    _run(config, workdir, profile=profile, draw=draw, otherwise=otherwise)


def _run(
    config: Any,
    workdir: Path,
    *,
    profile: Profile | None = None,
    draw: trackers.Draw | None = None,
    otherwise: str,
) -> None:
    """Train one run; `otherwise`: what to do if another process is using its folder."""
    first_host = jax.process_index() == 0
    clock = goodput.Clock(workdir if first_host else None)
    config, fitted = warnings.fitted_batches(config, jax.device_count())
    values = plain(config)
    shared = {k: v for k, v in flat(values).items() if k not in ("data.dir", "data.workers")}
    hosts.agree(shared, problem="has a different config", remedy="Start all with the same command")
    compilation.use_persistent_cache(workdir.parent)  # before a new stem is drawn
    hosts.together(lambda: runs.remember_programs(workdir, config.phases))
    if jax.process_count() > 1:  # the other hosts may lack PyTorch
        _keep_programs(config, workdir)
    with patience.of("checking the config, its networks and its data", here=first_host):
        parts, data = hosts.together(lambda: check(config, workdir))
    hosts.agree(data, problem="has different data", remedy="Give every host the same data set")
    names = list(parts)
    first = names[0]
    # The origin of the network, if a user's function makes it.
    function = models.origin(parts[names[-1]].config.model.name)
    same = "Give every host the same"
    sha256 = function and function["sha256"]
    hosts.agree({"model.name": sha256}, problem="has a different file for the network", remedy=same)
    begun = hosts.first(bool(steps(workdir / first / "latest")))

    def first_weights(phase_config: Config) -> tuple[Network, dict] | None:
        warnings.check_start(phase_config, first)
        return start_weights.of_config(phase_config, workdir)

    with patience.of("reading the initial weights", here=first_host):
        start = hosts.together(lambda: None if begun else first_weights(parts[first].config))
    sha256 = None if start is None else start[1]["start_sha256"]
    hosts.agree({"init.weights": sha256}, problem="has different weights", remedy=same)
    with _alone(workdir, otherwise), clock:
        hosts.together(lambda: claim(workdir, values, data))
        _keep_programs(config, workdir)
        say(f"{config.model.name} on {config.data.name}, {in_use.devices()}, workdir {workdir}")
        for words in filter(None, (idle.accelerator(), launch.few_cores())):
            say(f"WARNING: {words}")
        if function:
            hosts.together(lambda: _noted(workdir / runs.FUNCTION, function))
            if other := runs.rewritten(workdir, function):
                say(other)
        if begun and (other := start_weights.changed(config, workdir)):
            say(other)
        for line in fitted:
            say(line)
        for line in warnings.lines({name: part.config for name, part in parts.items()}):
            say(line)
        params = parts[first].phase.abstract_state.params
        say(metrics.parameters(workdir, params, enabled=first_host))
        about = values | {
            "architecture": config.model.name,
            "parameters": sum(math.prod(array.shape) for array in params.values()),
            "commit": provenance.commit(),
            "workdir": buckets.address(workdir) or str(workdir.absolute()),
        }
        shown = trackers.named(config.log.to) if first_host else []
        with trackers.Trackers(workdir, shown, about, draw) as log:
            _phases(config, workdir, values, parts, start, profile, log, clock)


def _phases(
    config: Config,
    workdir: Path,
    values: dict,
    parts: dict[str, PlannedPhase],
    start: tuple[Network, dict] | None,
    profile: Profile | None,
    log: trackers.Trackers,
    clock: goodput.Clock,
) -> None:
    """Train and test; `start` is the first phase's start, None if it has begun."""
    steps_before = 0
    reached: dict[str, Weights] = {}  # the best weights of each phase, on the host, since
    weights = None if start is None else _start(*start, workdir)  # the next devices hold a part
    for name, (phase_config, source, phase) in parts.items():
        (workdir / name).mkdir(parents=True, exist_ok=True)  # hosts have theirs if in a bucket
        if source.classes and jax.process_index() == 0:  # other data go to the phase's folder
            folder = workdir if _data_of(phase_config) == _data_of(config) else workdir / name
            folder.mkdir(exist_ok=True)
            jsonl.replace(folder / runs.CLASSES, "".join(f"{name}\n" for name in source.classes))
        if reached:
            start_phase = phase_config[name].start or list(reached)[-1]
            weights = start_weights.handed_on(
                parts[start_phase].config, phase_config, name, reached[start_phase]
            )
        latest, best, stopped = (
            Checkpoints(workdir / name / kind) for kind in ("latest", "best", "stopped")
        )
        checkpoints = (latest, best, stopped)
        about = phase_config, workdir, name, phase, source, profile
        phase_run = PhaseRun(*about, *checkpoints, log, steps_before, clock)
        with jax.set_mesh(phase.mesh):
            step, best_weights = _run_phase(phase_run, weights)
            with clock.of("evaluating"):
                scores = accuracies.test(phase_run, values, step, best_weights)
            if scores:
                clock.reached(name, phase.total_steps, write=True)
                log.open()
                log.tested(name, phase.total_steps, steps_before, scores)
            reached[name] = jax.device_get(best_weights)
        steps_before += phase.total_steps
    if jax.process_index() == 0:
        terminal.show(accuracies.table(workdir))


def _keep_programs(config: Config, workdir: Path) -> None:
    """Save the programs of PyTorch modules on the first host, and let the others read them."""
    run_spec = NetworkSpec.of_config(config)
    specs = {workdir: run_spec}
    for name in phases(config):  # a phase with other classes or another size has its own
        if (spec := NetworkSpec.of_config(of_phase(config, name))) != run_spec:
            specs[workdir / name] = spec

    def keep() -> None:
        for folder, spec in specs.items():
            if jax.process_index() == 0 and pytorch.is_name(spec.name):
                pytorch.find("keep")(
                    folder / pytorch.FOLDER, spec.name, **spec.sizes(), **spec.options
                )

    if any(pytorch.is_name(spec.name) for spec in specs.values()):
        hosts.together(keep)
        hosts.together(lambda: runs.remember_programs(workdir, config.phases))


def _data_of(config: Config) -> str:
    keys = ("name", "dir", "train_split", "selection_split", "test_split", "classes")
    values = [config.data[key] for key in (*keys, "extra", "extra_split")]
    return json.dumps([*values, config.model.num_classes, config.model.in_channels])


def _start(start: Network, record: dict[str, Any], workdir: Path) -> Weights:
    if jax.process_index() == 0:
        jsonl.replace(workdir / history.START, json.dumps(record, indent=2) + "\n")
    say(f"starting from {record['where']}, sha256 {record['weights_sha256'][:12]}")
    for line in compose.summary(start):
        say(f"  {line}")
    return Weights(*jax.device_get((start.params, start.stats)))


def check(config: Config, workdir: Path) -> tuple[dict[str, PlannedPhase], dict[str, Any]]:
    """Build the phases to run and describe the data; reject whatever would fail later."""
    if bad := re.search(r"[\[\\\ud800-\udfff]", str(workdir.absolute())):
        raise ValueError(
            f"--workdir {str(workdir.absolute())!r}: Orbax loses checkpoint arrays if the path "
            f"contains {bad[0]!r}; name another folder"
        )
    names = phases(config)
    start_weights.check_phases(config, names)
    check_numbers(config)
    trackers.check(config.log.to, first=jax.process_index() == 0)
    parts: dict[str, PlannedPhase] = {}
    opened: dict[str, dict[str, registry.Source]] = {}
    described: dict[str, Any] = {}
    for name in names:
        phase_config = of_phase(config, name)
        check_numbers(phase_config)
        data = _data_of(phase_config)
        if data not in opened:
            opened[data] = _opened(phase_config)
            prefix = "" if data == _data_of(config) else f"{name}."
            for key, source in opened[data].items():
                described[f"{prefix}data.{key}"] = {
                    "records": len(source),
                    "files_sha256": source.files_sha256,
                    "ids_sha256": source.ids_sha256,
                    "classes": source.num_classes,
                    "classes_sha256": hashes.classes_sha256(source.classes),
                }
        attacks = objectives.named(phase_config[name].objective).attacks
        if attacks and (function := attack_losses.origin(phase_config.attack)):
            described[f"{name}.{attack_losses.KEY}"] = {"sha256": attack_losses.sha256(function)}
        source = opened[data]["train_split"]
        runs.check_classes(runs.classes_file(workdir, name), source)
        for key in ("selection_split", "test_split"):
            splits.check_preprocessing(phase_config, opened[data][key])
        phase = build.phase(phase_config, name, splits.examples(phase_config, name, source))
        for key in ("evaluation", "test"):
            build.divides(phase_config[key].batch_size, jax.device_count(), f"{key}.batch_size")
        best_weights.counter(phase_config, phase.mesh)
        build.evaluation(phase_config, phase.mesh, steps=phase_config.test.steps)
        build.probe(phase_config, name, phase)
        splits.batches(phase_config, name, source, 0).close()
        parts[name] = PlannedPhase(phase_config, source, phase)
    return parts, flat(described)


def _opened(config: Config) -> dict[str, registry.Source]:
    keys = ("train_split", "selection_split", "test_split")
    opened = {key: splits.opened(config, key) for key in keys}
    registry.same_classes(list(opened.values()))
    for key in keys[1:]:
        if sentence := registry.foreign_classes(opened["train_split"], opened[key]):
            say(f"WARNING: {sentence}")
    if more := splits.extra(config):
        opened["extra"] = more
    return opened


def check_numbers(config: Config) -> None:
    """Reject numbers in a config that are out of range."""
    lowest = {
        0: "evaluation.images test.images checkpoint.keep_every_epochs data.max_damaged mesh.fsdp "
        "alarm.every_steps trouble.skips trouble.rollbacks",
        1: "evaluation.every_epochs checkpoint.every_epochs alarm.images log.every_steps",
    }
    values, seed, lr = flat(plain(config)), config.seed, config.trouble.lr
    for low, keys in lowest.items():
        for key in keys.split():
            must_be(key, values[key], values[key] >= low, f"at least {low}")
    # JAX's seeds have 32 bits; the rest would be lost.
    must_be("seed", seed, 0 <= seed < 2**32, "from 0 to 2^32 - 1")
    must_be("trouble.lr", lr, 0 < lr <= 1, "above 0, at most 1")
    one_of("evaluation.weights", config.evaluation.weights, ("ema", "raw"))


@contextlib.contextmanager
def _alone(workdir: Path, otherwise: str) -> Iterator[None]:
    lock = locks.held(workdir / "lock", resource=f"workdir {workdir}", otherwise=otherwise)
    with contextlib.ExitStack() as stack:

        def take() -> None:
            if jax.process_index() != 0:  # the first process acts for all
                return
            with folders.writing("workdir", workdir):
                workdir.mkdir(parents=True, exist_ok=True)
                if not buckets.address(workdir):
                    folders.check_renames("workdir", workdir)
                stack.enter_context(lock)

        hosts.together(take)
        yield


def claim(workdir: Path, values: dict, data: dict[str, Any]) -> None:
    """Write the resolved config and a description of the data into a new workdir; reject the
    workdir of another run.
    """
    noted = _noted(workdir / "config.json", {"version": VERSION} | values)
    old = completed(runs.of_this_version(noted, workdir / "config.json"))
    old, new = _in_pixels(flat(old)), _in_pixels(flat(values))
    free = (*_FREE, *(f"{name}.microbatches" for name in values["phases"]))
    if differing := _differing(old, new, free=free):
        raise ValueError(
            f"{workdir} holds a run with a different config; give a new --workdir, or use the same "
            "values as that run:\n  " + "\n  ".join(differing)
        )
    if differing := _differing(_noted(workdir / "data.json", data), data):
        of_loss = all(attack_losses.KEY in line for line in differing)
        subject = f"the code of {attack_losses.KEY}" if of_loss else "the data"
        raise ValueError(
            f"{subject} has changed since the run in {workdir} began "
            f"({'; '.join(differing)}); restore it, or give a new --workdir"
        )


def _in_pixels(values: dict[str, Any]) -> dict[str, Any]:
    relative = values["attack.relative_step"]
    if relative is None:
        return values
    radii = values["attack.epsilon"]
    size = [relative * r for r in radii] if isinstance(radii, list) else relative * radii
    return values | {"attack.relative_step": None, "attack.step_size": size}


def _noted(path: Path, value: dict) -> dict:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"{content!r} is not a JSON object")
        return content
    except FileNotFoundError:
        if jax.process_index() == 0:
            jsonl.replace(path, json.dumps(value, indent=2) + "\n")
        return value
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it or its folder") from error


def _differing(old: dict, new: dict, free: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(free)
    ]


def _run_phase(run: PhaseRun, start: Weights | None) -> tuple[int, Weights]:
    weights = Weights(run.phase.abstract_state.params, run.phase.abstract_state.stats)
    weights = abstract_state(weights, sharding.replicated(run.phase.mesh))
    checkpoints, stop = (run.latest, run.best, run.stopped), StopSignals()
    with contextlib.ExitStack() as stack:
        for checkpoint in checkpoints:
            stack.enter_context(contextlib.closing(checkpoint))
        done = last(run)[1]
        ended = done == run.phase.total_steps and scored(run) == done
        if done is not None and not ended:  # a rollback starts earlier, and has its own note
            note_resumption(run, done)
        if not ended:
            run.trackers.open()
            shown = phase_progress.begun(
                run.name, done or 0, run.phase.total_steps, phases=run.config.phases
            )
            stack.enter_context(shown)
        while not ended:
            state, total = _state(run, start), run.phase.total_steps
            say(f"{run.name}: step {state.step} of {total}, {run.config[run.name].objective}")
            ended = loop.steps(run, state, stop)
        with run.clock.of("saving"):
            for checkpoint in checkpoints:
                checkpoint.wait()
            run.stopped.clear()
        step = run.best.latest_step()
        assert step is not None, "the last step of a phase is always evaluated"
        return step, run.best.restore(step, weights)


def _state(run: PhaseRun, start: Weights | None) -> TrainState:
    checkpoints, done = last(run)
    if done is not None:
        return checkpoints.restore(done, run.phase.abstract_state)
    key = jax.random.key(run.config.seed)
    if start is not None:  # stored, or from the previous phase; the average starts there too
        return run.phase.state_of(key, *start)
    program = compilation.program(f"{run.config.model.name}: first state", run.phase.abstract_state)
    with phase_progress.compiling(run.name, "the weight initialization", program):
        return jax.block_until_ready(run.phase.init(key))
