"""The loop: restore, step, log, evaluate, save; then the table of what was reached."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxrobust import build, compilation, metrics, records, sharding
from jaxrobust.checkpoint import Checkpoints, abstract_state, disk_full
from jaxrobust.data import pipeline, sources
from jaxrobust.progress import Progress, StopSignals, say
from jaxrobust.step import TrainState
from jaxrobust.types import Batch, Params

# What a workdir may change between two runs of the same command without becoming another run.
_FREE = ("log.", "data.dir", "data.workers", "test.")  # a record carries its own test settings
_PHASES = ("pretrain", "train")


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
    source, built = check(config, phases)
    plain = json.loads(config.to_json())
    claim(workdir, plain)
    compilation.use_persistent_cache()
    say(f"{config.model.name} on {config.data.name}, {_device()}, workdir {workdir}")
    weights = None
    for name in phases:
        with jax.set_mesh(built[name].mesh):
            weights = _run_phase(config, workdir, name, built[name], source, weights)
            _test(config, workdir, plain, name, built[name], weights)
    if jax.process_index() == 0:
        print(table(workdir), flush=True)


def check(config, phases: list[str]) -> tuple[sources.Source, dict[str, build.Phase]]:
    """The training split and the phases; refuses whatever would fail later."""
    if not phases:
        raise ValueError("pretrain.epochs and train.epochs are both 0: there is nothing to train")
    source, *_ = (_open(config, f"{k}_split") for k in ("train", "selection", "test"))
    built = {name: build.phase(config, name, len(source)) for name in phases}
    for key in ("evaluation", "test"):
        build.divides(config[key].batch_size, jax.device_count(), f"{key}.batch_size")
        build.evaluation(config, built[phases[0]].mesh, steps=config[key].steps)
    lowest = {
        "evaluation.images": 0,
        "test.images": 0,
        "evaluation.every_epochs": 1,
        "checkpoint.every_epochs": 1,
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


def _open(config, key: str) -> sources.Source:
    """A split of the config's data set, checked against its model."""
    data, model = config.data, config.model
    source = sources.open_source(data.name, data[key], data_dir=data.dir)
    if source.num_classes != model.num_classes:
        raise ValueError(
            f"model.num_classes={model.num_classes}, but {data.name} has {source.num_classes} "
            f"classes; set model.num_classes={source.num_classes}"
        )
    if source.channels != model.in_channels:
        raise ValueError(
            f"{data.name} has {source.channels} channels; set model.in_channels={source.channels}"
        )
    return source


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
        old, new = _flat(json.loads(path.read_text())), _flat(plain)
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


class Weights(NamedTuple):
    """The best weights of a phase so far."""

    params: Params
    stats: Params


def _run_phase(config, workdir, name, phase, source, start) -> tuple[int, Weights]:
    """The best weights of a phase and their step, after training what is missing."""
    latest, best = (Checkpoints(workdir / name / kind) for kind in ("latest", "best"))
    with contextlib.closing(latest), contextlib.closing(best):
        abstract = abstract_state(phase.abstract_state, sharding.replicated(phase.mesh))
        done = latest.latest_step()
        if done is not None:
            state = latest.restore(done, abstract)
        else:
            state = phase.init(jax.random.key(config.seed))
            if start is not None:  # from the phase before; the average starts from its weights
                _, (params, stats) = start
                copy = jax.tree.map(jnp.copy, params)
                state = state._replace(params=params, stats=stats, ema=copy)
        if done != phase.total_steps or not _scored(workdir, name, done):
            say(f"{name}: step {done or 0} of {phase.total_steps}, {config[name].objective}")
            _steps(config, workdir, name, phase, state, latest, best, source)
        for checkpoints in (latest, best):
            checkpoints.wait()
        step = best.latest_step()
        assert step is not None, "the last step of a phase is always evaluated"
        return step, best.restore(step, Weights(abstract.params, abstract.stats))


def _steps(config, workdir, name, phase, state: TrainState, latest, best, source) -> None:
    """From the state's step to the end of the phase, its last evaluation included."""
    p, epoch, start = config[name], phase.steps_per_epoch, int(state.step)
    step = start
    step_fn, seconds, hit = compilation.compiled(
        phase.step, phase.abstract_state, build.abstract_batch(config, name)
    )
    say(f"{name}: step compiled in {seconds:.1f} s (compilation cache {'hit' if hit else 'miss'})")
    select = _selection(config, workdir, name, phase, best)
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
        Progress(name, step, phase.total_steps, p.batch_size) as progress,
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
                batch = next(batches)
            except sources.DataError as error:
                save()
                latest.wait()
                raise sources.DataError(
                    f"{error}. Step {step} is saved under {workdir}: once the data is whole, the "
                    "same command continues there"
                ) from error
            state, values = step_fn(state, _global(phase.mesh, batch))
            step += 1
            window.append((step, values))
            if step % config.log.every_steps == 0 or step == phase.total_steps:
                means = _means(_check_finite(window, latest))
                means["lr"] = float(phase.schedule(step - 1))
                window.clear()
                progress.show(step, means)
                write(step, means | {"images_per_second": progress.images_per_second})


