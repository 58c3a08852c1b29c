"""A run: its checks, its phases, its end; `loop.py` holds the steps."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxrobust import models
from jaxrobust.config import PHASES, VERSION, Config
from jaxrobust.data import sources
from jaxrobust.runtime import compilation, hardware, hosts, jsonl, locks, sharding
from jaxrobust.runtime.profiling import Profile
from jaxrobust.runtime.progress import StopSignals, say
from jaxrobust.training import advice, build, loop, metrics, results, splits
from jaxrobust.training.phase import Run, last, scored
from jaxrobust.training.step import TrainState, started_average
from jaxrobust.types import Weights
from jaxrobust.weights import compose, hashes, runs
from jaxrobust.weights import start as start_weights
from jaxrobust.weights.checkpoint import Checkpoints, abstract_state, disk_full, steps

# What a workdir may change between two runs of the same command without becoming another run; a
# record carries its own test settings.
_FREE: tuple[str, ...] = ("log.", "data.dir", "data.workers", "data.strict", "data.max_damaged")
_FREE += ("test.", "mesh.", "alarm.", "trouble.", "pretrain.microbatches", "train.microbatches")
_FREE += ("model.options.bn_group",)  # checkpoints say which images were taken together


def run(config: Any, workdir: Path, *, profile: Profile | None = None) -> None:
    """Train every phase of `config` that has epochs, then evaluate each on the test split.

    The same call on the same workdir continues where the last one stopped, on these devices or
    others. `profile` says which steps to trace.
    Raises:
      ValueError: a mistake in the config, the data or the workdir, before anything compiles.
      Interrupted, Diverged, OSError: the run stopped; the message says how to go on.
    """
    phases = [name for name in PHASES if config[name].epochs != 0]
    plain = json.loads(config.to_json())
    own = {k: v for k, v in _flat(plain).items() if k not in ("data.dir", "data.workers")}
    hosts.agree(own, what="has another config", remedy="Start the same command on every host")
    source, built, data = hosts.together(lambda: check(config, phases, workdir))
    hosts.agree(data, what="has other data", remedy="Give every host the same data set")
    function = models.origin(config.model.name)  # who makes the network, where a user's does
    same = "Give every host the same"
    sha256 = function and function["sha256"]
    hosts.agree({"model.name": sha256}, what="has another file of the network", remedy=same)
    begun = hosts.first(bool(steps(workdir / phases[0] / "latest")))
    start = hosts.together(lambda: None if begun else start_weights.of_config(config))
    first = None if start is None else start[1]["start_sha256"]
    hosts.agree({"init.weights": first}, what="has other weights", remedy=same)
    with _alone(workdir):
        hosts.together(lambda: claim(workdir, plain, data))
        say(f"{config.model.name} on {config.data.name}, {hardware.devices()}, workdir {workdir}")
        if idle := hardware.left_idle():
            say(f"WARNING: {idle}")
        if function:
            hosts.together(lambda: _noted(workdir / runs.FUNCTION, function))
            if other := runs.rewritten(workdir, function):
                say(other)
        if begun and (other := start_weights.changed(config, workdir)):
            say(other)
        for line in advice.lines(config, phases[0], begun=bool(begun)):
            say(line)
        _phases(config, workdir, plain, source, built, start, profile)


def _phases(
    config,
    workdir: Path,
    plain: dict,
    source: sources.Source,
    built: dict[str, build.Phase],
    start: tuple[start_weights.Start, dict] | None,
    profile: Profile | None,
) -> None:
    """Train and test; `start` is what the first phase starts from, None where it has begun."""
    if source.classes and jax.process_index() == 0:
        jsonl.replace(workdir / runs.CLASSES, "".join(f"{name}\n" for name in source.classes))
    compilation.use_persistent_cache(workdir.parent)
    first = next(iter(built.values())).abstract_state.params
    say(metrics.parameters(workdir, first, enabled=jax.process_index() == 0))
    weights = None if start is None else _start(*start, workdir)
    for name in built:
        kept = [Checkpoints(workdir / name / kind) for kind in ("latest", "best", "stopped")]
        phase_run = Run(config, workdir, name, built[name], source, profile, *kept)
        with jax.set_mesh(built[name].mesh):
            step, best_weights = _run_phase(phase_run, weights)
            results.test(config, workdir, plain, name, built[name], step, best_weights)
            # On the host: the next phase's devices hold but their part of the parameters.
            weights = step, jax.device_get(best_weights)
    if jax.process_index() == 0:
        print(results.table(workdir), flush=True)


def _start(start: start_weights.Start, record, workdir) -> tuple[int, Weights]:
    """Return stored weights as if a phase before had reached them, after noting where they are
    from.
    """
    if jax.process_index() == 0:
        jsonl.replace(workdir / start_weights.RECORD, json.dumps(record, indent=2) + "\n")
    say(f"starting from {record['where']}, sha256 {record['weights_sha256'][:12]}")
    for line in compose.summary(start):
        say(f"  {line}")
    return 0, Weights(*jax.device_get((start.params, start.stats)))


def check(
    config: Config, phases: list[str], workdir: Path
) -> tuple[sources.Source, dict[str, build.Phase], dict[str, Any]]:
    """Return the training split, the phases, and what the data is; refuses whatever would fail
    later.
    """
    if not phases:
        raise ValueError("pretrain.epochs and train.epochs are both 0: there is nothing to train")
    if bad := re.search(r"[\[\\\ud800-\udfff]", str(workdir.absolute())):
        raise ValueError(
            f"--workdir {str(workdir.absolute())!r}: Orbax loses the arrays of checkpoints under a "
            f"path with {bad[0]!r}; name another folder"
        )
    keys = ("train_split", "selection_split", "test_split")
    opened = [splits.opened(config, key) for key in keys]
    sources.same_classes(opened)
    for split in opened[1:]:
        if sentence := sources.foreign_classes(opened[0], split):
            say(f"WARNING: {sentence}")
    runs.check_classes(workdir, opened[0])
    for split in opened[1:]:
        splits.check_preprocessing(config, split)
    source = opened[0]
    built = {name: build.phase(config, name, len(source)) for name in phases}
    for key in ("evaluation", "test"):
        build.divides(config[key].batch_size, jax.device_count(), f"{key}.batch_size")
        build.evaluation(config, built[phases[0]].mesh, steps=config[key].steps)
    _check_numbers(config)
    metrics.check(tensorboard=config.log.tensorboard)
    for name in phases:
        build.probe(config, name, built[name])
        splits.batches(config, name, source, 0).close()
    described = {f"data.{key}": _described(split) for key, split in zip(keys, opened, strict=True)}
    return source, built, _flat(described)


def _check_numbers(config) -> None:
    """Refuse numbers outside their range."""
    lowest = {
        "evaluation.images": 0,
        "test.images": 0,
        "evaluation.every_epochs": 1,
        "checkpoint.every_epochs": 1,
        "data.max_damaged": 0,
        "mesh.fsdp": 0,
        "alarm.every_steps": 0,
        "alarm.images": 1,
        "trouble.skips": 0,
        "trouble.rollbacks": 0,
        "log.every_steps": 1,
    }
    for key, low in lowest.items():
        if (value := _flat(config.to_dict())[key]) < low:
            raise ValueError(f"{key}={value} must be at least {low}")
    if not 0 <= config.seed < 2**32:  # of which JAX makes keys; the rest would be cut off
        raise ValueError(f"seed={config.seed} must be from 0 to 2^32 - 1")
    if not 0 < config.trouble.lr <= 1:
        raise ValueError(f"trouble.lr={config.trouble.lr} must be above 0, at most 1")
    if config.evaluation.weights not in ("ema", "raw"):
        raise ValueError(f"evaluation.weights={config.evaluation.weights!r}; one of 'ema', 'raw'")


def _described(source: sources.Source) -> dict[str, Any]:
    """Return what a split is, but its name and the content of its files."""
    return {
        "records": len(source),
        "files_sha256": source.files_sha256,
        "ids_sha256": source.ids_sha256,
        "classes": source.num_classes,
        "classes_sha256": hashes.classes_sha256(source.classes),
    }


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        flat |= {f"{prefix}{key}": value} if nested is None else nested
    return flat


@contextlib.contextmanager
def _alone(workdir: Path) -> Iterator[None]:
    """Make a workdir, and keep other runs out of it."""

    otherwise = "give another --workdir (the hosts of one run join with --multihost)"
    lock = locks.held(workdir / "lock", what=f"workdir {workdir}", otherwise=otherwise)
    with contextlib.ExitStack() as ours:

        def take() -> None:
            if jax.process_index() != 0:  # the first one does for all
                return
            try:
                workdir.mkdir(parents=True, exist_ok=True)
                ours.enter_context(lock)
            except OSError as error:
                if disk_full(error):
                    raise
                raise ValueError(
                    f"cannot write to --workdir {workdir} ({error.strerror}); name a folder that "
                    "can be written"
                ) from error

        hosts.together(take)
        yield


def claim(workdir: Path, plain: dict, data: dict[str, Any]) -> None:
    """Write the resolved config, and what the data is, into a new workdir.

    Raises:
      ValueError: the workdir holds another run, or one on other data.
    """
    noted = _noted(workdir / "config.json", {"version": VERSION} | plain)
    old = _in_pixels(_flat(runs.of_this_version(noted, workdir / "config.json")))
    new = _in_pixels(_flat(plain))
    if differing := _differing(old, new, free=_FREE):
        raise ValueError(
            f"{workdir} holds a run of another config; give a new --workdir, or repeat that run's "
            "values:\n  " + "\n  ".join(differing)
        )
    if differing := _differing(_noted(workdir / "data.json", data), data):
        raise ValueError(
            f"the data is not what the run in {workdir} began with ({'; '.join(differing)}); "
            "restore it, or give a new --workdir"
        )


def _in_pixels(flat: dict[str, Any]) -> dict[str, Any]:
    """Return a config whose attack's step is in pixels, however it was written."""
    relative = flat["attack.relative_step"]
    if relative is None:
        return flat
    size = relative * flat["attack.epsilon"]
    return flat | {"attack.relative_step": None, "attack.step_size": size}


