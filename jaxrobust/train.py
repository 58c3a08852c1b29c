"""The loop: restore, step, log, save, evaluate."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrobust import build, compilation, initial, metrics, scores, sharding
from jaxrobust.checkpoint import Checkpoints, abstract_state, disk_full
from jaxrobust.data import pipeline, sources
from jaxrobust.progress import Progress, StopSignals, say
from jaxrobust.step import TrainState, averaged, started_average
from jaxrobust.types import Batch

# What a workdir may change between two runs of the same command without becoming another run; a
# record carries its own test settings.
_FREE = ("log.", "data.dir", "data.workers", "data.strict", "data.max_damaged", "test.")
_PHASES = ("pretrain", "train")
_AHEAD = 2  # steps that may wait on the device for their turn, each with its batch
# Keys that runs of before do not have, and what they did.
_ADDED: dict[str, Any] = {"init.weights": None, "init.stem": "keep", "init.head": "keep"}
_ADDED |= {f"{phase}.b2": 0.95 for phase in _PHASES}
_ADDED |= {"data.classes": None, "data.preprocessing": None}
_ADDED |= {"attack.labels": "soft", "label_smoothing": None}
_ADDED |= {"mixup.mixup": None, "mixup.cutmix": None, "mixup.switch": 0.5, "mixup.group": 2}
_ADDED |= {"mixup.probability": 1.0, "erase.probability": None, "erase.noise": "normal"}


class Interrupted(Exception):
    """Ctrl-C or SIGTERM; everything is saved."""


class Diverged(Exception):
    """The loss is not finite."""


def run(config: Any, workdir: Path) -> None:
    """Trains every phase of `config` that has epochs, then evaluates each on the test split.

    The same call on the same workdir continues where the last one stopped.
    Raises:
      ValueError: a mistake in the config, the data or the workdir, before anything compiles.
      Interrupted, Diverged, OSError: the run stopped; the message says how to go on.
    """
    phases = [name for name in _PHASES if config[name].epochs != 0]
    source, built = check(config, phases, workdir)
    begun = scores.first_host(any((workdir / phases[0] / "latest").glob("[0-9]*")))
    start = None if begun else initial.of_config(config)
    plain = json.loads(config.to_json())
    claim(workdir, plain)
    if source.classes and jax.process_index() == 0:
        metrics.replace(workdir / scores.CLASSES, "".join(f"{name}\n" for name in source.classes))
    compilation.use_persistent_cache()
    say(f"{config.model.name} on {config.data.name}, {_device()}, workdir {workdir}")
    if begun and (other := initial.changed(config, workdir)):
        say(other)
    weights = None if start is None else _start(*start, workdir, built[phases[0]].mesh)
    for name in phases:
        with jax.set_mesh(built[name].mesh):
            weights = _run_phase(config, workdir, name, built[name], source, weights)
            scores.test(config, workdir, plain, name, built[name], *weights)
    if jax.process_index() == 0:
        print(scores.table(workdir), flush=True)


def _start(start: initial.Start, record, workdir, mesh) -> tuple[int, scores.Weights]:
    """Stored weights as if a phase before had reached them, after noting where they are from."""
    if jax.process_index() == 0:
        metrics.replace(workdir / initial.RECORD, json.dumps(record, indent=2) + "\n")
    say(f"starting from {record['where']}, sha256 {record['weights_sha256'][:12]}")
    for line in initial.summary(start):
        say(f"  {line}")
    arrays = (start.params, start.stats)
    return 0, scores.Weights(*jax.device_put(arrays, sharding.replicated(mesh)))


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
        "log.every_steps": 1,
        "seed": 0,
    }
    for key, low in lowest.items():
        if (value := _flat(config.to_dict())[key]) < low:
            raise ValueError(f"{key}={value} must be at least {low}")
    if config.evaluation.weights not in ("ema", "raw"):
        raise ValueError(f"evaluation.weights={config.evaluation.weights!r}; one of 'ema', 'raw'")
    metrics.check(tensorboard=config.log.tensorboard)
    for name in phases:
        _batches(config, name, source, 0).close()
    return source, built


def _batches(config, phase: str, source: sources.Source, start: int) -> pipeline.Batches:
    """This process' part of the training stream of a phase, from a position on."""
    return pipeline.train_batches(
        source,
        batch_size=config[phase].batch_size,
        seed=config.seed + _PHASES.index(phase),
        augmentation=config.data.augmentation,
        image_size=config.model.image_size,
        start=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.data.workers,
        strict=config.data.strict,
    )


