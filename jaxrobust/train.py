"""The loop: restore, step, log, evaluate, save; then the table of what was reached."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxrobust import build, compilation, metrics, records, sharding
from jaxrobust.checkpoint import Checkpoints, abstract_state
from jaxrobust.data import pipeline, sources
from jaxrobust.progress import Progress, StopSignals, say
from jaxrobust.step import TrainState
from jaxrobust.types import Batch

# What a workdir may change between two runs of the same command without becoming another run.
_FREE = ("log.", "data.dir", "data.workers")
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
    plain = json.loads(config.to_json())
    phases = [name for name in _PHASES if config[name].epochs > 0]
    if not phases:
        raise ValueError("pretrain.epochs and train.epochs are both 0: there is nothing to train")
    train_source = _open(config, "train_split")
    _open(config, "selection_split"), _open(config, "test_split")
    built = {name: build.phase(config, name, len(train_source)) for name in phases}
    for key in ("evaluation", "test"):
        build.divides(config[key].batch_size, jax.device_count(), f"{key}.batch_size")
        build.evaluation(config, built[phases[0]].mesh, steps=config[key].steps)
    if config.evaluation.weights not in ("ema", "raw"):
        raise ValueError(f"evaluation.weights={config.evaluation.weights!r}; one of 'ema', 'raw'")
    metrics.check(tensorboard=config.log.tensorboard)
    for name in phases:
        _batches(config, name, train_source, 0).close()
    claim(workdir, plain)
    compilation.use_persistent_cache()
    say(f"{config.model.name} on {config.data.name}, {_device()}, workdir {workdir}")
    weights = None
    for name in phases:
        with jax.set_mesh(built[name].mesh):
            weights = _run_phase(config, workdir, name, built[name], train_source, weights)
            _test(config, workdir, plain, name, built[name], weights)
    say(table(workdir))


def _open(config, key: str) -> sources.Source:
    """A split of the config's data set, checked against its model."""
    data, model = config.data, config.model
    source = sources.open_source(data.name, data[key], data_dir=data.dir)
    if source.num_classes != model.num_classes:
        raise ValueError(
            f"model.num_classes={model.num_classes}, but {data.name} has {source.num_classes} "
            f"classes; set model.num_classes={source.num_classes}"
        )
    if source.channels != build.in_channels(config):
        raise ValueError(
            f"{data.name} has {source.channels} channels; set model.options.in_channels to that"
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
            workdir.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(plain, indent=2) + "\n")
        return
    old, new = _flat(json.loads(path.read_text())), _flat(plain)
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


def _run_phase(config, workdir, name, phase, source, weights) -> tuple[int, Any, Any]:
    """(step, params, stats) of the best checkpoint of a phase, after training what is missing."""
    metric = "clean" if config[name].objective == "clean" else "robust"
    checkpoints = Checkpoints(workdir / name, metric=metric)
    abstract = abstract_state(phase.abstract_state, sharding.replicated(phase.mesh))
    done = checkpoints.latest_step()
    if done is None:
        state, meta = phase.init(jax.random.key(config.seed)), {"examples_consumed": 0}
        if weights is not None:  # the phase before: its weights, and the average starts from them
            _, params, stats = weights
            state = state._replace(params=params, stats=stats, ema=jax.tree.map(jnp.copy, params))
    else:
        state, meta = checkpoints.restore(done, abstract)
    if done != phase.total_steps or metric not in meta:
        say(f"{name}: step {done or 0} of {phase.total_steps}, {config[name].objective}")
        _steps(config, workdir, name, phase, state, meta, checkpoints, source)
    checkpoints.wait()
    best = checkpoints.best_step()
    state, _ = checkpoints.restore(best, abstract)
    checkpoints.close()
    return best, _chosen(config, state), state.stats