def _noted(path: Path, value: dict) -> dict:
    """Return what a file of the workdir says; one that is not there yet is written."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"{found!r} is no JSON object")
        return found
    except FileNotFoundError:
        if jax.process_index() == 0:
            jsonl.replace(path, json.dumps(value, indent=2) + "\n")
        return value
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, or --workdir") from error


def _differing(old: dict, new: dict, free: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(free)
    ]


def _run_phase(run: Run, start) -> tuple[int, Weights]:
    """Return the best weights of a phase and their step, after training what is missing."""
    weights = Weights(run.phase.abstract_state.params, run.phase.abstract_state.stats)
    weights = abstract_state(weights, sharding.replicated(run.phase.mesh))
    checkpoints, stop = (run.latest, run.best, run.stopped), StopSignals()
    with contextlib.ExitStack() as stack:
        for kept in checkpoints:
            stack.enter_context(contextlib.closing(kept))
        done = last(run)[1]
        ended = done == run.phase.total_steps and scored(run) == done
        while not ended:
            state, total = _state(run, start), run.phase.total_steps
            say(f"{run.name}: step {state.step} of {total}, {run.config[run.name].objective}")
            ended = loop.steps(run, state, stop)
        for kept in checkpoints:
            kept.wait()
        run.stopped.clear()
        step = run.best.latest_step()
        assert step is not None, "the last step of a phase is always evaluated"
        return step, run.best.restore(step, weights)


def _state(run: Run, start) -> TrainState:
    """Return the state to go on from: that of the last checkpoint, or the first."""
    checkpoints, done = last(run)
    if done is not None:
        return checkpoints.restore(done, run.phase.abstract_state)
    state = run.phase.init(jax.random.key(run.config.seed))
    if start is not None:  # stored, or of the phase before; the average starts there too
        placed = jax.tree.map(lambda leaf: leaf.sharding, run.phase.abstract_state)
        on_devices = jax.jit(
            lambda params, stats: (params, stats, started_average(params, stats)),
            out_shardings=(placed.params, placed.stats, placed.ema),
        )
        params, stats, average = on_devices(*start[1])
        state = state._replace(params=params, stats=stats, ema=average)
    return state
