"""A run: its checks, its phases, its end; `loop.py` holds the steps."""

import contextlib
import json
from pathlib import Path
from typing import Any

import jax

from jaxrobust import build, compilation, initial, loop, metrics, scores, sharding
from jaxrobust.checkpoint import Checkpoints, abstract_state, disk_full
from jaxrobust.data import sources
from jaxrobust.evaluation import hosts
from jaxrobust.profiling import Profile
from jaxrobust.progress import say
from jaxrobust.step import TrainState, started_average

# What a workdir may change between two runs of the same command without becoming another run; a
# record carries its own test settings.
_FREE: tuple[str, ...] = ("log.", "data.dir", "data.workers", "data.strict", "data.max_damaged")
_FREE += ("test.", "mesh.", "alarm.", "trouble.", "pretrain.microbatches", "train.microbatches")
# Keys that runs of before do not have, and what they did.
_ADDED: dict[str, Any] = {"init.weights": None, "init.stem": "keep", "init.head": "keep"}
_ADDED |= {f"{phase}.b2": 0.95 for phase in loop.PHASES}
_ADDED |= {"data.classes": None, "data.preprocessing": None}
_ADDED |= {"attack.labels": "soft", "label_smoothing": None}
_ADDED |= {"mixup.mixup": None, "mixup.cutmix": None, "mixup.switch": 0.5, "mixup.group": 2}
_ADDED |= {"mixup.probability": 1.0, "erase.probability": None, "erase.noise": "normal"}
_ADDED |= {"attack.statistics": "running"}


def run(config: Any, workdir: Path, *, profile: Profile | None = None) -> None:
    """Trains every phase of `config` that has epochs, then evaluates each on the test split.

    The same call on the same workdir continues where the last one stopped, on these devices or
    others. `profile` says which steps to trace.
    Raises:
      ValueError: a mistake in the config, the data or the workdir, before anything compiles.
      Interrupted, Diverged, OSError: the run stopped; the message says how to go on.
    """
    phases = [name for name in loop.PHASES if config[name].epochs != 0]
    plain = json.loads(config.to_json())
    _agree(plain)
    source, built = check(config, phases, workdir)
    saved = (workdir / phases[0] / "latest").glob("*")
    begun = scores.first_host(any(path.name.isdigit() for path in saved))  # nothing half written
    start = None if begun else initial.of_config(config)
    claim(workdir, plain)
    if source.classes and jax.process_index() == 0:
        metrics.replace(workdir / scores.CLASSES, "".join(f"{name}\n" for name in source.classes))
    compilation.use_persistent_cache(workdir.parent / "xla-cache")
    say(f"{config.model.name} on {config.data.name}, {_device()}, workdir {workdir}")
    if begun and (other := initial.changed(config, workdir)):
        say(other)
    weights = None if start is None else _start(*start, workdir)
    for name in phases:
        latest, best = (Checkpoints(workdir / name / kind) for kind in ("latest", "best"))
        phase_run = loop.Run(config, workdir, name, built[name], source, latest, best, profile)
        with jax.set_mesh(built[name].mesh):
            step, best_weights = _run_phase(phase_run, weights)
            scores.test(config, workdir, plain, name, built[name], step, best_weights)
            # On the host: the next phase's devices hold but their part of the parameters.
            weights = step, jax.device_get(best_weights)
    if jax.process_index() == 0:
        print(scores.table(workdir), flush=True)


def _start(start: initial.Start, record, workdir) -> tuple[int, scores.Weights]:
    """Stored weights as if a phase before had reached them, after noting where they are from."""
    if jax.process_index() == 0:
        metrics.replace(workdir / initial.RECORD, json.dumps(record, indent=2) + "\n")
    say(f"starting from {record['where']}, sha256 {record['weights_sha256'][:12]}")
    for line in initial.summary(start):
        say(f"  {line}")
    return 0, scores.Weights(*jax.device_get((start.params, start.stats)))