def _steps(config, workdir, name, phase, state: TrainState, meta, checkpoints, source) -> None:
    """From the state's step to the end of the phase, its last evaluation included."""
    p, epoch = config[name], phase.steps_per_epoch
    step = saved = int(state.step)
    scored = "robust" in meta
    step_fn, seconds, hit = compilation.compiled(
        phase.step, phase.abstract_state, build.abstract_batch(config, name)
    )
    say(f"{name}: step compiled in {seconds:.1f} s (compilation cache {'hit' if hit else 'miss'})")
    evaluate = build.evaluation(config, phase.mesh, steps=config.evaluation.steps)
    selection = _open(config, "selection_split")
    window: list[tuple[int, dict]] = []  # metrics still on the device

    def save(scores=None):
        _check_finite(window, checkpoints)
        meta = {"examples_consumed": step * p.batch_size, "phase": name} | (scores or {})
        checkpoints.save(step, state, meta, scores)

    def due(epochs: int) -> bool:
        return step > 0 and (step == phase.total_steps or step % (epochs * epoch) == 0)

    with (
        metrics.writer(
            workdir,
            phase=name,
            tensorboard=config.log.tensorboard,
            enabled=jax.process_index() == 0,
        ) as write,
        Progress(name, step, phase.total_steps, p.batch_size) as progress,
        contextlib.closing(_batches(config, name, source, meta["examples_consumed"])) as batches,
        StopSignals() as stop,
    ):
        while True:
            if _all_stop(stop.asked, step % config.log.every_steps == 0):
                if step != saved:
                    save()
                checkpoints.wait()
                raise Interrupted(
                    f"stopped after step {step} of {phase.total_steps}, saved under {workdir}; "
                    "the same command continues there"
                )
            if due(config.evaluation.every_epochs) and not scored:
                weights = _chosen(config, state), state.stats
                scores = count(evaluate, weights, selection, config.evaluation, config, phase.mesh)
                say(
                    f"{name}: epoch {step // epoch}, selection split: clean {scores['clean']:.1%}, "
                    f"robust {scores['robust']:.1%}"
                )
                write(step, {f"selection_{k}": v for k, v in scores.items()})
                save(scores)
                saved, scored = step, True
                progress.resume(step)
            elif due(config.checkpoint.every_epochs) and step != saved:
                save()
                saved = step
            if step == phase.total_steps:
                return
            state, values = step_fn(state, _global(phase.mesh, next(batches)))
            step, scored = step + 1, False
            window.append((step, values))
            if step % config.log.every_steps == 0 or step == phase.total_steps:
                means = _means(_check_finite(window, checkpoints))
                means["lr"] = float(phase.schedule(step - 1))
                window.clear()
                progress.show(step, means)
                write(step, means | {"images_per_second": progress.images_per_second})


def _all_stop(asked: bool, meeting: bool) -> bool:
    """Whether to stop now: several hosts decide together, and only where they meet anyway."""
    if jax.process_count() == 1:
        return asked
    return meeting and bool(multihost_utils.process_allgather(np.array(asked)).any())


def _chosen(config, state: TrainState):
    return state.ema if config.evaluation.weights == "ema" else state.params


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


def count(evaluate, weights, source, settings, config, mesh) -> dict[str, float]:
    """Clean and robust accuracy on the first `settings.images` images of a source (0: all)."""
    batches = pipeline.evaluation_batches(
        source,
        batch_size=settings.batch_size,
        image_size=config.model.image_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        limit=settings.images or None,
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
    step, params, stats = weights
    source = _open(config, "test_split")
    which = f"{name}, step {step}, {config.evaluation.weights}"
    if any(r["weights"] == which for r in results(workdir)):
        return
    say(f"{name}: testing step {step} with APGD-CE, {config.test.steps} steps")
    evaluate = build.evaluation(config, phase.mesh, steps=config.test.steps)
    scores = count(evaluate, (params, stats), source, config.test, config, phase.mesh)
    record = records.accuracy_record(
        config=plain,
        weights=which,
        params=params,
        stats=stats,
        dataset=config.data.name,
        split=config.data.test_split,
        images=int(scores["images"]),
        preprocessing=pipeline.preprocessing_id(source, config.model.image_size),
        attacks=[
            {
                "name": "apgd-ce",
                "norm": config.attack.norm,
                "epsilon": config.attack.epsilon,
                "steps": config.test.steps,
                "restarts": 1,
                "start": "random",
            }
        ],
        clean=scores["clean"],
        robust=scores["robust"],
        seed=config.seed,
    )
    if jax.process_index() == 0:
        records.append(workdir / "results.jsonl", record)


def results(workdir: Path) -> list[dict]:
    """The records of a workdir, oldest first."""
    path = workdir / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(workdir: Path) -> str:
    """The records as a table for people."""
    rows = results(workdir)
    attack = rows[-1]["attacks"][0]
    head = (
        f"test split {rows[-1]['split']}, APGD-CE {attack['steps']} steps, "
        f"{attack['norm']} {attack['epsilon']:.4g}"
    )
    width = max(len(r["weights"]) for r in rows)
    lines = [f"{'weights':{width}}  {'clean':>7}  {'robust':>7}  images"]
    for r in rows:
        n = int(r["image_ids"].split("..")[1]) + 1
        lines.append(f"{r['weights']:{width}}  {r['clean']:7.1%}  {r['robust']:7.1%}  {n:6d}")
    return "\n".join(["", head, *lines, f"records: {workdir / 'results.jsonl'}"])
