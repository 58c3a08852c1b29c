"""The selection split: picks the best weights of a phase."""

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np

from jaxrobust.attacks import fixed_steps
from jaxrobust.config import Config, network_of
from jaxrobust.data.splits import spread
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.evaluation.network import collapse
from jaxrobust.runtime.devices import sharding
from jaxrobust.runtime.files import jsonl
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text.progress import say
from jaxrobust.training import build
from jaxrobust.training.run import splits
from jaxrobust.training.run.phase import PhaseRun
from jaxrobust.training.update import alarm, objectives
from jaxrobust.training.update.step import TrainState, averaged
from jaxrobust.training.update.value_checks import must_be, one_of
from jaxrobust.types import Weights, check_length, threats
from jaxrobust.weights.store.checkpoint import Checkpoints
from jaxrobust.weights.store.steps import steps


def counter(config: Config, mesh: jax.sharding.Mesh) -> accuracy.Counter:
    """Build the evaluation on the selection split, under the config's attack.

    With several norms, an image is robust if it withstands all of them.
    """
    e = config.evaluation
    if e.metric is not None:
        one_of("evaluation.metric", e.metric, ("clean", "robust"))
    if e.attack == "apgd-ce":
        for key in ("step_size", "start"):
            if e[key] is not None:
                raise ValueError(
                    f"evaluation.{key}={e[key]} has no effect with evaluation.attack='apgd-ce'; "
                    "leave it out, or set evaluation.attack='pgd-20'"
                )
        return build.evaluation(config, mesh, steps=e.steps)
    if (parsed := fixed_steps.parse(e.attack)) is None:
        raise ValueError(
            f"evaluation.attack={e.attack!r} must be one of 'apgd-ce', {fixed_steps.written()}"
        )
    if e.start is not None:
        one_of("evaluation.start", e.start, fixed_steps.STARTS)
    inside = e.step_size is None or 0 < e.step_size < math.inf
    must_be("evaluation.step_size", e.step_size, inside, "above 0")
    balls = threats(config.attack)
    check_length("evaluation.step_size", e.step_size or 0, balls[0].norm)
    if e.step_size is not None and len(balls) > 1:
        raise ValueError(
            f"evaluation.step_size={e.step_size:.4g} would apply to several norms, whose radii "
            "differ; leave it out, or set evaluation.attack='apgd-ce'"
        )
    lengths = [parsed.length(ball.epsilon, step=e.step_size) for ball in balls]
    searches = [
        fixed_steps.attack_of(parsed.settings(ball, length=length, start=e.start))
        for ball, length in zip(balls, lengths, strict=True)
    ]
    net, attack = network_of(config), accuracy.of_union(searches)
    return accuracy.counter(net, attack, mesh=mesh, dtype=config.model.dtype)


def selection(
    run: PhaseRun, between: Callable[[], None] = lambda: None
) -> Callable[[int, TrainState], dict[str, float]]:
    """Return `select(step, state) -> dict`, which evaluates on the selection split and keeps the
    best weights; an exception from `between`, called after each batch, aborts it before that.
    """
    config, name, phase, latest, best = run.config, run.name, run.phase, run.latest, run.best
    settings = config.evaluation
    images = splits.evaluated(config, "selection_split", settings, run.workdir)
    choice = spread.choice(images.source, images.limit)
    chosen_by = {"image_choice": choice} if choice == spread.HASH else {}
    older = [row for row in jsonl.read(run.file("selection.jsonl")) if "image_choice" not in row]
    if chosen_by and hosts.first(bool(older)):  # to compare weights on the same images
        say(f"{name}: selection still uses the split's first {len(images)} images, as before")
        images, chosen_by = replace(images, places=tuple(range(len(images)))), {}
    evaluate = counter(config, phase.mesh)
    attacked = objectives.named(config[name].objective).attacks
    metric = settings.metric or ("robust" if attacked else "clean")

    def save(step: int, weights: Weights, reached: dict) -> None:
        latest.wait()  # two writers at once would confuse their host barriers
        if config.checkpoint.keep_epochs:
            with contextlib.closing(Checkpoints(run.file("epochs"), keep_all=True)) as every:
                if step not in steps(every.directory):  # a rollback repeats this step
                    every.save(step, weights, reached)
                    every.wait()
        best_step = best.latest_step()
        if best_step is None or _rank(reached, metric) >= _rank(best.meta(best_step), metric):
            best.save(step, weights, reached)
            best.wait()

    def select(step: int, state: TrainState) -> dict[str, float]:
        raw = state.params, state.stats
        chosen = averaged(state) if settings.weights == "ema" else raw
        weights = Weights(*jax.device_put(chosen, sharding.replicated(phase.mesh)))
        reached = accuracy.count(
            evaluate, weights, images, phase.mesh, bar="selection", between=between
        )
        doubts = reached.pop("doubts", {})
        say(
            f"{name}: step {step}, selection split: clean {reached['clean']:.1%}, "
            f"robust {reached['robust']:.1%}"
        )
        with run.clock.of("saving"):
            save(step, weights, reached)
        one = reached.pop("collapse", None)
        if jax.process_index() == 0:  # a kill may have prevented the line in metrics.jsonl
            file = run.file("selection.jsonl")
            rows = [r for r in jsonl.read(file) if r["step"] < step]
            rows.append({"step": step} | reached | chosen_by)
            jsonl.replace(file, "".join(json.dumps(row) + "\n" for row in rows))
        for flag in ("one-class", "lopsided-classes", "permuted-labels"):
            if flag in doubts:
                say(f"{name}: WARNING at step {step}: {doubts[flag]}")
        if one:
            say(f"{name}: WARNING at step {step}: {one['words']}")
        if attacked and (sentence := _overfitting(run)):
            say(f"{name}: WARNING: {sentence}")
        return {f"selection_{key}": value for key, value in reached.items()}

    return select


def _rank(reached: dict, metric: str) -> tuple[bool, float]:
    """Score weights; a network that predicts one class ranks last, since it is not robust."""
    return not collapse.proven(reached), reached[metric]


def _overfitting(run: PhaseRun) -> str | None:
    scored = jsonl.read(run.file("selection.jsonl"))
    logged = [m for m in jsonl.read(run.workdir / "metrics.jsonl") if m["phase"] == run.name]
    since, training = 0, []
    for row in scored:
        between = [
            m["robust"] for m in logged if since < m["step"] <= row["step"] and "robust" in m
        ]
        training.append(float(np.mean(between)) if between else math.nan)
        since = row["step"]
    images = scored[-1]["images"] if scored else 1
    return alarm.overfitting([row["robust"] for row in scored], training, images=images)
