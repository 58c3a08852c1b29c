"""Accuracies of a network on a split, their records, and the table of a run."""

from pathlib import Path
from typing import Any

import jax

from jaxrobust import models
from jaxrobust.config import NetworkSpec, network_of
from jaxrobust.data.splits import spread
from jaxrobust.data.stream import pipeline
from jaxrobust.evaluation.engine import accuracy
from jaxrobust.evaluation.records import checked, of_weights, records
from jaxrobust.evaluation.records.record import AccuracyRecord, AttackSettings
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text.progress import say
from jaxrobust.training import build
from jaxrobust.training.run import splits
from jaxrobust.training.run.phase import PhaseRun
from jaxrobust.types import Weights, threats
from jaxrobust.weights.store import hashes
from jaxrobust.weights.trained import history


def test(run: PhaseRun, plain: dict[str, Any], step: int, best: Weights) -> dict[str, float]:
    """Record the test accuracy of a phase's best weights, unless the record exists.

    Returns the clean and robust accuracies, or nothing if the record exists.
    """
    config, workdir, name = run.config, run.workdir, run.name
    images = splits.evaluated(config, "test_split", config.test, workdir)
    source, damage = images.source, images.meets
    weights_name = f"{name}, step {step}, {config.evaluation.weights}"
    balls = threats(config.attack)
    settings: list[AttackSettings] = [
        {
            "name": "apgd-ce",
            "norm": ball.norm,
            "epsilon": ball.epsilon,
            "steps": config.test.steps,
            "restarts": 1,
            "start": "random",
        }
        for ball in balls
    ]
    ids = records.ranges(spread.places(source, images.limit).tolist())
    sha256 = hashes.weights_sha256(best.params, best.stats)
    existing = (
        (r.weights, r.attacks, r.image_ids, r.weights_sha256) for r in records.read(workdir)
    )
    if hosts.first((weights_name, settings, ids, sha256) in existing):
        return {}
    say(f"{name}: testing step {step} with APGD-CE, {config.test.steps} steps")
    scores = _scores(run, best, images)
    spec = NetworkSpec.of_config(config)
    function: Any = models.origin(spec.name, **spec.sizes(), **spec.options)
    damaged = sorted(damage.met) if damage is not None else []
    one, doubts = scores.get("collapse"), scores.get("doubts", {})
    doubts |= {"collapsed": one["words"]} if one else {}
    data, wanted, init = config.data, config.data.preprocessing, history.start_of(workdir)
    training = of_weights.training(
        history.of_run(workdir, name, config=plain),
        dataset=data.name,
        split=data.test_split,
        files_sha256=source.files_sha256,
    )
    record = AccuracyRecord(
        config_sha256=hashes.config_sha256(plain),
        weights=weights_name,
        weights_sha256=sha256,
        dataset=data.name,
        split=data.test_split,
        image_ids=ids,
        image_choice=spread.choice(source, images.limit),
        dtype="float32",
        preprocessing=pipeline.preprocessing_id(source, config.model.image_size, wanted),
        attacks=settings,
        method="union" if len(balls) > 1 else None,
        accuracy_after=scores.get("after"),
        clean=scores["clean"],
        robust=scores["robust"],
        seed=config.seed,
        flags=of_weights.training_flags(training) | doubts,
        interval=records.intervals(scores["clean"], scores["robust"], scores["images"]),
        training=training,
        ids_sha256=source.ids_sha256 or None,
        classes_sha256=hashes.classes_sha256(source.classes),
        init=init and {key: value for key, value in init.items() if key != "training"},
        clean_top5=scores.get("clean_top5"),
        function=function,
        damaged=[source.describe(index) for index in damaged] or None,
    ).stamped()
    if jax.process_index() == 0:
        records.append(workdir / "results.jsonl", record)
    return {key: scores[key] for key in ("clean", "robust")}


def _scores(run: PhaseRun, best: Weights, images: accuracy.EvaluatedImages) -> dict[str, Any]:
    """Measure in float32, as RobustBench does, whatever the training type."""
    # With several norms, each has its own attack. An image is robust if it withstands all; `after`
    # holds the accuracy after each norm's attack, including those before it.
    config, mesh, balls = run.config, run.phase.mesh, threats(run.config.attack)
    options: dict[str, Any] = {"dtype": "float32", "top5": True}
    if len(balls) == 1:
        evaluate = build.evaluation(config, mesh, steps=config.test.steps, **options)
        return accuracy.count(evaluate, best, images, mesh, bar="testing")
    net, after = network_of(config, dtype="float32"), {}
    robust: Any = True
    for ball in balls:
        attack = accuracy.apgd_ce(ball, steps=config.test.steps)
        evaluate = accuracy.counter(net, attack, mesh=mesh, norm=ball.norm, **options)
        counts = accuracy.each(evaluate, best, images, mesh, bar=f"testing in {ball.norm}")
        robust = counts["robust"] & robust
        after[str(ball)] = float(robust.mean())
    scores = {"images": len(counts["clean"]), "after": after, "robust": after[str(balls[-1])]}
    scores |= {key: float(counts[key].mean()) for key in ("clean", "clean_top5") if key in counts}
    return scores | accuracy.found(images, counts["answers"], counts["labels"])


def table(workdir: Path) -> str:
    """Format the records as a table for people."""
    rows = records.read(workdir)
    for record in rows:
        checked.check(record, workdir / "results.jsonl")
    width = max(len(str(r.weights)) for r in rows)
    lines = [f"{'weights':{width}}  {'clean':>7}  {'robust':>7}  images  attack"]
    for r in rows:
        n = records.images_of(r) or 0
        robust = "-" if r.robust is None else f"{r.robust:.1%}"
        attack = records.attack_line(r)
        lines.append(f"{r.weights:{width}}  {r.clean:7.1%}  {robust:>7}  {n:6d}  {attack}")
    split = f"{rows[-1].dataset}, split {rows[-1].split}"
    warned = ("collapsed", "one-class", "lopsided-classes", "permuted-labels")
    lines += [f"WARNING: {r.weights}: {r.flags[f]}" for r in rows for f in warned if f in r.flags]
    return "\n".join(["", split, *lines, f"records: {workdir / 'results.jsonl'}"])