def _selection(config, workdir, name, phase, best: Checkpoints):
    """`select(step, state) -> scores`: evaluates on the selection split, keeps the best weights."""
    settings, source = config.evaluation, _open(config, "selection_split")
    evaluate = build.evaluation(config, phase.mesh, steps=settings.steps)
    metric = "clean" if config[name].objective == "clean" else "robust"

    def select(step: int, state: TrainState) -> dict[str, float]:
        weights = Weights(state.ema if settings.weights == "ema" else state.params, state.stats)
        scores = count(evaluate, weights, source, settings, config, phase.mesh)
        say(
            f"{name}: step {step}, selection split: clean {scores['clean']:.1%}, "
            f"robust {scores['robust']:.1%}"
        )
        before = best.latest_step()
        if before is None or scores[metric] >= best.meta(before)[metric]:
            best.save(step, weights, scores)
            best.wait()
        if jax.process_index() == 0:  # last: without this line the evaluation is repeated
            with _scores(workdir, name).open("a") as lines:
                lines.write(json.dumps({"step": step} | scores) + "\n")
        return {f"selection_{key}": value for key, value in scores.items()}

    return select


def _scores(workdir: Path, name: str) -> Path:
    return workdir / name / "selection.jsonl"


def _scored(workdir: Path, name: str, step: int | None) -> bool:
    """Whether a step was evaluated on the selection split."""
    return _first_host(any(row["step"] == step for row in metrics.read(_scores(workdir, name))))


def _first_host(decision: bool) -> bool:
    """What the first host decides: another one may have another, or a later, view of the files."""
    if jax.process_count() == 1:
        return decision
    return bool(multihost_utils.broadcast_one_to_all(np.array(decision)))


def _all_stop(asked: bool, meeting: bool) -> bool:
    """Whether to stop now: several hosts decide together, and only where they meet anyway."""
    if jax.process_count() == 1:
        return asked
    return meeting and bool(multihost_utils.process_allgather(np.array(asked)).any())


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


def count(evaluate, weights: Weights, source, settings, config, mesh) -> dict[str, float]:
    """Clean and robust accuracy on the first `settings.images` images of a source (0: all)."""
    batches = pipeline.evaluation_batches(
        source,
        batch_size=settings.batch_size,
        image_size=config.model.image_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        limit=settings.images or None,
        workers=config.data.workers,
    )
    key = jax.random.key(config.seed)
    totals: dict[str, int] = {"count": 0, "clean": 0, "robust": 0}
    for b in batches:
        arrays = sharding.global_arrays(mesh, (b.images, b.labels, b.mask, b.ids))
        for name, value in jax.device_get(evaluate(*weights, *arrays, key)).items():
            totals[name] += int(value)
    return {k: totals[k] / max(totals["count"], 1) for k in ("clean", "robust")} | {
        "images": totals["count"]
    }


def _test(config, workdir, plain, name, phase, weights) -> None:
    """Appends the record of a phase's best weights on the test split, unless it is there."""
    step, best = weights
    source = _open(config, "test_split")
    which = f"{name}, step {step}, {config.evaluation.weights}"
    attack = {
        "name": "apgd-ce",
        "norm": config.attack.norm,
        "epsilon": config.attack.epsilon,
        "steps": config.test.steps,
        "restarts": 1,
        "start": "random",
    }
    images = min(len(source), config.test.images or len(source))
    identity = (which, [attack], _ids(images))
    known = ((r["weights"], r["attacks"], r["image_ids"]) for r in results(workdir))
    if _first_host(identity in known):
        return
    say(f"{name}: testing step {step} with APGD-CE, {config.test.steps} steps")
    # In float32, as RobustBench does, whatever the type of training.
    evaluate = build.evaluation(config, phase.mesh, steps=config.test.steps, dtype="float32")
    scores = count(evaluate, best, source, config.test, config, phase.mesh)
    record = records.accuracy_record(
        config=plain,
        weights=which,
        params=best.params,
        stats=best.stats,
        dataset=config.data.name,
        split=config.data.test_split,
        image_ids=_ids(images),
        dtype="float32",
        preprocessing=pipeline.preprocessing_id(source, config.model.image_size),
        attacks=[attack],
        clean=scores["clean"],
        robust=scores["robust"],
        seed=config.seed,
    )
    if jax.process_index() == 0:
        old = "".join(json.dumps(r) + "\n" for r in results(workdir))
        metrics.replace(workdir / "results.jsonl", old + json.dumps(record) + "\n")


def _ids(images: int) -> str:
    return f"0..{images - 1}"


def results(workdir: Path) -> list[dict]:
    """The records of a workdir, oldest first."""
    return metrics.read(workdir / "results.jsonl")


def table(workdir: Path) -> str:
    """The records as a table for people."""
    rows = results(workdir)
    width = max(len(r["weights"]) for r in rows)
    lines = [f"{'weights':{width}}  {'clean':>7}  {'robust':>7}  images  attack"]
    for r in rows:
        a, n = r["attacks"][0], int(r["image_ids"].split("..")[1]) + 1
        attack = f"{a['name'].upper()} {a['steps']} steps, {a['norm']} {a['epsilon']:.4g}"
        lines.append(
            f"{r['weights']:{width}}  {r['clean']:7.1%}  {r['robust']:7.1%}  {n:6d}  {attack}"
        )
    split = f"{rows[-1]['dataset']}, split {rows[-1]['split']}"
    return "\n".join(["", split, *lines, f"records: {workdir / 'results.jsonl'}"])