def _global(mesh, batch) -> Batch:
    return Batch(*sharding.global_arrays(mesh, (batch.images, batch.labels)))


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


def _run_phase(config, workdir, name, phase, source, start) -> tuple[int, scores.Weights]:
    """The best weights of a phase and their step, after training what is missing."""
    latest, best = (Checkpoints(workdir / name / kind) for kind in ("latest", "best"))
    with contextlib.closing(latest), contextlib.closing(best):
        abstract = abstract_state(phase.abstract_state, sharding.replicated(phase.mesh))
        done = latest.latest_step()
        if done is not None:
            state = latest.restore(done, abstract)
        else:
            state = phase.init(jax.random.key(config.seed))
            if start is not None:  # stored, or of the phase before; the average starts there too
                _, (params, stats) = start
                average = started_average(params, stats)
                state = state._replace(params=params, stats=stats, ema=average)
        if done != phase.total_steps or not _scored(workdir, name, done):
            say(f"{name}: step {done or 0} of {phase.total_steps}, {config[name].objective}")
            _steps(config, workdir, name, phase, state, latest, best, source)
        for checkpoints in (latest, best):
            checkpoints.wait()
        step = best.latest_step()
        assert step is not None, "the last step of a phase is always evaluated"
        return step, best.restore(step, scores.Weights(abstract.params, abstract.stats))


def _steps(config, workdir, name, phase, state: TrainState, latest, best, source) -> None:
    """From the state's step to the end of the phase, its last evaluation included."""
    p, epoch, start = config[name], phase.steps_per_epoch, int(state.step)
    step = start
    step_fn, seconds, hit = compilation.compiled(
        phase.step, phase.abstract_state, build.abstract_batch(config, name)
    )
    say(f"{name}: step compiled in {seconds:.1f} s (compilation cache {'hit' if hit else 'miss'})")
    select = _selection(config, workdir, name, phase, latest, best)
    damage = scores.damage(config, workdir, source)
    consumed = latest.meta(start)["examples_consumed"] if start else 0
    window: list[tuple[int, dict]] = []  # metrics still on the device

    def save():
        _check_finite(window, latest)
        latest.save(step, state, {"examples_consumed": step * p.batch_size, "phase": name})

    def due(epochs: int) -> bool:
        return step > 0 and (step == phase.total_steps or step % (epochs * epoch) == 0)

    with (
        metrics.writer(
            workdir,
            phase=name,
            start=start,
            tensorboard=config.log.tensorboard,
            enabled=jax.process_index() == 0,
        ) as write,
        Progress(name, step, phase.total_steps, p.batch_size, config.data.workers) as progress,
        contextlib.closing(_batches(config, name, source, consumed)) as batches,
        StopSignals() as stop,
    ):
        while True:
            evaluates = due(config.evaluation.every_epochs) and not _scored(workdir, name, step)
            if evaluates or (due(config.checkpoint.every_epochs) and step != start):
                save()  # before the evaluation, which may take long
            if _all_stop(stop.asked, step % config.log.every_steps == 0):
                save()
                latest.wait()
                raise Interrupted(
                    f"stopped after step {step} of {phase.total_steps}, saved under {workdir}; "
                    "the same command continues there"
                )
            if evaluates:
                write(step, select(step, state))
                progress.resume(step)
            if step == phase.total_steps:
                return
            try:
                with progress.waiting():
                    batch = next(batches)
                damage.meet(batch.damaged)
            except sources.DataError as error:
                if jax.process_count() > 1:  # the others are in a step, and cannot save with us
                    raise sources.DataError(
                        f"{error}. The other hosts stop as well; once the data is whole, the same "
                        "command continues at the last checkpoint"
                    ) from error
                save()
                latest.wait()
                raise sources.DataError(
                    f"{error}. Step {step} is saved under {workdir}: once the data is whole, the "
                    "same command continues there"
                ) from error
            state, values = step_fn(state, _global(phase.mesh, batch))
            progress.dispatched(values)
            step += 1
            window.append((step, values))
            if len(window) > _AHEAD:  # else batches pile up on the device
                jax.block_until_ready(window[-1 - _AHEAD][1])
            if step % config.log.every_steps == 0 or step == phase.total_steps:
                means = _means(_check_finite(window, latest))
                means["lr"] = float(phase.schedule(step - 1))
                window.clear()
                means["damaged_images"] = len(damage.known) + _over_hosts(len(damage.new))
                write(step, means | progress.show(step, means))