def _agree(plain: dict) -> None:
    """Refuses hosts of different configs, whose steps would be neither's."""
    own = {k: v for k, v in _flat(plain).items() if k not in ("data.dir", "data.workers")}
    for process, theirs in enumerate(hosts.everyone(own)):
        words = process != jax.process_index() and hosts.differences(theirs, own)
        if words:
            raise ValueError(
                f"process {process} has another config than process {jax.process_index()}: {words}."
                " Start the same command on every host"
            )


def check(
    config, phases: list[str], workdir: Path
) -> tuple[sources.Source, dict[str, build.Phase]]:
    """The training split and the phases; refuses whatever would fail later."""
    if not phases:
        raise ValueError("pretrain.epochs and train.epochs are both 0: there is nothing to train")
    splits = [scores.open_split(config, f"{k}_split") for k in ("train", "selection", "test")]
    sources.same_classes(splits)
    scores.check_classes(workdir, splits[0])
    for split in splits[1:]:
        scores.check_preprocessing(config, split)
    source = splits[0]
    built = {name: build.phase(config, name, len(source)) for name in phases}
    for key in ("evaluation", "test"):
        build.divides(config[key].batch_size, jax.device_count(), f"{key}.batch_size")
        build.evaluation(config, built[phases[0]].mesh, steps=config[key].steps)
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
        "seed": 0,
    }
    for key, low in lowest.items():
        if (value := _flat(config.to_dict())[key]) < low:
            raise ValueError(f"{key}={value} must be at least {low}")
    if not 0 < config.trouble.lr <= 1:
        raise ValueError(f"trouble.lr={config.trouble.lr} must be above 0, at most 1")
    if config.evaluation.weights not in ("ema", "raw"):
        raise ValueError(f"evaluation.weights={config.evaluation.weights!r}; one of 'ema', 'raw'")
    metrics.check(tensorboard=config.log.tensorboard)
    for name in phases:
        build.probe(config, name, built[name])
        loop.batches(config, name, source, 0).close()
    return source, built


def _device() -> str:
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        flat |= {f"{prefix}{key}": value} if nested is None else nested
    return flat


def claim(workdir: Path, plain: dict) -> None:
    """Writes the resolved config into a new workdir; refuses one that holds another run."""
    path = workdir / "config.json"
    if not path.exists():
        if jax.process_index() == 0:
            try:
                workdir.mkdir(parents=True, exist_ok=True)
                metrics.replace(path, json.dumps(plain, indent=2) + "\n")
            except OSError as error:
                if disk_full(error):
                    raise
                raise ValueError(
                    f"cannot write to --workdir {workdir} ({error.strerror}); name a folder that "
                    "can be written"
                ) from error
        return
    try:
        old, new = _ADDED | _flat(json.loads(path.read_text())), _flat(plain)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, or --workdir") from error
    differing = [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(_FREE)
    ]
    if differing:
        raise ValueError(
            f"{workdir} holds a run of another config; give a new --workdir, or repeat that run's "
            "values:\n  " + "\n  ".join(differing)
        )


def _run_phase(run: loop.Run, start) -> tuple[int, scores.Weights]:
    """The best weights of a phase and their step, after training what is missing."""
    weights = scores.Weights(run.phase.abstract_state.params, run.phase.abstract_state.stats)
    weights = abstract_state(weights, sharding.replicated(run.phase.mesh))
    with contextlib.closing(run.latest), contextlib.closing(run.best):
        done = _done(run)
        ended = done == run.phase.total_steps and loop.scored(run, done)
        while not ended:
            state, total = _state(run, start), run.phase.total_steps
            say(f"{run.name}: step {state.step} of {total}, {run.config[run.name].objective}")
            ended = loop.steps(run, state)
        for checkpoints in (run.latest, run.best):
            checkpoints.wait()
        step = run.best.latest_step()
        assert step is not None, "the last step of a phase is always evaluated"
        return step, run.best.restore(step, weights)


def _done(run: loop.Run) -> int | None:
    """The step of the last checkpoint, for all hosts the first one's word."""
    step = run.latest.latest_step()
    step = scores.first_host(-1 if step is None else step)
    return None if step < 0 else step


def _state(run: loop.Run, start) -> TrainState:
    """The state to go on from: that of the last checkpoint, or the first."""
    if (done := _done(run)) is not None:
        return run.latest.restore(done, run.phase.abstract_state)
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