def _selection(config, workdir, name, phase, latest: Checkpoints, best: Checkpoints):
    """`select(step, state) -> dict`: evaluates on the selection split, keeps the best weights."""
    settings, source = config.evaluation, scores.open_split(config, "selection_split")
    evaluate = build.evaluation(config, phase.mesh, steps=settings.steps)
    meets = None if config.data.strict else scores.damage(config, workdir, source)
    read = {"preprocessing": config.data.preprocessing, "meets": meets}
    metric = "clean" if config[name].objective == "clean" else "robust"

    def select(step: int, state: TrainState) -> dict[str, float]:
        raw = state.params, state.stats
        weights = scores.Weights(*(averaged(state) if settings.weights == "ema" else raw))
        reached = scores.count(evaluate, weights, source, settings, config, phase.mesh, **read)
        say(
            f"{name}: step {step}, selection split: clean {reached['clean']:.1%}, "
            f"robust {reached['robust']:.1%}"
        )
        latest.wait()  # two writers at once mix up their meetings of hosts
        before = best.latest_step()
        if before is None or reached[metric] >= best.meta(before)[metric]:
            best.save(step, weights, reached)
            best.wait()
        if jax.process_index() == 0:  # last: without this line the evaluation is repeated
            metrics.append(_selection_file(workdir, name), {"step": step} | reached)
        return {f"selection_{key}": value for key, value in reached.items()}

    return select


def _selection_file(workdir: Path, name: str) -> Path:
    return workdir / name / "selection.jsonl"


def _scored(workdir: Path, name: str, step: int | None) -> bool:
    """Whether a step was evaluated on the selection split."""
    return scores.first_host(
        any(row["step"] == step for row in metrics.read(_selection_file(workdir, name)))
    )


def _all_stop(asked: bool, meeting: bool) -> bool:
    """Whether to stop now: several hosts decide together, and only where they meet anyway."""
    if jax.process_count() == 1:
        return asked
    return meeting and bool(multihost_utils.process_allgather(np.array(asked)).any())


def _over_hosts(count: int) -> int:
    """The sum of what each host counted."""
    if jax.process_count() == 1:
        return count
    return int(multihost_utils.process_allgather(np.array(count)).sum())


def _check_finite(window: list, checkpoints: Checkpoints) -> list[dict]:
    """The window's metrics on the host; raises on the first loss that is not finite."""
    values = jax.device_get([v for _, v in window])
    for (step, _), row in zip(window, values, strict=True):
        if not (math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"])):
            last = checkpoints.latest_step()
            good = f"step {last} under {checkpoints.directory}" if last else "none was written yet"
            raise Diverged(
                f"the loss is {row['loss']} at step {step}, its gradient's norm "
                f"{row['gradient_norm']}. The last good checkpoint: {good}. "
                "Lower the learning rate or lengthen the warm-up, in a new --workdir: running the "
                "same command again repeats the same steps"
            )
    return values


def _means(values: list[dict]) -> dict[str, float]:
    return {key: float(np.mean([row[key] for row in values])) for key in values[0]}
